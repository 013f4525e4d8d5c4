"""Rewards per token or per step: lists of numbers, or numbers at the tokens where steps end."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.errors import RewardError


def is_per_token(values: Sequence[Any]) -> bool:
    """Whether a reward function gave more than one number for every completion.

    >>> is_per_token([0.0, None]), is_per_token([[0.0, 1.0], {3: 1.0}])
    (False, True)
    """
    return len(values) > 0 and all(_is_row(value) for value in values)


def read_token_scores(
    values: Sequence[Any], completion_ids: Sequence[Sequence[int]] | None, *, name: str
) -> list[list[float]]:
    """Check rewards per token or per step and spread them over the tokens.

    Args:
        values: Per completion either a list with one number for each of its tokens (the end token included), or a
            mapping {token number from 0: reward} for rewards that stand at the ends of steps only.
        completion_ids: N lists of token ids.
        name: What to call the function in errors.

    Returns:
        Per completion one number for each of its tokens.

    Raises:
        RewardError: Another number of entries than tokens, a token that is not there, or what is no finite number.

    >>> read_token_scores([[0.5, 1.0], {1: 2.0}], [[7, 8], [7, 8, 9]], name="steps")
    [[0.5, 1.0], [0.0, 2.0, 0.0]]
    """
    if completion_ids is None:
        raise RewardError(
            "rewards per token need token ids, which there are none of here",
            where=name,
            remedy="Return one number per completion.",
        )
    return [
        _read_row(value, len(ids), f"{name}, completion {index}")
        for index, (value, ids) in enumerate(zip(values, completion_ids, strict=True))
    ]


def _is_row(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping) or bool(getattr(value, "shape", ()))


def _read_row(value: Any, length: int, where: str) -> list[float]:
    if isinstance(value, Mapping):
        return _spread(value, length, where)
    row = value.tolist() if hasattr(value, "tolist") else list(value)
    if len(row) != length:
        raise RewardError(
            "wrong number of rewards per token",
            where=where,
            got=len(row),
            expected=f"{length}, one for each id of `completion_ids`, the end token included",
        )
    return [_number(entry, where) for entry in row]


def _spread(steps: Mapping[Any, Any], length: int, where: str) -> list[float]:
    row = [0.0] * length
    for position, reward in steps.items():
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < length:
            raise RewardError(
                "a step's reward stands at a token that is not there",
                where=where,
                got=position,
                expected=f"a token number from 0 to {length - 1}",
            )
        row[position] = _number(reward, where)
    return row


def _number(entry: Any, where: str) -> float:
    if isinstance(entry, bool) or not isinstance(entry, numbers.Real) or not math.isfinite(float(entry)):
        raise RewardError("a token's reward is no finite number", where=where, got=entry, expected="a finite number")
    return float(entry)
