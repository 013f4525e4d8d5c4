"""The temporal-difference family against published vectors, exact values, and gymnasium's own steps."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from classic_rl.tabular.control import (
    ControlLearner,
    DynaQ,
    ExpectedSarsa,
    ModelBased,
    MonteCarlo,
    QLearning,
    Sarsa,
)
from classic_rl.tabular.dynamic_programming import evaluate_exactly, expected_return, value_iteration
from classic_rl.tabular.exploration import LinearSchedule, choose, constant, epsilon_greedy
from classic_rl.tabular.linear import FourierBasis, LinearLearner, LinearQLearning, OneHot, make_features
from classic_rl.tabular.mdp import load_mdp, make_mdp
from classic_rl.tabular.planning import EmpiricalModel
from classic_rl.tabular.simulation import Simulator
from classic_rl.tabular.temporal_difference import (
    expected_sarsa_error,
    monte_carlo_evaluation,
    q_learning_error,
    sarsa_error,
    td_error,
    td_evaluation,
)
from rlhf.errors import ConfigError


def line(start, end, over=1.0):
    return LinearSchedule(start=start, end=end, over=over)


# --- update rules: inputs of rlax's value_learning_test.py, errors worked out by hand -------------------------------


def test_td_error():
    discount = np.array([0.0, 0.5, 1.0] * 3)
    following = np.repeat([0.0, 1.0, 2.0], 3)
    expected = [-2.0, -2.0, -2.0, -2.0, -1.5, -1.0, -2.0, -1.0, 0.0]
    np.testing.assert_allclose(td_error(np.ones(9), -np.ones(9), discount, following), expected)


def test_sarsa_error():
    """1 - 1 where it ended; 1 + 3 - 1 otherwise."""
    np.testing.assert_allclose(sarsa_error(np.ones(2), np.ones(2), np.array([0, 1]), np.array([1, 3])), [0, 3])


def test_expected_sarsa_error():
    """4 + (.3 + .5 + .6) - 1, and 1 + (.9 + .8 + .3) - 1."""
    next_values = [[1.5, 1.0, 2.0], [3.0, 2.0, 1.0]]
    probabilities = [[0.2, 0.5, 0.3], [0.3, 0.4, 0.3]]
    errors = expected_sarsa_error(
        np.ones(2), np.array([4, 1]), np.ones(2), next_values=next_values, probabilities=probabilities
    )
    np.testing.assert_allclose(errors, [4.4, 2.0])


def test_q_learning_error():
    """1 - 1 where it ended; 1 + max(1, 2, 0) - 2 otherwise."""
    errors = q_learning_error(np.array([1, 2]), np.ones(2), np.array([0, 1]), next_values=[[0, 1, 0], [1, 2, 0]])
    np.testing.assert_allclose(errors, [0, 1])


# --- exploration ----------------------------------------------------------------------------------------------------


def test_epsilon_greedy_shares_among_equals():
    np.testing.assert_allclose(epsilon_greedy(np.array([2.0, 2.0, 0.0]), exploration=0.3), [0.45, 0.45, 0.1])


def test_choice_follows_epsilon_greedy():
    """Both branches, on a grid of uniform numbers: frequencies are the probabilities to the grid's resolution."""
    values = [2.0, 2.0, 0.0, 1.0]
    grid = (np.arange(200) + 0.5) / 200
    counts = np.zeros(4)
    for explore in grid:
        for u in grid[::5]:
            counts[choose(values, 0.3, explore, u)] += 1
    np.testing.assert_allclose(counts / counts.sum(), epsilon_greedy(np.array(values), exploration=0.3), atol=1e-12)


def test_schedule():
    falling = line(1.0, 0.2, over=0.5)
    assert [falling(progress) for progress in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1.0, 0.6, 0.2, 0.2])


# --- simulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("identifier", ["Taxi-v4", "CliffWalking-v1"])
def test_a_deterministic_environment_goes_as_gymnasiums(identifier):
    environment = gymnasium.make(identifier)
    simulator, generator = Simulator(load_mdp(identifier)), np.random.default_rng(0)
    state, _ = environment.reset(seed=0)
    for _ in range(150):
        action = int(generator.integers(environment.action_space.n))
        following, reward, terminated, _, _ = environment.step(action)
        assert simulator.step(int(state), action, generator.random()) == (following, reward, terminated)
        state = following
        if terminated:
            break


