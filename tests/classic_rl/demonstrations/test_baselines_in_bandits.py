"""Row 44: the natural policy gradient of a bandit with and without baseline (Mei et al. 2022)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from classic_rl.bandits import natural_gradient_estimate, run_bandit

REWARDS = np.array([1.0, 0.8])


@pytest.mark.parametrize("baseline", ["none", "value"])
def test_the_estimate_is_unbiased_up_to_a_constant(baseline):
    """E[(r_a - b) / pi(a) e_a] = r - b: the same for the softmax, which constants leave alone."""
    pi = np.array([0.1, 0.9])
    mean = sum(
        pi[action] * natural_gradient_estimate(pi, REWARDS, action=action, baseline=baseline) for action in (0, 1)
    )
    assert mean[0] - mean[1] == pytest.approx(0.2)


def test_the_variance_is_unbounded_with_a_baseline_too():
    """Row 44: sum_a (r_a - b)^2 / pi(a). With b = pi . r and pi = (p, 1 - p): r_0 - b = .2 (1 - p), r_1 - b = -.2 p,
    so the sum is .04 ((1 - p)^2 / p + p^2 / (1 - p)), which grows as .04 / p."""
    for p in (1e-2, 1e-4, 1e-6):
        pi = np.array([p, 1 - p])
        squares = [
            (natural_gradient_estimate(pi, REWARDS, action=action, baseline="value") ** 2).sum() for action in (0, 1)
        ]
        assert pi @ squares == pytest.approx(0.04 * ((1 - p) ** 2 / p + p**2 / (1 - p)))
        assert pi @ squares > 0.039 / p


def test_a_baseline_takes_the_aggressiveness_away():
    """Row 44: drawing the bad arm makes it more probable without a baseline, and less probable with one."""
    pi = np.array([0.5, 0.5])
    assert natural_gradient_estimate(pi, REWARDS, action=1, baseline="none")[1] == pytest.approx(1.6)
    assert natural_gradient_estimate(pi, REWARDS, action=1, baseline="value")[1] == pytest.approx(-0.2)


def commitment(step_size):
    """Probability of drawing the bad arm for ever: the product of pi_t(bad) along that one path, by its recursion."""
    preference, probability = 0.0, 1.0
    for _ in range(200):
        bad = 1 / (1 + math.exp(-preference))
        probability *= bad
        preference += step_size * REWARDS[1] / bad
    return probability


def test_without_a_baseline_some_runs_commit_themselves_to_the_bad_arm():
    """Row 44: at least the share that draws the bad arm for ever ends there; with the value baseline none does."""
    runs = 400
    lowest = commitment(0.5)
    stuck = (run_bandit(REWARDS, step_size=0.5, steps=1500, runs=runs, baseline="none")[:, 1] > 0.99).mean()
    assert lowest > 0.05
    assert stuck > lowest - 3 * math.sqrt(lowest / runs)
    best = run_bandit(REWARDS, step_size=0.5, steps=1500, runs=runs, baseline="value")[:, 0]
    assert best.min() > 0.99
