"""Domain randomization: what is drawn, what it does to the world, and that equal seeds give equal worlds."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from pydantic import ValidationError

from classic_rl.environments import EnvironmentConfig, make_environments
from classic_rl.randomization import DomainRandomization, RandomizationConfig, Range
from classic_rl.snapshots import restore, snapshot
from rlhf.errors import ConfigError


def randomized(identifier: str, **settings) -> DomainRandomization:
    return DomainRandomization(gymnasium.make(identifier), RandomizationConfig(**settings))


def fixed(value: float) -> dict[str, float]:
    return {"low": value, "high": value}


def test_ranges_draw_evenly_in_the_number_or_in_its_logarithm():
    generator = np.random.default_rng(0)
    uniform = [Range(low=1, high=4).draw(generator) for _ in range(4000)]
    logarithmic = [Range(low=0.5, high=2, scale="log").draw(generator) for _ in range(4000)]
    assert 1 <= min(uniform) < 1.02
    assert 3.98 < max(uniform) <= 4
    assert np.mean(uniform) == pytest.approx(2.5, abs=0.05)  # standard error 3 / sqrt(12 * 4000) = .014
    assert np.mean(np.array(logarithmic) < 1) == pytest.approx(0.5, abs=0.03)  # as often half as twice


def test_cart_pole_moves_as_its_drawn_parameters_say():
    env = randomized("CartPole-v1", physics={"length": fixed(1.0), "masspole": fixed(0.3), "force_mag": fixed(5.0)})
    _, told = env.reset(seed=3)
    assert told["randomization"]["length"] == 1.0
    env.unwrapped.state = np.array([0.0, 0.5, 0.1, -0.2])
    observation, *_ = env.step(1)
    # Barto, Sutton and Anderson 1983, by hand, with total mass 1.3 and pole mass times half length 0.3.
    theta, theta_dot = 0.1, -0.2
    temp = (5.0 + 0.3 * theta_dot**2 * np.sin(theta)) / 1.3
    theta_acc = (9.8 * np.sin(theta) - np.cos(theta) * temp) / (1.0 * (4 / 3 - 0.3 * np.cos(theta) ** 2 / 1.3))
    x_acc = temp - 0.3 * theta_acc * np.cos(theta) / 1.3
    expected = [0.02 * 0.5, 0.5 + 0.02 * x_acc, 0.1 - 0.02 * 0.2, -0.2 + 0.02 * theta_acc]
    np.testing.assert_allclose(observation, expected, rtol=1e-5)


def test_without_ranges_nothing_changes():
    plain, wrapped = gymnasium.make("Pendulum-v1"), randomized("Pendulum-v1")
    first, _ = plain.reset(seed=5)
    second, _ = wrapped.reset(seed=5)
    np.testing.assert_array_equal(first, second)
    for action in ([0.5], [-1.5]):
        a, b = plain.step(np.float32(action)), wrapped.step(np.float32(action))
        np.testing.assert_array_equal(a[0], b[0])
        assert a[1] == b[1]


def test_equal_seeds_give_equal_worlds_and_episodes_differ():
    env = randomized("Pendulum-v1", physics={"m": {"low": 0.5, "high": 2.0}})
    first = env.reset(seed=7)[1]["randomization"]["m"]
    later = env.reset()[1]["randomization"]["m"]
    assert env.reset(seed=7)[1]["randomization"]["m"] == first
    assert first != later
    assert env.unwrapped.m == first


def test_a_delayed_action_takes_effect_later():
    env = randomized("Pendulum-v1", action_delay=(2, 2))
    plain = gymnasium.make("Pendulum-v1")
    env.reset(seed=1)
    plain.reset(seed=1)
    chosen = [[2.0], [-1.0], [0.5], [1.0]]
    effective = [[0.0], [0.0], [2.0], [-1.0]]  # the middle of [-2, 2] until the first arrives
    for late, now in zip(chosen, effective, strict=True):
        np.testing.assert_array_equal(env.step(np.float32(late))[0], plain.step(np.float32(now))[0])


def test_noise_has_the_drawn_deviation_and_keeps_actions_in_range():
    env = randomized("Pendulum-v1", observation_noise=fixed(0.3), action_noise=fixed(0.25))
    env.reset(seed=0)
    true = np.array([np.cos(1.0), np.sin(1.0), 0.0])
    seen = np.stack([env._sensed(true) for _ in range(4000)])
    assert (seen - true).std() == pytest.approx(0.3, rel=0.03)
    actions = np.stack([env._disturbed(np.float32([0.0])) for _ in range(4000)])
    assert actions.std() == pytest.approx(0.25 * 2.0, rel=0.05)  # a share of half the range, 2
    assert np.abs(np.stack([env._disturbed(np.float32([2.0])) for _ in range(200)])).max() <= 2.0


def test_a_discrete_action_is_replaced_as_often_as_asked():
    env = randomized("CartPole-v1", action_noise=fixed(0.4))
    env.reset(seed=0)
    changed = np.mean([env._disturbed(0) != 0 for _ in range(4000)])
    assert changed == pytest.approx(0.4 / 2, abs=0.02)  # half of the random actions equal the chosen one


def test_arrays_of_a_mujoco_model_are_multiplied():
    pytest.importorskip("mujoco")
    nominal = gymnasium.make("InvertedPendulum-v5").unwrapped.model.body_mass.copy()
    env = randomized("InvertedPendulum-v5", physics={"model.body_mass": fixed(1.5), "model.opt.gravity": fixed(2.0)})
    for _ in range(2):  # the second reset starts from the nominal values again
        env.reset(seed=0)
        np.testing.assert_allclose(env.unwrapped.model.body_mass, 1.5 * nominal)
        np.testing.assert_allclose(env.unwrapped.model.opt.gravity, [0, 0, -2 * 9.81])


def test_vector_environments_draw_a_world_each_and_resume_in_it():
    config = EnvironmentConfig(
        id="CartPole-v1", num_envs=3, randomization=RandomizationConfig(physics={"length": Range(low=0.3, high=1.0)})
    )
    environments = make_environments(config)
    environments.reset(seed=[1, 2, 3])
    lengths = [env.unwrapped.length for env in environments.unwrapped.envs]
    assert len(set(lengths)) == 3
    for _ in range(5):
        environments.step(np.zeros(3, dtype=int))
    described = snapshot(environments)
    assert described is not None
    expected = [environments.step(np.zeros(3, dtype=int))[0] for _ in range(30)]  # across resets
    other = make_environments(config)
    other.reset(seed=[7, 8, 9])
    restore(other, described)
    for observation in expected:
        np.testing.assert_array_equal(other.step(np.zeros(3, dtype=int))[0], observation)


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match=r"no such number; got 'lenght'; expected .*length"):
        randomized("CartPole-v1", physics={"lenght": fixed(1.0)})
    with pytest.raises(ConfigError, match="expected Box"):
        randomized("FrozenLake-v1", observation_noise=fixed(0.1))
    with pytest.raises(ValidationError, match="swap them"):
        Range(low=2, high=1)
    with pytest.raises(ValidationError, match="fewest first"):
        RandomizationConfig(action_delay=(3, 1))
    with pytest.raises(ValidationError, match="cannot be randomized"):
        EnvironmentConfig(
            id="CartPole-v1", vectorization="vector_entry_point", randomization=RandomizationConfig(action_delay=(1, 1))
        )