def test_a_random_environment_has_gymnasiums_frequencies():
    """Three outcomes of 1/3 each, from a grid of uniform numbers."""
    mdp = load_mdp("FrozenLake-v1")
    simulator = Simulator(mdp)
    states = [simulator.step(6, 1, u)[0] for u in (np.arange(300) + 0.5) / 300]
    assert {state: states.count(state) for state in set(states)} == {5: 100, 10: 100, 7: 100}
    assert simulator.step(6, 1, 1 - 1e-16)[0] == simulator.step(6, 1, 0.999)[0]


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_monte_carlo_and_td_estimate_the_exact_values():
    """The random walk of Sutton and Barto, example 6.2: from the middle of five states, right end 1, V(i) = i / 6."""
    walk = {
        state: {0: [(0.5, state - 1, 0.0, False), (0.5, state + 1, float(state == 5), False)]} for state in range(1, 6)
    }
    for state in (1, 5):
        walk[state][0] = [(p, following, r, following in (0, 6)) for p, following, r, _ in walk[state][0]]
    walk[0] = walk[6] = {0: [(1.0, 0, 0.0, True)]}
    start = [0, 0, 0, 1, 0, 0, 0]
    mdp, policy = make_mdp(walk, start), np.ones((7, 1))
    expected = np.arange(1, 6) / 6
    np.testing.assert_allclose(evaluate_exactly(mdp, policy, discount=1.0)[1:6], expected, atol=1e-12)
    for first_visit in (True, False):
        estimate = monte_carlo_evaluation(mdp, policy, discount=1.0, episodes=4000, first_visit=first_visit)
        np.testing.assert_allclose(estimate[1:6], expected, atol=0.04)
    estimate = td_evaluation(mdp, policy, discount=1.0, step_size=0.05, episodes=4000)
    np.testing.assert_allclose(estimate[1:6], expected, atol=0.04)


# --- control --------------------------------------------------------------------------------------------------------

CLIFF = "CliffWalking-v1"


def learned(config, total_steps, *, identifier=CLIFF, seed=0, max_steps=1000):
    learner = ControlLearner(load_mdp(identifier, max_steps=max_steps), config, total_steps=total_steps, seed=seed)
    metrics = learner.learn(total_steps)
    return learner, metrics


def test_q_learning_walks_the_edge_and_sarsa_the_safe_path():
    """Sutton and Barto, example 6.6: -13 and -17 when greedy; while exploring, SARSA does better."""
    edge, exploring_edge = learned(QLearning(discount=1.0), 30_000)
    safe, exploring_safe = learned(Sarsa(discount=1.0, step_size=line(0.3, 0.02)), 100_000)
    assert expected_return(edge.mdp, edge.policy) == -13
    assert expected_return(safe.mdp, safe.policy) == -17
    assert exploring_safe["rollout/return_mean"] > exploring_edge["rollout/return_mean"] + 10


def chain():
    """0 -> 1 -> end, rewards 1 and 2; the other action ends at once with 0."""
    ends = [(1.0, 2, 0.0, True)]
    return make_mdp(
        {
            0: {0: [(1.0, 1, 1.0, False)], 1: ends},
            1: {0: [(1.0, 2, 2.0, True)], 1: ends},
            2: {0: ends, 1: ends},
        },
        [1.0, 0.0, 0.0],
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # Greedy next values: 1 + .5 x 2.
        (QLearning, 2.0),
        (DynaQ, 2.0),
        (ModelBased, 2.0),
        # Half of the time any of two actions: the next state is worth .75 x 2 + .25 x 0, so 1 + .5 x 1.5.
        (ExpectedSarsa, 1.75),
        (Sarsa, 1.75),
        (MonteCarlo, 1.75),
    ],
)
def test_what_each_method_converges_to(config, expected):
    settings = {} if config is not ModelBased else {"plan_every": 100}
    algorithm = config(discount=0.5, step_size=line(0.5, 0.0), exploration=constant(0.5), **settings)
    learner = ControlLearner(chain(), algorithm, total_steps=6000, seed=1)
    learner.learn(6000)
    assert learner.q[1] == pytest.approx([2.0, 0.0], abs=1e-4)
    assert learner.q[0][0] == pytest.approx(expected, abs=0.03)


def test_a_truncated_episode_keeps_its_bootstrap():
    """Reward 1 for ever, cut after 3 steps: Q = 1 / (1 - .5) = 2, not the return of three steps, 1.75."""
    mdp = make_mdp({0: {0: [(1.0, 0, 1.0, False)]}}, [1.0], limit=3)
    for config in (QLearning, Sarsa, ExpectedSarsa):
        learner = ControlLearner(mdp, config(discount=0.5), total_steps=100)
        metrics = learner.learn(100)
        assert learner.q[0][0] == pytest.approx(2.0, abs=1e-6)
        assert metrics["rollout/return_mean"] == 3.0


