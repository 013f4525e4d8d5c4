"""Rows 39, 61 to 64, 68 and 76: identities and bounds, exact on FrozenLake and on two states."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from classic_rl.tabular.mdp import load_mdp
from classic_rl.tabular.theory import (
    advantages,
    discounted_visits,
    expected_gain,
    importance_sampled_surrogate,
    max_kl,
    monotonic_bound,
    performance,
    policy_gradient,
    restricted_step,
    softmax,
    surrogate,
)
from rlhf.core.surrogates import clipped, unclipped

GAMMA = 0.9


@pytest.fixture(scope="module")
def lake():
    return load_mdp("FrozenLake-v1")


def two_policies(seed, *, distance=1.0):
    generator = np.random.default_rng(seed)
    old = generator.normal(size=(16, 4))
    return softmax(old), softmax(old + distance * generator.normal(size=(16, 4)))


@pytest.mark.parametrize("seed", range(5))
def test_performance_difference_lemma(lake, seed):
    """Row 61: J(new) - J(old) = E_{trajectories of new} sum gamma^t A^old, whatever the policies."""
    old, new = two_policies(seed)
    difference = performance(lake, new, discount=GAMMA) - performance(lake, old, discount=GAMMA)
    gain = expected_gain(lake, new, old, discount=GAMMA, visits_of=new)
    assert gain == pytest.approx(difference, abs=1e-12)
    assert abs(difference) > 1e-5
    # Over the old policy's states it is another number.
    assert expected_gain(lake, new, old, discount=GAMMA, visits_of=old) != pytest.approx(difference, rel=1e-3)


def test_discounted_visits_sum_to_the_horizon(two_states):
    """Row 62: without termination sum_s b(s) = 1 / (1 - gamma), the factor that E_tau = E_{s ~ d} lacks (flag 17).

    By hand at gamma .5 for the policy that always takes action 0, from state 0: P = [[.7, .3], [.5, .5]],
    b0 = 1 + .5 (.7 b0 + .5 b1), b1 = .5 (.3 b0 + .5 b1): b1 = .2 b0, b0 = 1 / (1 - .35 - .05) = 5/3.
    """
    policy = np.array([[1.0, 0.0], [1.0, 0.0]])
    visits = discounted_visits(two_states, policy, discount=0.5)
    assert visits.tolist() == pytest.approx([5 / 3, 1 / 3])
    assert visits.sum() == pytest.approx(2.0)
    # J = b . R: 5/3 x 1 + 1/3 x .3
    assert performance(two_states, policy, discount=0.5) == pytest.approx(5 / 3 + 0.1)


def test_cpi_objective_agrees_to_first_order(lake):
    """Row 62: L(old) = J(old), and the slopes along any direction are equal; further away they part."""
    generator = np.random.default_rng(0)
    logits, direction = generator.normal(size=(16, 4)), generator.normal(size=(16, 4))
    old = softmax(logits)
    assert surrogate(lake, old, old, discount=GAMMA) == pytest.approx(performance(lake, old, discount=GAMMA))
    errors = []
    for step in (1e-2, 1e-3):
        new = softmax(logits + step * direction)
        errors.append(abs(surrogate(lake, new, old, discount=GAMMA) - performance(lake, new, discount=GAMMA)))
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)  # second order
    assert errors[0] > 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_importance_sampled_surrogate_is_the_cpi_objective(lake, seed):
    """Row 63: E_{a ~ old}[new/old A] = E_{a ~ new}[A]; only the states stay the old policy's."""
    old, new = two_policies(seed)
    sampled = importance_sampled_surrogate(lake, new, old, discount=GAMMA)
    assert sampled == pytest.approx(surrogate(lake, new, old, discount=GAMMA), abs=1e-12)


