"""Corrections to scores that know only how long a completion is and whether it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import RewardError


def soft_overlong(lengths: Tensor, *, limit: int, buffer: int) -> Tensor:
    """Penalty that grows from 0 to -1 over the last `buffer` tokens before the limit, to be added to the score.

    0 where length <= limit - buffer;  (limit - buffer - length) / buffer  up to the limit;  -1 beyond it.

    Source: DAPO (arXiv 2503.14476, equation 13; limit 20480, buffer 4096 there).

    Args:
        lengths: [N] completion tokens, end token included.
        limit: Greatest length without the full penalty, in tokens.
        buffer: Width of the slope, in tokens, from 1 to `limit`.

    Returns:
        [N] float32 in [-1, 0].

    Raises:
        RewardError: The buffer is not between 1 and the limit.

    Example:
        >>> soft_overlong(torch.tensor([80, 90, 100, 101]), limit=100, buffer=20).tolist()
        [0.0, -0.5, -1.0, -1.0]
    """
    _check_buffer(limit, buffer)
    return ((limit - buffer - lengths.float()) / buffer).clamp(-1.0, 0.0)


def missing_end_penalty(scores: Tensor, ended: Tensor, *, score: float = -1.0) -> Tensor:
    """Give completions that were cut at the limit a fixed score instead of their own.

    A reward model judges a text that stops in mid-sentence as if it were meant so; without this the policy drifts
    towards the limit. Source: "EOS trick" of Huang et al. 2024 (arXiv 2403.17031, section 5), `non_eos_penalty` -1.

    Args:
        scores: [N].
        ended: [N] bool, True where the end token came within the limit.
        score: What an unended completion gets; below what an ended one usually gets.

    Returns:
        [N]

    Example:
        >>> missing_end_penalty(torch.tensor([2.0, 3.0]), torch.tensor([True, False])).tolist()
        [2.0, -1.0]
    """
    return torch.where(ended, scores, torch.full_like(scores, score))


def length_penalty(lengths: Tensor, *, per_token: float) -> Tensor:
    """Penalty proportional to the length, to be added to the score: -per_token x length.

    Args:
        lengths: [N] completion tokens, end token included.
        per_token: >= 0, in units of the score.

    Returns:
        [N] float32, not positive.

    Example:
        >>> length_penalty(torch.tensor([10, 200]), per_token=0.5).tolist()
        [-5.0, -100.0]
    """
    if per_token < 0:
        raise RewardError("a length penalty cannot be negative", where="per_token", got=per_token, expected="0 or more")
    return -per_token * lengths.float()


def _check_buffer(limit: int, buffer: int) -> None:
    if not 1 <= buffer <= limit:
        raise RewardError(
            "the buffer must lie within the limit", where="soft_overlong", got=buffer, expected=f"1 to {limit}"
        )


# --- as reward functions ------------------------------------------------------------------------------------------


class SoftOverlong:
    """`soft_overlong` as a reward function, for use as a penalty in a `CombinedReward`.

    Args:
        limit: As in `soft_overlong`.
        buffer: As in `soft_overlong`.
    """

    def __init__(self, *, limit: int, buffer: int) -> None:
        _check_buffer(limit, buffer)
        self.limit, self.buffer = limit, buffer
        self.__name__ = "soft_overlong"

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """Return one penalty per completion."""
        return soft_overlong(_lengths(completion_ids), limit=self.limit, buffer=self.buffer).tolist()


class LengthPenalty:
    """`length_penalty` as a reward function, for use as a penalty in a `CombinedReward`.

    Args:
        per_token: As in `length_penalty`.
    """

    def __init__(self, *, per_token: float) -> None:
        length_penalty(torch.zeros(1), per_token=per_token)
        self.per_token = per_token
        self.__name__ = "length_penalty"

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        """Return one penalty per completion."""
        return length_penalty(_lengths(completion_ids), per_token=self.per_token).tolist()


def _lengths(completion_ids: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([len(ids) for ids in completion_ids])
