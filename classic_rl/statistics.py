"""Comparing algorithms from few runs: aggregates that outliers do not rule, with intervals.

Scores are [runs, tasks]: normalised returns of R seeds on each of M environments. Definitions are rliable's.
Source: Agarwal et al. 2021, "Deep reinforcement learning at the edge of the statistical precipice",
https://arxiv.org/abs/2108.13264.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rlhf.errors import ConfigError

DRAWS = 2000


class Estimate(NamedTuple):
    """A number and its confidence interval."""

    value: float
    low: float
    high: float


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of the middle half of all runs of all tasks together: a quarter (rounded down) is cut at each end.

    >>> interquartile_mean(np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 100.0]]))  # mean of 2, 3, 4, 5
    3.5
    """
    ordered = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def mean(scores: np.ndarray) -> float:
    """Mean over tasks of the means over runs."""
    return float(scores.mean())


def median(scores: np.ndarray) -> float:
    """Median over tasks of the means over runs."""
    return float(np.median(scores.mean(axis=0)))


def optimality_gap(scores: np.ndarray, *, target: float = 1.0) -> float:
    """How far runs stay below `target` on average; what exceeds it earns nothing. Lower is better.

    >>> optimality_gap(np.array([[0.5], [2.0]]))  # (0.5 + 0) / 2
    0.25
    """
    return float(target - np.minimum(scores, target).mean())


def probability_of_improvement(scores: np.ndarray, others: np.ndarray) -> float:
    """P(a run of ours scores above a run of theirs) on a task, averaged over tasks; ties count half (Mann-Whitney U).

    Args:
        scores: [R1, M].
        others: [R2, M], the same tasks.

    >>> probability_of_improvement(np.array([[1.0], [3.0]]), np.array([[1.0], [2.0]]))  # (.5 + 0 + 1 + 1) / 4
    0.625
    """
    _require_tasks(scores, others)
    difference = scores[:, None, :] - others[None, :, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def performance_profile(scores: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Share of all runs of all tasks that score above each threshold [K].

    >>> performance_profile(np.array([[0.2, 0.6], [0.4, 0.8]]), [0.0, 0.5])
    array([1. , 0.5])
    """
    return (scores.reshape(-1, 1) > np.asarray(thresholds, dtype=np.float64)).mean(axis=0)


def stratified_interval(
    aggregate: Callable[..., float], *scores: np.ndarray, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> Estimate:
    """Return an aggregate with its percentile bootstrap interval, resampling the runs of every task by themselves.

    Args:
        aggregate: One of this module's functions of one or two score matrices.
        scores: The matrices, each [runs, tasks]; each is resampled independently.
        confidence: Of the interval, in (0, 1).
        draws: Bootstrap samples.
        seed: Of the samples.

    Raises:
        ConfigError: Scores that are no [runs, tasks] matrices of finite numbers.
    """
    for matrix in scores:
        _require_matrix(matrix)
    generator = np.random.default_rng(seed)
    values = np.empty(draws)
    for draw in range(draws):
        resampled = [
            np.take_along_axis(matrix, generator.integers(len(matrix), size=matrix.shape), axis=0) for matrix in scores
        ]
        values[draw] = aggregate(*resampled)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(float(aggregate(*scores)), float(low), float(high))


def profile_band(
    scores: np.ndarray, thresholds: Sequence[float], *, confidence: float = 0.95, draws: int = DRAWS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the performance profile [K] and its pointwise bootstrap band: (profile, low, high)."""
    _require_matrix(scores)
    generator = np.random.default_rng(seed)
    rows = (generator.integers(len(scores), size=scores.shape) for _ in range(draws))
    drawn = np.stack([performance_profile(np.take_along_axis(scores, row, axis=0), thresholds) for row in rows])
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return performance_profile(scores, thresholds), low, high


def normalised(returns: np.ndarray, *, lowest: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """(returns - lowest) / (highest - lowest) per task: 0 for a random policy, 1 for the reference.

    Args:
        returns: [R, M].
        lowest: [M] what becomes 0.
        highest: [M] what becomes 1.

    Raises:
        ConfigError: A task whose reference equals its lowest return.

    >>> normalised(np.array([[50.0, -5.0]]), lowest=np.array([0.0, -10.0]), highest=np.array([100.0, 0.0]))
    array([[0.5, 0.5]])
    """
    span = np.asarray(highest, dtype=np.float64) - np.asarray(lowest, dtype=np.float64)
    if not span.all():
        raise ConfigError("a task's reference return equals its lowest one", where="normalised", got=span.tolist())
    return (returns - lowest) / span


def format_estimate(estimate: Estimate | tuple[float, float, float], *, digits: int = 2) -> str:
    """`0.82 [0.75, 0.88]`; a dash where there is no number."""
    value, low, high = estimate
    if math.isnan(value):
        return "-"
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _require_matrix(scores: np.ndarray) -> None:
    if scores.ndim != 2 or 0 in scores.shape or not np.isfinite(scores).all():
        raise ConfigError(
            "scores are a matrix of finite numbers, a row per run and a column per task",
            where="statistics",
            got=f"shape {scores.shape}, finite: {bool(np.isfinite(scores).all())}",
        )


def _require_tasks(scores: np.ndarray, others: np.ndarray) -> None:
    if scores.shape[1] != others.shape[1]:
        raise ConfigError(
            "both algorithms must have run on the same tasks",
            where="probability_of_improvement",
            got=f"{scores.shape[1]} and {others.shape[1]} tasks",
        )
