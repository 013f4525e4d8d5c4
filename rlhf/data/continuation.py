"""Tokens of a text that follows another one, and back: what a tokenizer adds at the start of a text must not count.

Tokenizers of the sentencepiece kind tokenize the first word of any text as if a space preceded it, and drop that space
when decoding. For a completion both are wrong: it does not start a text, it goes on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from rlhf.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ANCHORS = ("\n", "a", ".", "0", ">")


class Anchor(NamedTuple):
    """A short text to stand before a continuation, for a tokenizer that adds a space to the start of a text."""

    ids: list[int]
    text: str
    """What the ids decode to."""


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **settings: Any) -> list[int]:
    """The tokenizer's own ids of a text.

    Raises:
        DataError: The vocabulary lacks a part of the text, and the tokenizer has no token for what is unknown.
    """
    try:
        return list(tokenizer(text, verbose=False, **settings)["input_ids"])
    except Exception as error:  # the tokenizers library raises a bare Exception for a missing unknown token
        if "[UNK]" not in str(error):
            raise
        lacking = "".join(sorted(set(text) - set(tokenizer.get_vocab())))
        raise DataError(
            f"the tokenizer has no token for {lacking!r}, and none for what is unknown",
            where=tokenizer.name_or_path or None,
            got=text,
            remedy="Take a tokenizer that knows these characters, or another text.",
        ) from error


def plain_ids(tokenizer: PreTrainedTokenizerBase, text: str, **settings: Any) -> list[int]:
    """Tokenize a text without adding special tokens."""
    return tokenize(tokenizer, text, add_special_tokens=False, **settings)


def continuation_ids(tokenizer: PreTrainedTokenizerBase, text: str, **settings: Any) -> list[int]:
    """Tokenize a text as the continuation of another one.

    Args:
        tokenizer: Any tokenizer.
        text: What follows.
        **settings: For the tokenizer, such as `split_special_tokens`.

    Raises:
        ModelError: The tokenizer adds a space that cannot be told from the text's own.
    """
    if not text or anchor_of(tokenizer) is None:
        return plain_ids(tokenizer, text, **settings)
    for anchor in _ANCHORS:
        before, together = plain_ids(tokenizer, anchor), plain_ids(tokenizer, anchor + text, **settings)
        if together[: len(before)] == before:
            return together[len(before) :]
    raise ModelError(
        f"cannot tokenize {text[:60]!r} as the continuation of a text without adding a space to it",
        where=tokenizer.name_or_path or None,
        remedy="Load the tokenizer with add_prefix_space=False.",
    )


def continuation_text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode tokens that follow other ones, special tokens left out."""
    anchor = anchor_of(tokenizer)
    if anchor is None:
        return _decode(tokenizer, ids)
    return _decode(tokenizer, [*anchor.ids, *ids]).removeprefix(anchor.text)


_KNOWN_ANCHORS: WeakKeyDictionary[Any, Anchor | None] = WeakKeyDictionary()


def anchor_of(tokenizer: PreTrainedTokenizerBase) -> Anchor | None:
    """Return an anchor for a tokenizer that adds a space to the start of a text, None for one that does not."""
    if tokenizer not in _KNOWN_ANCHORS:
        _KNOWN_ANCHORS[tokenizer] = _find_anchor(tokenizer)
    return _KNOWN_ANCHORS[tokenizer]


def _find_anchor(tokenizer: PreTrainedTokenizerBase) -> Anchor | None:
    for text in _ANCHORS:
        ids = _try_plain_ids(tokenizer, text)
        if not ids or not _decode(tokenizer, ids).endswith(text):
            continue  # a small vocabulary may lack this letter
        # Probed by doubling the anchor, because that vocabulary may know no other letter either.
        twice = _try_plain_ids(tokenizer, text + text)
        if twice[: len(ids)] == ids:
            return Anchor(ids, _decode(tokenizer, ids)) if twice[len(ids) :] != ids else None
    return None


def _try_plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """As `plain_ids`, but nothing for a letter that the vocabulary does not have and cannot replace."""
    try:
        return plain_ids(tokenizer, text)
    except DataError:
        return []


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
