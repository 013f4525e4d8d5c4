"""Why a maximum over noisy estimates is too large, and what a second estimate does about it.

E max_a Q_hat(a) >= max_a E Q_hat(a) (Jensen). Source of the two figures: van Hasselt, Guez and Silver 2016, Deep
Reinforcement Learning with Double Q-learning, https://arxiv.org/abs/1509.06461.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

NUM_ACTIONS = 10
SAMPLED_STATES = np.arange(-6, 7)
STATES = np.linspace(-6, 6, 1001)
"""Where errors are averaged."""

CASES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "sin(s), degree 6": (np.sin, 6),
    "2 exp(-s^2), degree 6": (lambda s: 2 * np.exp(-(s**2)), 6),
    "2 exp(-s^2), degree 9": (lambda s: 2 * np.exp(-(s**2)), 9),
}
"""Rows of figure 2: the true value function, equal for all actions, and the polynomial's degree."""
PRINTED = {
    "sin(s), degree 6": (0.61, -0.02),
    "2 exp(-s^2), degree 6": (0.47, 0.02),
    "2 exp(-s^2), degree 9": (3.35, -0.02),
}
"""What the paper prints in figure 2's right column: the mean error of max, and of the double estimate."""


def expected_maximum(count: int) -> float:
    """Return E max of `count` independent standard normals: integral of x n phi(x) Phi(x)^(n-1).

    The single estimator's overestimation when all true values are equal and errors are N(0, 1). The paper's figure 1
    says so too, but its bars are half as high, at 1/2 E max; a double estimate with independent errors has none.

    >>> round(expected_maximum(2), 6)  # 1 / sqrt pi
    0.56419
    """
    x = np.linspace(-12, 12, 200_001)
    density = np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi)
    return float(np.trapezoid(x * count * density * _normal_cdf(x, density) ** (count - 1), x))


def _normal_cdf(x: np.ndarray, density: np.ndarray) -> np.ndarray:
    """The running integral of the density by the trapezoid rule."""
    steps = 0.5 * (density[1:] + density[:-1]) * np.diff(x)
    return np.concatenate([[0.0], np.cumsum(steps)])


def expected_maximum_of_uniforms(count: int) -> float:
    """Return E max of `count` independent U[-1, 1]: (n - 1) / (n + 1), the paper's theorem 1 setting."""
    return (count - 1) / (count + 1)


def simulate_maxima(count: int, *, draws: int = 100, seed: int = 0) -> tuple[float, float]:
    """Estimate the bias of max and of the double estimate over `draws` repetitions, as figure 1's bars do.

    All true values are 0; Q = e and Q' = e' with independent N(0, 1) errors.

    Returns:
        Mean max_a Q(a), and mean Q'(argmax_a Q(a)).
    """
    first, second = np.random.default_rng((seed, count)).normal(size=(2, draws, count))
    return float(first.max(axis=1).mean()), float(second[np.arange(draws), first.argmax(axis=1)].mean())


class FitErrors(NamedTuple):
    """Figure 2 for one true function; arrays over `STATES`."""

    truth: np.ndarray
    """V*(s)."""
    estimates: np.ndarray
    """[10, S], each action's polynomial."""
    single: np.ndarray
    """max_a Q(s, a) - V*(s)."""
    double: np.ndarray
    """Q'(s, argmax_a Q(s, a)) - V*(s)."""


def fit_errors(truth: Callable[[np.ndarray], np.ndarray], degree: int) -> FitErrors:
    """Fit each action's value with a polynomial to its samples, without noise, and compare the two estimates.

    Action i lacks the samples at two adjacent integer states, -5 and -4 for the first, one further for each next one.
    So errors come from generalization alone. The double estimate of action i is the fit of action i +- 5, whose samples
    differ.

    Args:
        truth: V*(s), every action's true value.
        degree: Of the polynomials.
    """
    estimates = np.empty((NUM_ACTIONS, len(STATES)))
    for action in range(NUM_ACTIONS):
        kept = SAMPLED_STATES[~np.isin(SAMPLED_STATES, (action - 5, action - 4))]
        estimates[action] = np.polynomial.Polynomial.fit(kept, truth(kept), degree)(STATES)
    best = estimates.argmax(axis=0)
    other = (best + NUM_ACTIONS // 2) % NUM_ACTIONS
    columns = np.arange(len(STATES))
    return FitErrors(
        truth(STATES), estimates, estimates[best, columns] - truth(STATES), estimates[other, columns] - truth(STATES)
    )
