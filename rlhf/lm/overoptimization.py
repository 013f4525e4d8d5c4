"""The functional forms of over-optimization: gold score as a function of d = sqrt(KL).

A proxy that is optimized tells less and less of what it stands for. Gao et al. 2023, "Scaling laws for reward model
overoptimization" (arXiv 2210.10760), found that the gold score follows, with d the square root of the KL divergence
(in nats) of the optimized policy from the one it started as,

    best-of-n:               R(d) = d (alpha - beta d)
    reinforcement learning:  R(d) = d (alpha - beta log d)

where R is the gain over the start, R(0) = 0. Both are linear in alpha and beta: least squares gives them exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import numpy as np

from rlhf.errors import DataError

Form = Literal["best_of_n", "rl"]


@dataclass(frozen=True)
class Fit:
    """One of the two forms, fitted.

    Attributes:
        form: Which.
        alpha: Gain per unit of d at the start (rl: at d = 1).
        beta: How fast it is lost.
        residual: Root of the mean squared residual, in units of the gold score.
        r_squared: Share of the gain's variance over the points that the fit explains; NaN where there is none.
        points: How many were fitted.
    """

    form: Form
    alpha: float
    beta: float
    residual: float
    r_squared: float
    points: int

    def __call__(self, distances: Any) -> np.ndarray:
        """The fitted gain at d >= 0."""
        return _design(np.asarray(distances, dtype=np.float64), self.form) @ np.array([self.alpha, self.beta])

    @property
    def peak(self) -> tuple[float, float] | None:
        """(d, gain) where the fitted gain is largest; None where it does not rise and fall.

        best_of_n: d = alpha / (2 beta), gain alpha^2 / (4 beta). rl: d = exp(alpha / beta - 1), gain beta d.
        """
        if self.beta <= 0 or (self.form == "best_of_n" and self.alpha <= 0):
            return None
        match self.form:
            case "best_of_n":
                return self.alpha / (2 * self.beta), self.alpha**2 / (4 * self.beta)
            case "rl":
                exponent = self.alpha / self.beta - 1
                if exponent > 50:
                    return None  # hardly falls: a peak that far out is none
                return math.exp(exponent), self.beta * math.exp(exponent)
            case _:
                assert_never(self.form)


def fit_gain(distances: Sequence[float], gains: Sequence[float], form: Form) -> Fit:
    """Fit alpha and beta by least squares.

    Args:
        distances: d of each point, at least 0; a point at 0 says nothing, since every curve goes through (0, 0).
        gains: Gold score less that of the start.
        form: Which.

    Raises:
        DataError: Fewer than two different distances above 0, or something that is not finite or negative.

    >>> fit = fit_gain([1, 2, 3], [1.5, 2.0, 1.5], "best_of_n")  # d (2 - d / 2)
    >>> round(fit.alpha, 6), round(fit.beta, 6), tuple(round(number, 6) for number in fit.peak)
    (2.0, 0.5, (2.0, 2.0))
    """
    d, gain = np.asarray(distances, dtype=np.float64), np.asarray(gains, dtype=np.float64)
    if len(d) != len(gain) or not (np.isfinite(d).all() and np.isfinite(gain).all()) or (d < 0).any():
        raise DataError("distances are finite and not negative, with as many finite gains", where="fit_gain")
    kept = d > 0
    if len(np.unique(d[kept])) < 2:
        raise DataError(
            "two parameters need two points at different distances above 0",
            where="fit_gain",
            got=f"{len(np.unique(d[kept]))}",
            remedy="Evaluate more often.",
        )
    design = _design(d[kept], form)
    (alpha, beta), *_ = np.linalg.lstsq(design, gain[kept], rcond=None)
    errors = gain[kept] - design @ np.array([alpha, beta])
    variance = gain[kept].var()
    return Fit(
        form=form,
        alpha=float(alpha),
        beta=float(beta),
        residual=float(np.sqrt((errors**2).mean())),
        r_squared=float(1 - (errors**2).mean() / variance) if variance > 0 else math.nan,
        points=int(kept.sum()),
    )


def _design(d: np.ndarray, form: Form) -> np.ndarray:
    """[..., 2] the columns that alpha and beta multiply."""
    match form:
        case "best_of_n":
            return np.stack([d, -(d**2)], axis=-1)
        case "rl":
            return np.stack([d, -d * np.log(np.where(d > 0, d, 1.0))], axis=-1)  # d log d -> 0 as d -> 0
        case _:
            assert_never(form)


@dataclass(frozen=True)
class Curve:
    """One policy on its way: what held-out answers are worth, by their KL from the start.

    Attributes:
        kl: Nats per answer; the first is that of the start, 0.
        gold: Mean gold score.
        proxy: Mean of what is optimized.
        gold_errors: Standard errors of the gold means, over prompts.
    """

    kl: list[float]
    gold: list[float]
    proxy: list[float]
    gold_errors: list[float]

    @property
    def distances(self) -> list[float]:
        """sqrt(KL); an estimate of a KL near 0 may be negative, and counts as 0."""
        return [math.sqrt(max(kl, 0.0)) for kl in self.kl]

    @property
    def peak(self) -> int:
        """Index of the highest gold score."""
        return int(np.argmax(self.gold))

    @property
    def lost(self) -> float:
        """Share of the gain at the peak that is gone at the end: 0 where it ends at its peak, 1 where it is all gone.

        Above 1 the end is worse than the start; NaN where there never was a gain.
        """
        gain = self.gains[self.peak]
        return (gain - self.gains[-1]) / gain if gain > 0 else math.nan

    @property
    def overoptimized(self) -> bool:
        """Whether more than half of the gain is lost by the end, while the proxy ends above what it was at the peak.

        Half, because the peak is the best of noisy measurements: a run that stays where it is ends a little below it.
        """
        return self.lost > 0.5 and self.proxy[-1] > self.proxy[self.peak]

    def fit(self, form: Form) -> Fit:
        """The gain over the start, fitted."""
        return fit_gain(self.distances, self.gains, form)

    @property
    def gains(self) -> list[float]:
        """Gold score less that of the start."""
        return [gold - self.gold[0] for gold in self.gold]
