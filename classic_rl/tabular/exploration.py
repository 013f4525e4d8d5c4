"""Schedules of step sizes and of exploration, and epsilon-greedy choice."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from rlhf.config import Config


class LinearSchedule(Config):
    """From `start` to `end` in a straight line over the first share of the run, then constant."""

    start: float = Field(ge=0, le=1)
    """Value at the first step."""
    end: float = Field(ge=0, le=1)
    """Value from `over` on."""
    over: float = Field(1.0, gt=0, le=1)
    """Share of the run's steps that the line takes."""

    def __call__(self, progress: float) -> float:
        """Return the value after a share `progress` of the run.

        >>> LinearSchedule(start=1.0, end=0.0, over=0.5)(0.25)
        0.5
        """
        return _along(self, progress)


def _along(line: LinearSchedule, progress: float) -> float:
    return line.start + (line.end - line.start) * min(1.0, progress / line.over)


def constant(value: float) -> LinearSchedule:
    """The schedule that stays."""
    return LinearSchedule(start=value, end=value)


def epsilon_greedy(values: np.ndarray, *, exploration: float) -> np.ndarray:
    """Probabilities of actions: 1 - exploration on the best (shared among equals), exploration spread over all.

    Source: Sutton and Barto 2018, section 2.2.

    Args:
        values: [..., A].
        exploration: epsilon in [0, 1]: 1 is uniform, 0 greedy.

    Returns:
        [..., A].

    >>> epsilon_greedy(np.array([1.0, 3.0]), exploration=0.5).tolist()
    [0.25, 0.75]
    """
    best = values == values.max(axis=-1, keepdims=True)
    return exploration / values.shape[-1] + (1 - exploration) * best / best.sum(axis=-1, keepdims=True)


def choose(values: list[float], exploration: float, explore: float, choice: float) -> int:
    """Draw from `epsilon_greedy` of a plain list with two uniform numbers: it stands in the innermost loop.

    Args:
        values: Of each action.
        exploration: epsilon.
        explore: Uniform in [0, 1): below epsilon, any action.
        choice: Uniform in [0, 1): which of the candidates.
    """
    if explore < exploration:
        return int(choice * len(values))
    best = max(values)
    if values.count(best) == 1:
        return values.index(best)
    equals = [action for action, value in enumerate(values) if value == best]
    return equals[int(choice * len(equals))]
