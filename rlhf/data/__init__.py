"""Records, and how they are read, tokenized and collated.

`from rlhf.data import load_prompts` works, and importing `rlhf.data.records` alone stays free of torch, datasets and
transformers: names are looked up in their modules when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.data.collation import left_pad, right_pad
    from rlhf.data.loading import DataConfig, load_demonstrations, load_prompts, load_rankings, split_holdout
    from rlhf.data.records import Demonstration, Prompt, Ranking, Text
    from rlhf.data.tokenization import decode_completion, encode_completion, encode_prompt, require_special_tokens

_MODULES = {
    "collation": ("left_pad", "right_pad"),
    "loading": ("DataConfig", "load_demonstrations", "load_prompts", "load_rankings", "split_holdout"),
    "records": ("Demonstration", "Prompt", "Ranking", "Text"),
    "tokenization": ("decode_completion", "encode_completion", "encode_prompt", "require_special_tokens"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "DataConfig",
    "Demonstration",
    "Prompt",
    "Ranking",
    "Text",
    "decode_completion",
    "encode_completion",
    "encode_prompt",
    "left_pad",
    "load_demonstrations",
    "load_prompts",
    "load_rankings",
    "require_special_tokens",
    "right_pad",
    "split_holdout",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
