"""Dynamic programming: optima that were computed independently with other code, identities, and arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from classic_rl.tabular.dynamic_programming import (
    action_values,
    evaluate_exactly,
    evaluate_iteratively,
    expected_return,
    finite_horizon_optimum,
    greedy_policy,
    policy_iteration,
    value_iteration,
)
from classic_rl.tabular.mdp import load_mdp, make_mdp
from rlhf.errors import ConfigError, TrainingError


@pytest.fixture(scope="module")
def lake():
    return load_mdp("FrozenLake-v1")


@pytest.mark.parametrize(
    ("identifier", "discount", "expected"),
    [
        ("FrozenLake-v1", 0.9, 0.068891),
        ("FrozenLake-v1", 0.95, 0.180472),
        ("FrozenLake-v1", 0.99, 0.542026),
        ("FrozenLake8x8-v1", 0.99, 0.41464),
        ("Taxi-v4", 0.99, 6.327464),
        ("Taxi-v4", 1.0, 7.93),
        ("CliffWalking-v1", 1.0, -13.0),
    ],
)
def test_optimal_start_values(identifier, discount, expected):
    mdp = load_mdp(identifier)
    solution = value_iteration(mdp, discount=discount)
    assert mdp.start @ solution.values == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("discount", "expected"), [(0.9, 0.59049), (0.95, 0.773781), (0.99, 0.950990)])
def test_without_slipping_the_goal_is_six_steps_away(discount, expected):
    """The sixth step earns the 1, so V = discount^5."""
    mdp = load_mdp("FrozenLake-v1", kwargs={"is_slippery": False})
    assert mdp.start @ value_iteration(mdp, discount=discount).values == pytest.approx(expected, abs=1e-6)


def test_sweeps_of_value_iteration(lake):
    assert value_iteration(lake, discount=0.99, tolerance=1e-10).iterations == 571
    assert value_iteration(load_mdp("Taxi-v4"), discount=0.99, tolerance=1e-10).iterations == 19


@pytest.mark.parametrize(
    ("identifier", "best", "stationary"),
    [("FrozenLake-v1", 0.74419, 0.7402), ("FrozenLake8x8-v1", 0.91322, 0.863)],
)
def test_returns_within_the_time_limit(identifier, best, stationary):
    """The best policy of a finite horizon looks at the clock and does better than the best that does not."""
    mdp = load_mdp(identifier)
    assert mdp.start @ finite_horizon_optimum(mdp, horizon=mdp.limit)[0] == pytest.approx(best, abs=1e-5)
    policy = value_iteration(mdp, discount=0.99).policy
    assert expected_return(mdp, policy) == pytest.approx(stationary, abs=1e-4)


def test_success_without_a_limit_is_14_of_17(lake):
    policy = policy_iteration(lake, discount=0.99).policy
    assert expected_return(lake, policy, horizon=100_000) == pytest.approx(14 / 17, abs=1e-9)


@pytest.mark.parametrize("identifier", ["FrozenLake-v1", "CliffWalking-v1"])
def test_value_and_policy_iteration_agree(identifier):
    mdp = load_mdp(identifier)
    by_values = value_iteration(mdp, discount=0.95, tolerance=1e-13)
    by_policies = policy_iteration(mdp, discount=0.95)
    np.testing.assert_allclose(by_policies.values, by_values.values, atol=1e-11)
    backed_up = action_values(mdp, by_policies.values, discount=0.95).max(axis=1)
    np.testing.assert_allclose(backed_up, by_policies.values, atol=1e-12)  # Bellman's optimality equation


def test_iterative_and_exact_evaluation_agree(lake):
    policy = np.random.default_rng(0).dirichlet(np.ones(4), size=16)
    iterative = evaluate_iteratively(lake, policy, discount=0.9, tolerance=1e-13).values
    np.testing.assert_allclose(iterative, evaluate_exactly(lake, policy, discount=0.9), atol=1e-12)


def test_each_policy_improvement_improves(lake):
    """Q^pi(s, pi'(s)) >= V^pi(s) for all s implies V^pi'(s) >= V^pi(s) for all s, strictly somewhere before the end."""
    policy = np.full((16, 4), 0.25)
    for _ in range(20):
        values = evaluate_exactly(lake, policy, discount=0.9)
        candidates = action_values(lake, values, discount=0.9)
        improved = greedy_policy(candidates)
        assert ((improved * candidates).sum(axis=1) >= values - 1e-12).all()
        new = evaluate_exactly(lake, improved, discount=0.9)
        assert (new >= values - 1e-12).all()
        if np.allclose(new, values, atol=1e-12):
            break
        assert new.sum() > values.sum() + 1e-9
        policy = improved
    assert lake.start @ new == pytest.approx(0.068891, abs=1e-6)


def two_states():
    """From 0, action 0 stays for 1, action 1 ends for 5."""
    return make_mdp(
        {0: {0: [(1.0, 0, 1.0, False)], 1: [(1.0, 1, 5.0, True)]}, 1: {0: [(1.0, 1, 0, True)], 1: [(1.0, 1, 0, True)]}},
        [1.0, 0.0],
    )


def test_two_states_by_hand():
    """Staying is worth 1 / (1 - gamma): 10 at .9, 2 at .5, against 5 for ending now."""
    stays, ends = value_iteration(two_states(), discount=0.9), value_iteration(two_states(), discount=0.5)
    assert stays.values[0] == pytest.approx(10.0, abs=1e-8)
    assert ends.values[0] == pytest.approx(5.0)
    assert stays.policy[0].tolist() == [1, 0]
    assert ends.policy[0].tolist() == [0, 1]
    values, actions = finite_horizon_optimum(two_states(), horizon=3)
    assert values[0] == 7.0  # 1 + 1 + 5
    assert actions[:, 0].tolist() == [0, 0, 1]


def test_without_discount_an_endless_policy_has_no_value():
    stays = np.array([[1.0, 0.0], [1.0, 0.0]])
    with pytest.raises(TrainingError, match="never ends"):
        evaluate_exactly(two_states(), stays, discount=1.0)
    with pytest.raises(TrainingError, match="has not settled"):
        value_iteration(two_states(), discount=1.0, max_sweeps=50)


def test_processes_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"P\[0\]\[0\].*sum to 1"):
        make_mdp({0: {0: [(0.5, 0, 1.0, False)]}}, [1.0])
    with pytest.raises(ConfigError, match="does not tell its dynamics"):
        load_mdp("CartPole-v1")
    with pytest.raises(ConfigError, match="cannot be made"):
        load_mdp("FrozenLak-v1")
