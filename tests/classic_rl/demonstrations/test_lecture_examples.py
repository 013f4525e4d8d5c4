"""Rows 52 to 54, 57 and 58: small statements of the lectures, by arithmetic, enumeration or a simulator."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from classic_rl.differentiable import first_order_gradients, likelihood_ratio_gradients, pendulum, play
from classic_rl.tabular.dynamic_programming import action_values, evaluate_exactly, expected_return
from classic_rl.tabular.mdp import make_mdp
from classic_rl.tabular.theory import softmax

# --- row 52: differentiable simulators ------------------------------------------------------------------------------


def test_the_differentiable_pendulum_is_gymnasiums():
    environment = gymnasium.make("Pendulum-v1")
    environment.reset(seed=3)
    states = torch.tensor(environment.unwrapped.state)[None]
    generator = np.random.default_rng(0)
    for torque in generator.uniform(-3, 3, size=60):
        _, reward, _, _, _ = environment.step(np.array([torque]))
        states, rewards = pendulum(states, torch.tensor([torque]))
        assert rewards.item() == pytest.approx(reward, abs=1e-9)
        np.testing.assert_allclose(states[0].numpy(), environment.unwrapped.state, atol=1e-9)


def linear(states, actions):
    """x' = .9 x + a, r = -x'^2."""
    following = 0.9 * states + actions[:, None]
    return following, -following[:, 0].square()


def test_both_gradients_have_the_analytic_mean_and_the_first_order_one_less_variance():
    """Row 52: one step from x = 1 with a = theta x + .5 noise: J = -(.9 + theta)^2 - .25, dJ = -2 (.9 + theta).

    At theta = .1 that is -2. First order: -2 (1 + .5 n), variance exactly 1.
    """
    episodes = 4000
    theta = torch.full((episodes, 1), 0.1, requires_grad=True)
    noise = torch.randn(episodes, 1, generator=torch.Generator().manual_seed(0))
    returns, log_probs = play(linear, lambda x: (x * theta).sum(dim=1), torch.ones(episodes, 1), noise=noise, std=0.5)
    first = first_order_gradients(returns, theta)[:, 0]
    zeroth = likelihood_ratio_gradients(returns, log_probs, theta)[:, 0]
    assert first.mean().item() == pytest.approx(-2.0, abs=4 / np.sqrt(episodes))
    assert first.var().item() == pytest.approx(1.0, rel=0.15)
    assert zeroth.mean().item() == pytest.approx(-2.0, abs=4 * zeroth.std().item() / np.sqrt(episodes))
    assert zeroth.var() > 5 * first.var()


def test_the_first_order_gradient_of_the_pendulum_is_the_derivative():
    """Row 52: without noise, against central differences of the return over ten steps."""
    theta = torch.tensor([[-1.0, -0.2]], dtype=torch.float64, requires_grad=True)
    start = torch.tensor([[0.3, 0.1]], dtype=torch.float64)

    def total(parameters):
        noise = torch.zeros(1, 10, dtype=torch.float64)
        return play(pendulum, lambda states: (states * parameters).sum(dim=1), start, noise=noise, std=0.1)[0]

    gradient = first_order_gradients(total(theta), theta)[0]
    for index in range(2):
        change = torch.zeros(1, 2, dtype=torch.float64)
        change[0, index] = 1e-5
        with torch.no_grad():
            slope = (total(theta + change) - total(theta - change)).item() / 2e-5
        assert gradient[index].item() == pytest.approx(slope, rel=1e-3)


# --- row 53: stochastic policies are needed -------------------------------------------------------------------------


def corridor():
    """Silver's aliased grid: states 0..4 in a row; 1 and 3 look alike; below 2 lies the treasure, below 0 and 4 death.

    Actions west, east, down. Moving costs 1, so that a policy that never arrives is worth -infinity.
    """
    outcomes = {}
    for state in range(5):
        west, east = max(state - 1, 0), min(state + 1, 4)
        down = [(1.0, 5, 0.0 if state == 2 else -100.0, True)] if state in (0, 2, 4) else [(1.0, state, -1.0, False)]
        outcomes[state] = {0: [(1.0, west, -1.0, False)], 1: [(1.0, east, -1.0, False)], 2: down}
    outcomes[5] = {action: [(1.0, 5, 0.0, True)] for action in range(3)}
    return make_mdp(outcomes, [0, 0.5, 0, 0.5, 0, 0])


def corridor_policy(probability_east):
    """East in the west end, west in the east end, down above the treasure, and one rule where 1 and 3 look alike."""
    policy = np.zeros((6, 3))
    policy[0, 1] = policy[4, 0] = policy[2, 2] = policy[5, 0] = 1.0
    policy[[1, 3]] = [1 - probability_east, probability_east, 0.0]
    return policy


def test_where_states_look_alike_the_best_policy_is_random():
    """Row 53: in 100 steps a deterministic rule finds the treasure from one side only and walks for ever on the other;
    tossing a coin arrives from both: V(1) = .5 (-1) + .5 (-2 + V(1)) = -3."""
    mdp = corridor()
    assert expected_return(mdp, corridor_policy(0.5)) == pytest.approx(-3.0)
    for rule in (0.0, 1.0):
        assert expected_return(mdp, corridor_policy(rule), horizon=100) == pytest.approx((-1 - 100) / 2)
    grid = np.linspace(0.05, 0.95, 19)
    returns = [expected_return(mdp, corridor_policy(p)) for p in grid]
    assert grid[int(np.argmax(returns))] == pytest.approx(0.5)


def test_rock_paper_scissors_needs_chance():
    """Row 53: the worst case of any deterministic policy is -1, that of the uniform one 0, and no policy has more."""
    payoff = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]])
    assert [(row @ payoff).min() for row in np.eye(3)] == [-1, -1, -1]
    assert (np.full(3, 1 / 3) @ payoff).min() == pytest.approx(0.0)
    mixed = np.random.default_rng(0).dirichlet(np.ones(3), size=500)
    assert (mixed @ payoff).min(axis=1).max() <= 1e-12


# --- row 54: step sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step_size", "outcome"), [(0.0001, "stagnates"), (0.5, "converges"), (1.5, "converges"), (2.1, "diverges")]
)
def test_gradient_ascent_on_a_parabola(step_size, outcome):
    """Row 54: J = -theta^2 / 2 from 1: theta_k = (1 - step)^k; it converges for 0 < step < 2 and diverges beyond."""
    theta = 1.0
    for _ in range(100):
        theta += step_size * -theta
    assert theta == pytest.approx((1 - step_size) ** 100, rel=1e-9)
    measured = "diverges" if abs(theta) > 1 else "stagnates" if abs(theta) > 0.9 else "converges"
    assert measured == outcome


def test_too_large_a_step_of_a_softmax_policy_cannot_be_undone():
    """Row 54: bandit with rewards (1, 0). One step of 50 after a wrong draw leaves pi_0 near e^-50, and with it the
    gradient pi_0 (1 - pi_0): a thousand exact steps of 1 do not bring it back. After a step of 1 they do.
    """

    def after(step):
        logits = np.array([0.0, 0.0]) + step * 0.5 * np.array([-1.0, 1.0])
        for _ in range(1000):
            pi = softmax(logits)
            logits = logits + pi * (np.array([1.0, 0.0]) - pi[0])
        return softmax(logits)[0]

    assert after(50) < 1e-6
    assert after(1) > 0.99


# --- rows 57, 58: advantages and critics ----------------------------------------------------------------------------


def test_worked_example():
    """Row 57: Q = 10.1 and 10.5 with V = 10 give A = .1 and .5. Arithmetic only (flag 8): a V that is the mean of Q
    under a policy lies between the Qs, and its advantages average to 0, which .1 and .5 cannot."""
    assert (np.array([10.1, 10.5]) - 10.0).tolist() == pytest.approx([0.1, 0.5])
    for p in np.linspace(0, 1, 11):
        value = p * 10.1 + (1 - p) * 10.5
        assert 10.1 <= value <= 10.5
        assert p * (10.1 - value) + (1 - p) * (10.5 - value) == pytest.approx(0.0)


@pytest.mark.parametrize("discount", [0.5, 0.9])
def test_which_critic(two_states, discount):
    """Row 58: with exact values every critic gives the same expected gradient: Q, A = Q - V, the TD error
    r + gamma V' - V (with gamma, flag 8), and two-step returns minus V; sum_a dpi(a|s) critic(s, a) is compared."""
    policy = softmax(np.array([[0.3, -0.4], [-0.2, 0.5]]))
    values = evaluate_exactly(two_states, policy, discount=discount)
    q = action_values(two_states, values, discount=discount)
    np.testing.assert_allclose((policy * q).sum(axis=1), values)
    one_step = two_states.rewards + discount * two_states.transitions @ values
    following = (policy * one_step).sum(axis=1)
    critics = {
        "Q": q,
        "A": q - values[:, None],
        "delta": one_step - values[:, None],
        "two steps": two_states.rewards + discount * two_states.transitions @ following - values[:, None],
    }

    def gradient(critic):
        return policy * (critic - (policy * critic).sum(axis=1, keepdims=True))

    for name, critic in critics.items():
        np.testing.assert_allclose(gradient(critic), gradient(q), atol=1e-12, err_msg=name)
    without_gamma = two_states.rewards + two_states.transitions @ values - values[:, None]
    assert np.abs(gradient(without_gamma) - gradient(q)).max() > 1e-3
