"""Rows 37 to 43 and 48 to 51: the policy gradient in all its forms, against autograd over every possible episode."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from classic_rl.off_policy_gradient import OffPolicyGradient, off_policy_coefficients
from classic_rl.reinforce import FORMS, Reinforce, credit, gradient_coefficients, mean_of_others
from classic_rl.tabular.theory import average_reward, performance, softmax
from rlhf.errors import ConfigError

close = torch.testing.assert_close


def coefficients_of(episodes, logits, form, values=None):
    return gradient_coefficients(credit(episodes.rollout(logits, values), form)).double()


def test_the_enumeration_is_complete(episodes, logits):
    assert episodes.probabilities(logits).sum().item() == pytest.approx(1.0)


def test_one_step_policy_gradient_is_the_likelihood_ratio(logits):
    """Rows 37, 38: sum_a dpi(a) r(a) = sum_a pi(a) dlog pi(a) r(a), because dpi = pi dlog pi."""
    rewards = torch.tensor([1.0, 3.0], dtype=torch.float64)
    policy = torch.softmax(logits[0], dim=-1)
    direct = torch.autograd.grad((policy * rewards).sum(), logits)[0]
    ratio = torch.autograd.grad((policy.detach() * torch.log_softmax(logits[0], dim=-1) * rewards).sum(), logits)[0]
    close(direct, ratio)
    # By hand for two actions: pi_0 pi_1 (r_0 - r_1) for the first logit.
    expected = (policy[0] * policy[1] * -2.0).item()
    assert direct[0, 0].item() == pytest.approx(expected)


@pytest.mark.parametrize("form", ["trajectory", "reward_to_go"])
def test_reinforce_is_unbiased(episodes, logits, form):
    """Rows 40, 42: both forms have the gradient of the undiscounted return as their expectation."""
    estimate = episodes.expected_estimate(logits, coefficients_of(episodes, logits, FORMS[form]))
    close(estimate, episodes.true_gradient(logits))


def test_trajectory_credit_is_the_whole_return(episodes, logits):
    """Row 40: (sum dlog pi)(sum r): the same number at every step."""
    coefficients = coefficients_of(episodes, logits, FORMS["trajectory"])
    assert torch.allclose(coefficients, episodes.rewards.sum(dim=1, keepdim=True).expand(-1, 3))


def test_causality_lowers_the_variance_and_not_the_mean(episodes, logits):
    """Row 42, exactly, over all episodes: what was earned before an action only adds noise to its credit."""

    def variance(coefficients):
        gradients = torch.stack(
            [
                torch.autograd.grad((row * coefficient).sum(), logits, retain_graph=True)[0].reshape(-1)
                for row, coefficient in zip(episodes.log_probs(logits), coefficients, strict=True)
            ]
        )
        weights = episodes.probabilities(logits).detach().unsqueeze(1)
        return (weights * (gradients - (weights * gradients).sum(dim=0)).square()).sum().item()

    whole, to_go = (variance(coefficients_of(episodes, logits, FORMS[f])) for f in ("trajectory", "reward_to_go"))
    assert to_go < 0.9 * whole


@pytest.mark.parametrize("baseline", [[5.0, -3.0], [100.0, 100.0]])
def test_a_baseline_contributes_nothing_on_average(episodes, logits, baseline):
    """Row 41: E[dlog pi(a|s) B(s)] = 0 for any B, hence the value baseline leaves the gradient as it is."""
    values = torch.tensor(baseline, dtype=torch.float64)
    close(episodes.expected_estimate(logits, values[episodes.states]), torch.zeros(2, 2, dtype=torch.float64))
    form = Reinforce(credit="reward_to_go", baseline="value")
    estimate = episodes.expected_estimate(logits, coefficients_of(episodes, logits, form, values))
    close(estimate, episodes.true_gradient(logits))


def test_leave_one_out_is_unbiased_for_two_independent_episodes(episodes, logits):
    """Row 41, form `baseline`: over all 64 x 64 pairs of episodes the mean is the gradient, while the mean over the
    batch itself, which contains the own return, would halve it: E[g (R - (R + R')/2)] = E[g (R - R')] / 2."""
    returns = episodes.rewards.sum(dim=1)
    probabilities = episodes.probabilities(logits).detach()
    pairs = torch.cartesian_prod(torch.arange(64), torch.arange(64))
    others = mean_of_others(returns[pairs].T)  # [2, pairs]
    close(others, returns[pairs].T.flip(0))
    advantage = (returns[pairs].T - others)[0].view(64, 64) @ probabilities  # first episode's, averaged over the second
    estimate = episodes.expected_estimate(logits, advantage.unsqueeze(1).expand(-1, 3))
    close(estimate, episodes.true_gradient(logits))
    with pytest.raises(ConfigError, match="needs others"):
        mean_of_others(returns[:1].unsqueeze(1))


def test_gamma_to_the_t_makes_it_the_discounted_gradient(episodes, logits):
    """Row 43, flag 23: with gamma^t unbiased for the discounted return; without it, another vector."""
    form = Reinforce(credit="reward_to_go", discount=0.5, discounted_state_weight=True)
    true = episodes.true_gradient(logits, discount=0.5)
    close(episodes.expected_estimate(logits, coefficients_of(episodes, logits, form)), true, atol=1e-7, rtol=1e-6)
    dropped = Reinforce(credit="reward_to_go", discount=0.5)
    biased = episodes.expected_estimate(logits, coefficients_of(episodes, logits, dropped))
    assert (biased - true).norm() > 0.2 * true.norm()


def test_discounted_coefficients_by_hand(episodes, logits):
    """Row 43: rewards 1, -.5, 2 at gamma .5 have rewards to go 1.25, .5, 2, weighed by 1, .5, .25."""
    rewards = episodes.rewards.clone()
    rewards[0] = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    rollout = replace(episodes.rollout(logits), rewards=rewards)
    form = Reinforce(credit="reward_to_go", discount=0.5, discounted_state_weight=True)
    first = gradient_coefficients(credit(rollout, form))[0]
    assert first.tolist() == pytest.approx([1.25, 0.25, 0.5])


def test_average_reward_gradient(episodes, logits):
    """Row 48: d(E[R] / E[L]) by autograd equals E[sum dlog pi sum (r - rho)] / E[L]; with L = 3 always, dJ / 3."""
    probabilities = episodes.probabilities(logits).detach()
    rho = (probabilities * episodes.rewards.sum(dim=1)).sum() / 3
    rollout = episodes.rollout(logits)
    coefficients = coefficients_of(episodes, logits, FORMS["average_reward"])
    # The form estimates rho from its rows, which count alike here; the difference to the true rho is a baseline.
    used = rollout.rewards.mean()
    steps_left = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    close(coefficients + (used - rho) * steps_left, (rollout.rewards - rho).flip(1).cumsum(1).flip(1))
    close(episodes.expected_estimate(logits, coefficients) / 3, episodes.true_gradient(logits) / 3)


def test_average_reward_of_a_chain(two_states):
    """Row 48: rho = sum d(s) sum pi(a|s) R(s, a), by hand for the uniform policy.

    P = [[.45, .55], [.7, .3]] has d = (.7, .55) / 1.25 = (.56, .44); R = (.25, 1.15), so rho = .14 + .506 = .646.
    """
    assert average_reward(two_states, np.full((2, 2), 0.5)) == pytest.approx(0.646)


def test_start_value_and_average_reward_meet(two_states):
    """Row 48: (1 - gamma) J(start) tends to rho as gamma tends to 1."""
    policy = softmax(np.array([[0.3, -0.4], [-0.2, 0.5]]))
    rho = average_reward(two_states, policy)
    assert 1e-6 * performance(two_states, policy, discount=1 - 1e-6) == pytest.approx(rho, abs=1e-5)


def test_importance_sampling_estimates_under_another_distribution():
    """Row 49: E_q[f p/q] = E_p[f] = .2 x 1 + .8 x 10 = 8.2, and its variance by hand: E_q[(f p/q)^2] - 8.2^2."""
    p, q, f = np.array([0.2, 0.8]), np.array([0.5, 0.5]), np.array([1.0, 10.0])
    weighted = f * p / q
    assert (q * weighted).sum() == pytest.approx(8.2)
    variance = (q * weighted**2).sum() - 8.2**2  # .5 x .16 + .5 x 256 - 67.24 = 60.84
    assert variance == pytest.approx(60.84)
    draws = weighted[(np.random.default_rng(0).random(100_000) < 0.5).astype(int)]
    assert draws.mean() == pytest.approx(8.2, abs=4 * np.sqrt(variance / 1e5))


@pytest.mark.parametrize("ratio", ["trajectory", "causal_rewards"])
def test_off_policy_forms_that_are_unbiased(episodes, logits, behaviour, ratio):
    """Rows 50, 51: from the behaviour policy's episodes, the gradient of the other policy's return."""
    config = OffPolicyGradient(ratio=ratio, baseline="none")
    log_ratio = (episodes.log_probs(logits) - episodes.log_probs(behaviour)).detach()
    coefficients, whole = off_policy_coefficients(episodes.rewards, log_ratio, torch.ones(64, 3).bool(), config)
    close(episodes.expected_estimate(logits, coefficients, under=behaviour), episodes.true_gradient(logits))
    assert (episodes.probabilities(behaviour) * whole).sum().item() == pytest.approx(1.0)


def test_the_causal_form_without_ratios_on_rewards_is_biased(episodes, logits, behaviour):
    """Row 51, flag 16: what it estimates is sum_t E_{s ~ pi} sum_a dpi(a|s) Q_t^behaviour(s, a), computed by backward
    induction here; that is not the policy gradient, but becomes it where both policies are one."""
    transitions = torch.tensor([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=torch.float64)
    played, pi = torch.softmax(behaviour, dim=-1), torch.softmax(logits, dim=-1)
    values, q_by_time = torch.zeros(2, dtype=torch.float64), []
    for _ in range(3):
        q_by_time.insert(0, rewards + transitions @ values)
        values = (played * q_by_time[0]).sum(dim=1)
    states, total = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for q in q_by_time:
        total = total + (states.detach() @ (pi * q).sum(dim=1))
        states = torch.einsum("s,sa,sat->t", states, pi.detach(), transitions)
    expected = torch.autograd.grad(total, logits)[0]
    config = OffPolicyGradient(ratio="causal", baseline="none")
    log_ratio = (episodes.log_probs(logits) - episodes.log_probs(behaviour)).detach()
    mask = torch.ones(64, 3).bool()
    coefficients, _ = off_policy_coefficients(episodes.rewards, log_ratio, mask, config)
    estimate = episodes.expected_estimate(logits, coefficients, under=behaviour)
    close(estimate, expected)
    true = episodes.true_gradient(logits)
    assert (estimate - true).norm() > 0.01 * true.norm()
    on_policy, _ = off_policy_coefficients(episodes.rewards, torch.zeros(64, 3), mask, config)
    close(episodes.expected_estimate(logits, on_policy.double()), true)


def test_off_policy_coefficients_by_hand():
    """Rows 50, 51: ratios 2, 3, .5 and rewards 1, 10, 100; the fourth step is masked.

    trajectory      2 x 3 x .5 = 3, times 111
    causal          2 x 111, 6 x 110, 3 x 100
    causal_rewards  2 (1 + 3 (10 + .5 x 100)), 6 (10 + 50), 3 x 100
    """
    rewards = torch.tensor([[1.0, 10.0, 100.0, 7.0]], dtype=torch.float64)
    log_ratio = torch.tensor([[2.0, 3.0, 0.5, 9.0]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True, False]])
    expected = {
        "trajectory": [333.0, 333.0, 333.0, 0.0],
        "causal": [222.0, 660.0, 300.0, 0.0],
        "causal_rewards": [362.0, 360.0, 300.0, 0.0],
    }
    for ratio, numbers in expected.items():
        config = OffPolicyGradient(ratio=ratio, baseline="none")
        coefficients, whole = off_policy_coefficients(rewards, log_ratio, mask, config)
        assert coefficients[0].tolist() == pytest.approx(numbers), ratio
        assert whole.item() == pytest.approx(3.0)
    capped = OffPolicyGradient(ratio="trajectory", baseline="none", max_weight=2.0)
    assert off_policy_coefficients(rewards, log_ratio, mask, capped)[0][0, 0].item() == pytest.approx(222.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"credit": "average_reward", "discount": 0.9},
        {"credit": "average_reward", "baseline": "leave_one_out"},
        {"credit": "trajectory", "discounted_state_weight": True},
    ],
)
def test_combinations_without_meaning_are_refused(settings):
    with pytest.raises(ValidationError, match=r"average_reward|discounted_state_weight"):
        Reinforce(**settings)