@pytest.mark.parametrize("config", [Sarsa, MonteCarlo, DynaQ, ModelBased])
def test_a_resumed_learner_equals_an_uninterrupted_one(config):
    mdp, algorithm = load_mdp("FrozenLake-v1"), config(exploration=constant(0.8))
    straight = ControlLearner(mdp, algorithm, total_steps=4000, seed=3)
    other = ControlLearner(mdp, algorithm, total_steps=4000, seed=3)
    for _ in range(2):
        straight.learn(1333)
    other.load_state_dict(straight.state_dict())
    straight.learn(1333)
    other.learn(1333)
    assert np.array_equal(straight.action_values, other.action_values)
    assert straight.action_values.any()
    assert straight.state_dict() | {"q": 0} == other.state_dict() | {"q": 0}


def test_the_learned_model_becomes_the_process():
    """Every state and action 3000 times: frequencies within .05 of the probabilities, and the optimum with them."""
    mdp = load_mdp("FrozenLake-v1")
    model, simulator, generator = EmpiricalModel(16, 4), Simulator(mdp), np.random.default_rng(0)
    for state in range(16):
        for action in range(4):
            for uniform in generator.random(3000):
                following, reward, terminated = simulator.step(state, action, uniform)
                model.add(state, action, reward, following, terminated)
    np.testing.assert_allclose(model.mdp().transitions, mdp.transitions, atol=0.05)
    best = value_iteration(mdp, discount=0.99).values
    np.testing.assert_allclose(model.solve(discount=0.99).max(axis=1), best, atol=0.05)


# --- linear function approximation ----------------------------------------------------------------------------------


class Chain(gymnasium.Env):
    """`chain()` with gymnasium's face."""

    observation_space, action_space = spaces.Discrete(3), spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        self.simulator, self.state = Simulator(chain()), 0
        return 0, {}

    def step(self, action):
        self.state, reward, terminated = self.simulator.step(self.state, action, 0.5)
        return self.state, reward, terminated, False, {}


def test_linear_q_learning_with_a_feature_per_state_is_tabular():
    config = LinearQLearning(features=OneHot(), discount=0.5, step_size=constant(0.2), exploration=constant(0.5))
    learner = LinearLearner(Chain(), config, total_steps=3000)
    learner.learn(3000)
    np.testing.assert_allclose(learner.weights[:, :2], [[2.0, 2.0], [0.0, 0.0]], atol=1e-6)


def test_the_fourier_basis():
    """Order 1 at x = (0, .5) of the unit square: frequencies 00, 01, 10, 11 give 1, cos(pi/2) = 0, 1, 0."""
    space = spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, 2.0]), dtype=np.float64)
    features, scales = make_features(space, FourierBasis(order=1))
    np.testing.assert_allclose(features(np.array([-1.0, 1.0])), [1, 0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(scales, [1, 1, 1, 1 / np.sqrt(2)])
    with pytest.raises(ConfigError, match="finite bounds"):
        make_features(spaces.Box(-np.inf, np.inf, (2,)), FourierBasis())
    with pytest.raises(ConfigError, match="do not suit"):
        make_features(space, OneHot())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize(
    ("identifier", "config", "steps", "low", "high"),
    [
        ("FrozenLake-v1", QLearning(step_size=line(0.1, 0.005), exploration=line(1, 0.1, 0.8)), 300_000, 0.739, 0.7441),
        ("FrozenLake-v1", Sarsa(step_size=line(0.1, 0.005), exploration=line(1, 0.02, 0.8)), 300_000, 0.729, 0.7441),
        ("Taxi-v4", QLearning(exploration=line(1, 0.02, 0.6)), 200_000, 7.87, 7.93),
        ("Taxi-v4", Sarsa(step_size=line(0.5, 0.1), exploration=line(1, 0.02, 0.6)), 200_000, 7.6, 7.93),
    ],
)
def test_learning_reaches_the_reference(identifier, config, steps, low, high, seed):
    """Exact value of the greedy policy; nothing can be better than the finite horizon's optimum."""
    learner, _ = learned(config, steps, identifier=identifier, seed=seed, max_steps=None)
    assert low <= expected_return(learner.mdp, learner.policy) <= high + 1e-9