def test_policy_gradient_theorem_against_differences(lake):
    """Row 39: b(s) pi(a|s) A(s, a) equals the numerical derivative of J, in every entry."""
    logits = np.random.default_rng(1).normal(size=(16, 4))
    gradient = policy_gradient(lake, logits, discount=GAMMA)
    for state, action in [(0, 0), (4, 2), (10, 1), (14, 2)]:
        change = np.zeros((16, 4))
        change[state, action] = 1e-5
        up, down = (performance(lake, softmax(logits + sign * change), discount=GAMMA) for sign in (1, -1))
        assert gradient[state, action] == pytest.approx((up - down) / 2e-5, rel=1e-4, abs=1e-10)
    np.testing.assert_allclose(gradient.sum(axis=1), 0, atol=1e-15)  # adding to all logits of a state does nothing


@pytest.mark.parametrize("distance", [0.01, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(3))
def test_monotonic_bound(lake, seed, distance):
    """Row 68: J(new) >= L(new) - 4 epsilon gamma / (1 - gamma)^2 max KL(old || new), with the old policy first."""
    old, new = two_policies(seed, distance=distance)
    bound = monotonic_bound(lake, new, old, discount=GAMMA)
    assert bound <= performance(lake, new, discount=GAMMA)
    assert monotonic_bound(lake, old, old, discount=GAMMA) == pytest.approx(performance(lake, old, discount=GAMMA))


def test_the_bound_holds_where_the_surrogate_alone_is_wrong(lake):
    """Row 68: among random policies some have L(new) > J(new): the surrogate promises too much, the bound never."""
    pairs = [two_policies(seed, distance=2.0) for seed in range(20)]
    excess = [surrogate(lake, n, o, discount=GAMMA) - performance(lake, n, discount=GAMMA) for o, n in pairs]
    assert max(excess) > 1e-4


def test_the_penalty_by_hand(two_states):
    """Row 68: C from the definition, with epsilon read off the advantages: 4 x epsilon x .5 / .25 = 8 epsilon."""
    old, new = np.array([[0.5, 0.5], [0.5, 0.5]]), np.array([[0.75, 0.25], [0.5, 0.5]])
    kl = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    assert max_kl(old, new) == pytest.approx(kl)
    epsilon = np.abs(advantages(two_states, old, discount=0.5)).max()
    expected = surrogate(two_states, new, old, discount=0.5) - 8 * epsilon * kl
    assert monotonic_bound(two_states, new, old, discount=0.5) == pytest.approx(expected)


def test_restricted_gradient():
    """Row 64: among all steps with 1/2 |step|^2 <= radius none gains more: sqrt(2 x .02) (3, 4) / 5 = (.12, .16)."""
    gradient = np.array([3.0, 4.0])
    step = restricted_step(gradient, radius=0.02)
    assert step.tolist() == pytest.approx([0.12, 0.16])
    angles = np.linspace(0, 2 * np.pi, 720)
    others = 0.2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert gradient @ step >= (others @ gradient).max()


def test_the_clipped_objective_bounds_the_unclipped_one_from_below():
    """Row 76: L_CLIP <= L_CPI for every ratio and advantage; equal, with equal gradients, at ratio 1."""
    ratio = torch.linspace(0.05, 4.0, 80).repeat(2).requires_grad_()
    advantage = torch.cat([torch.ones(80), -torch.ones(80)])
    low = clipped(ratio, advantage, clip_low=0.2, clip_high=0.2)
    assert (low <= unclipped(ratio, advantage)).all()
    assert (low < unclipped(ratio, advantage) - 0.1).any()
    at_one = torch.ones(2, requires_grad=True)
    credit = torch.tensor([1.5, -0.7])
    gains = [clipped(at_one, credit, clip_low=0.2, clip_high=0.2), unclipped(at_one, credit)]
    torch.testing.assert_close(gains[0], gains[1])
    slopes = [torch.autograd.grad(gain.sum(), at_one)[0] for gain in gains]
    torch.testing.assert_close(slopes[1], credit)
    torch.testing.assert_close(slopes[0], credit)


def test_expectation_of_a_maximum_is_above_the_maximum_of_expectations():
    """Row 23: E max >= max E by enumeration. Two fair coins worth 0 or 1: E max = 3/4 against 1/2."""
    outcomes = [(a, b) for a in (0, 1) for b in (0, 1)]
    assert np.mean([max(pair) for pair in outcomes]) == 0.75
    assert max(np.mean([pair[index] for pair in outcomes]) for index in (0, 1)) == 0.5
