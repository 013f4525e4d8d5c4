"""Saving a tokenizer such that the folder tokenizes as the tokenizer did: transformers forgets a setting on the way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer and make sure that what is read back tokenizes alike.

    Tokenizers of Llama's kind that were loaded with `legacy: true` (Mistral's vocabulary, for one) put a space after
    every special token. transformers 5 reads that setting but does not write it, so that its saved folder gives other
    tokens: a model would be trained on the ones and used on the others.

    Raises:
        ModelError: The folder's tokenizer works differently nevertheless.
    """
    from transformers import AutoTokenizer

    legacy = getattr(tokenizer, "legacy", None)
    if legacy is not None:
        tokenizer.init_kwargs.setdefault("legacy", legacy)
    tokenizer.save_pretrained(folder)
    written = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    changed = [name for name in _STEPS if _step(tokenizer, name) != _step(written, name)]
    if changed or len(written) != len(tokenizer):
        raise ModelError(
            "the saved tokenizer would tokenize differently from the one that was trained with",
            where=str(folder),
            got=", ".join(changed) or f"{len(written)} tokens instead of {len(tokenizer)}",
            remedy="Load it from its tokenizer.json as PreTrainedTokenizerFast, save that, and use the saved folder.",
        )


def _step(tokenizer: Any, name: str) -> bytes | None:
    """One step of a fast tokenizer as its JSON; None where there is none, or for a tokenizer written in Python."""
    step = getattr(getattr(tokenizer, "backend_tokenizer", None), name, None)
    return None if step is None else step.__getstate__()
