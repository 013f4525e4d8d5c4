"""The natural policy gradient of a softmax bandit: what a baseline is really for.

    draw a ~ pi,    theta_a <- theta_a + eta (r_a - b) / pi(a),    pi = softmax(theta)

The estimate `(r_a - b) / pi(a)` in entry a, 0 elsewhere, is unbiased for the natural gradient r - b whatever b is, and
adding a constant to all of theta leaves pi as it is. Without baseline every draw of a positive reward makes its own arm
more probable, by more the rarer it was: the process may commit itself to a bad arm for ever. With the value baseline
b = pi . r, drawing a bad arm makes it less probable, and pi reaches the best arm almost surely, although the variance
`sum_a (r_a - b)^2 / pi(a)` is unbounded with a baseline too.
What the baseline removes is aggressiveness, not variance.
Source: Mei et al. 2022, The Role of Baselines in Policy Gradient Optimization, https://arxiv.org/abs/2301.06276.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from classic_rl.tabular.theory import softmax

Baseline = Literal["none", "value"]


def natural_gradient_estimate(
    probabilities: np.ndarray, rewards: np.ndarray, *, action: int, baseline: Baseline
) -> np.ndarray:
    """[A] the estimate from one draw.

    Args:
        probabilities: [A].
        rewards: [A], deterministic.
        action: What was drawn.
        baseline: b is 0, or pi . r.
    """
    subtracted = float(probabilities @ rewards) if baseline == "value" else 0.0
    estimate = np.zeros_like(probabilities)
    estimate[action] = (rewards[action] - subtracted) / probabilities[action]
    return estimate


def run_bandit(
    rewards: np.ndarray, *, step_size: float, steps: int, runs: int, baseline: Baseline, seed: int = 0
) -> np.ndarray:
    """[runs, A] final probabilities of independent runs from the uniform policy.

    Preferences are kept relative to the largest; a probability below 1e-300 counts as never drawn again.
    """
    generator = np.random.default_rng(seed)
    everyone, theta = np.arange(runs), np.zeros((runs, len(rewards)))
    for _ in range(steps):
        probabilities = softmax(theta)
        uniform = generator.random(runs)[:, None]
        drawn = (probabilities.cumsum(axis=1) < uniform).sum(axis=1).clip(max=len(rewards) - 1)
        subtracted = probabilities @ rewards if baseline == "value" else 0.0
        theta[everyone, drawn] += step_size * (rewards[drawn] - subtracted) / probabilities[everyone, drawn]
        theta -= theta.max(axis=1, keepdims=True)
        theta = theta.clip(min=-690)
    return softmax(theta)
