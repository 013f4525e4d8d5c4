"""Flattening against gymnasium's own, one observation at a time; spaces through JSON and back."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from classic_rl.spaces import flatten_observations, observation_size, space_from_json, space_to_json
from rlhf.errors import ConfigError

SPACES = [
    spaces.Box(-1, 1, (3,), np.float32),
    spaces.Box(-np.inf, np.inf, (2, 2), np.float64),
    spaces.Discrete(4),
    spaces.Discrete(3, start=-1),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(4),
    spaces.Tuple([spaces.Discrete(3), spaces.Box(0, 1, (2,))]),
    spaces.Dict({"place": spaces.Discrete(2), "speed": spaces.Box(-1, 1, (1,))}),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_flattening_equals_gymnasiums(space):
    space.seed(0)
    batched = gymnasium.vector.utils.batch_space(space, 5)
    observations = [space.sample() for _ in range(5)]
    batch = gymnasium.vector.utils.concatenate(space, observations, gymnasium.vector.utils.create_empty_array(space, 5))
    flat = flatten_observations(space, batch)
    assert batched.contains(batch) or isinstance(space, spaces.Tuple)
    assert flat.shape == (5, observation_size(space))
    assert flat.dtype == np.float32
    for row, observation in zip(flat, observations, strict=True):
        np.testing.assert_allclose(row, spaces.utils.flatten(space, observation), rtol=1e-6)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_spaces_survive_json(space):
    assert space_from_json(json.loads(json.dumps(space_to_json(space), allow_nan=False))) == space


@pytest.mark.parametrize("space", [spaces.Box(0, 255, (8, 8, 3), np.uint8), spaces.Text(3)], ids=str)
def test_observations_without_vector_form_are_refused(space):
    with pytest.raises(ConfigError, match="no vector form"):
        observation_size(space)
