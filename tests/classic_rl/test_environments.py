"""Making environments: what is chosen, and what is refused with which words."""

from __future__ import annotations

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
