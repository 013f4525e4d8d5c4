"""Making environments: what is chosen, and what is refused with which words."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from classic_rl.environments import (
    EnvironmentConfig,
    episode_limit,
    make_environments,
    reset_with_seeds,
    share_of_environments,
)
from classic_rl.sync_environments import PlainSyncVectorEnv
from rlhf.config import validate
from rlhf.errors import ConfigError


def test_cartpole_takes_its_own_vector_form_others_the_sync_one():
    cart_poles = make_environments(EnvironmentConfig(id="CartPole-v1", num_envs=3))
    assert isinstance(cart_poles.unwrapped, CartPoleVectorEnv)
    assert isinstance(make_environments(EnvironmentConfig(id="Acrobot-v1", num_envs=2)).unwrapped, SyncVectorEnv)
    forced = make_environments(EnvironmentConfig(id="CartPole-v1", num_envs=2, vectorization="sync"))
    assert isinstance(forced.unwrapped, SyncVectorEnv)
    assert cart_poles.render_mode is None
    assert cart_poles.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP


@pytest.mark.parametrize("vectorization", ["auto", "sync"])
def test_both_forms_of_cartpole_move_alike(vectorization):
    environments = make_environments(EnvironmentConfig(id="CartPole-v1", num_envs=2, vectorization=vectorization))
    assert episode_limit(environments) == 500
    observations = reset_with_seeds(environments, [5, 5])
    assert observations.shape == (2, 4)
    assert observations.dtype == np.float32
    assert (observations[0] == observations[1]).all()
    assert np.abs(observations).max() <= 0.05  # CartPole's documented range of start states
    # x' = x + 0.02 x_dot, theta' = theta + 0.02 theta_dot (Euler, tau = 0.02).
    after = environments.step(np.array([1, 1]))[0]
    np.testing.assert_allclose(after[0, [0, 2]], observations[0, [0, 2]] + 0.02 * observations[0, [1, 3]], atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": "CartPol-v1"}, "CartPol.*Did you mean CartPole-v1"),
        ({"id": "CartPole-v7"}, "environment.id.*CartPole-v7"),
        ({"id": "Taxi-v3"}, "environment.id.*Taxi-v3"),
        ({"id": "no_such_module:CartPole-v1"}, "no_such_module"),
        ({"id": "CartPole-v1", "kwargs": {"gravitation": 3}}, "cannot be made.*gravitation"),
        ({"id": "Images-v0"}, "no vector form.*Images need a convolutional network"),
        ({"id": "TextActions-v0"}, "no action distribution"),
        ({"id": "IntegerBoxActions-v0"}, "no action distribution"),
        ({"id": "Pendulum-v1", "vectorization": "vector_entry_point"}, "cannot be made.*vector entry point"),
    ],
)
def test_what_cannot_be_made_is_told_in_one_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_environments(EnvironmentConfig(**settings))


def test_a_render_mode_is_refused():
    with pytest.raises(ConfigError, match="kwargs: render_mode slows"):
        validate(EnvironmentConfig, {"id": "CartPole-v1", "kwargs": {"render_mode": "rgb_array"}})


def test_shares_are_even_and_complete():
    assert [share_of_environments(6, num_processes=3, process=index) for index in range(3)] == [
        slice(0, 2),
        slice(2, 4),
        slice(4, 6),
    ]
    with pytest.raises(ConfigError, match="multiple of 4 processes"):
        share_of_environments(6, num_processes=4, process=0)


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "LunarLander-v3", "HalfCheetah-v5"])
def test_the_plain_loop_steps_as_gymnasium_s_own(name):
    package = {"LunarLander-v3": "Box2D", "HalfCheetah-v5": "mujoco"}.get(name)
    if package is not None:
        pytest.importorskip(package)
    limit = {"max_episode_steps": 30}  # some episodes are cut, others end before
    plain = make_environments(EnvironmentConfig(id=name, num_envs=3, vectorization="sync", kwargs=limit))
    assert type(plain) is PlainSyncVectorEnv
    theirs = gymnasium.make_vec(name, num_envs=3, vectorization_mode="sync", **limit)
    assert episode_limit(plain) == episode_limit(theirs)
    np.testing.assert_array_equal(plain.reset(seed=[1, 2, 3])[0], theirs.reset(seed=[1, 2, 3])[0])
    theirs.action_space.seed(0)
    ends, previous = 0, None
    for _ in range(70):
        actions = theirs.action_space.sample()
        own, expected = plain.step(actions), theirs.step(actions)
        for mine, other in zip(own[:4], expected[:4], strict=True):
            np.testing.assert_array_equal(mine, other)
            assert mine.dtype == other.dtype
        assert own[4].keys() == expected[4].keys()
        for key, values in expected[4].items():
            np.testing.assert_array_equal(own[4][key], values)
        if previous is not None:
            np.testing.assert_array_equal(previous[0], previous[1])  # a later step leaves earlier results alone
        previous = own[0], own[0].copy()
        ends += int((own[2] | own[3]).sum())
    assert ends >= 4


def test_other_spaces_keep_gymnasium_s_loop():
    kept = make_environments(EnvironmentConfig(id="FrozenLake-v1", num_envs=2, vectorization="sync"))
    assert type(kept) is SyncVectorEnv
