"""Reward functions: the protocol, rewards that can be verified, shaping, combination, and finding one by its name.

Names are looked up in their modules when they are first used, so that `rlhf.rewards:gsm8k_strict` works in a config
and the math worker starts without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf.rewards.boxed_math import BoxedMath
    from rlhf.rewards.combination import CombinedReward, RewardPart
    from rlhf.rewards.http import HttpReward
    from rlhf.rewards.loading import load_reward
    from rlhf.rewards.protocol import RewardFunction, RewardLog, reward_name, score_completions, text_of
    from rlhf.rewards.shaping import LengthPenalty, SoftOverlong, length_penalty, missing_end_penalty, soft_overlong
    from rlhf.rewards.verifiable import (
        contains_word,
        countdown,
        exact_match,
        gsm8k_lenient,
        gsm8k_strict,
        multiple_choice,
        number_equal,
        regex_format,
    )

_MODULES = {
    "boxed_math": ("BoxedMath",),
    "combination": ("CombinedReward", "RewardPart"),
    "http": ("HttpReward",),
    "loading": ("load_reward",),
    "protocol": ("RewardFunction", "RewardLog", "reward_name", "score_completions", "text_of"),
    "shaping": ("LengthPenalty", "SoftOverlong", "length_penalty", "missing_end_penalty", "soft_overlong"),
    "verifiable": (
        "contains_word",
        "countdown",
        "exact_match",
        "gsm8k_lenient",
        "gsm8k_strict",
        "multiple_choice",
        "number_equal",
        "regex_format",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BoxedMath",
    "CombinedReward",
    "HttpReward",
    "LengthPenalty",
    "RewardFunction",
    "RewardLog",
    "RewardPart",
    "SoftOverlong",
    "contains_word",
    "countdown",
    "exact_match",
    "gsm8k_lenient",
    "gsm8k_strict",
    "length_penalty",
    "load_reward",
    "missing_end_penalty",
    "multiple_choice",
    "number_equal",
    "regex_format",
    "reward_name",
    "score_completions",
    "soft_overlong",
    "text_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
