"""What observations and actions look like: flattening observations to vectors, and spaces as JSON.

Every observation becomes one float32 vector per environment, in the order and one-hot coding of
`gymnasium.spaces.utils.flatten`, but for a whole batch at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces

from rlhf.errors import ConfigError


def observation_size(space: spaces.Space) -> int:
    """Return the length of the vector that `flatten_observations` makes of one observation.

    Raises:
        ConfigError: The space is none of Box (up to two axes), Discrete, MultiDiscrete, MultiBinary, Dict, Tuple.
    """
    match space:
        case spaces.Box() if len(space.shape) <= 2:
            return int(np.prod(space.shape))
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(space.nvec.sum())
        case spaces.MultiBinary():
            return int(np.prod(space.shape))
        case spaces.Dict():
            return sum(observation_size(part) for part in space.spaces.values())
        case spaces.Tuple():
            return sum(observation_size(part) for part in space.spaces)
    raise ConfigError(
        "this observation space has no vector form here",
        where="environment.id",
        got=str(space),
        expected="Box with at most two axes, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple of these",
        remedy="Images need a convolutional network, which the on-policy networks do not have; wrap the environment.",
    )


def is_image(space: spaces.Space) -> bool:
    """Whether observations are images: a Box with three axes of bytes or truth values."""
    return isinstance(space, spaces.Box) and len(space.shape) == 3 and space.dtype in (np.uint8, np.bool_)


def flatten_observations(space: spaces.Space, observations: Any) -> np.ndarray:
    """Turn a batch of observations of a vector environment into vectors.

    Args:
        space: The space of ONE observation.
        observations: N observations as a gymnasium vector environment returns them.

    Returns:
        [N, observation_size(space)] float32.
    """
    match space:
        case spaces.Box():
            return np.asarray(observations, dtype=np.float32).reshape(len(observations), -1)
        case spaces.Discrete():
            return np.eye(space.n, dtype=np.float32)[np.asarray(observations) - space.start]
        case spaces.MultiDiscrete():
            columns = np.asarray(observations).reshape(len(observations), -1) - space.start.reshape(-1)
            sizes = space.nvec.reshape(-1)
            return np.concatenate(
                [np.eye(size, dtype=np.float32)[columns[:, index]] for index, size in enumerate(sizes)], axis=1
            )
        case spaces.MultiBinary():
            return np.asarray(observations, dtype=np.float32).reshape(len(observations), -1)
        case spaces.Dict():
            parts = [flatten_observations(part, observations[key]) for key, part in space.spaces.items()]
        case spaces.Tuple():
            parts = [flatten_observations(part, batch) for part, batch in zip(space.spaces, observations, strict=True)]
        case _:
            raise AssertionError(f"observation_size accepted {space}")
    return np.concatenate(parts, axis=1)


def space_to_json(space: spaces.Space) -> dict[str, Any]:
    """Describe a space with plain JSON values; `space_from_json` reads it back."""
    match space:
        case spaces.Box():
            return {
                "type": "box",
                # Infinite bounds travel as strings: strict JSON has no Infinity.
                "low": np.asarray(space.low, dtype=str).tolist(),
                "high": np.asarray(space.high, dtype=str).tolist(),
                "shape": list(space.shape),
                "dtype": str(space.dtype),
            }
        case spaces.Discrete():
            return {"type": "discrete", "n": int(space.n), "start": int(space.start)}
        case spaces.MultiDiscrete():
            return {"type": "multi_discrete", "nvec": space.nvec.tolist(), "start": space.start.tolist()}
        case spaces.MultiBinary():
            return {"type": "multi_binary", "n": np.asarray(space.n).tolist()}
        case spaces.Dict():
            return {"type": "dict", "spaces": {key: space_to_json(part) for key, part in space.spaces.items()}}
        case spaces.Tuple():
            return {"type": "tuple", "spaces": [space_to_json(part) for part in space.spaces]}
    raise ConfigError("a space that cannot be saved", got=str(space))


def space_from_json(description: dict[str, Any]) -> spaces.Space:
    """Rebuild a space that `space_to_json` described."""
    match description["type"]:
        case "box":
            dtype, shape = np.dtype(description["dtype"]), tuple(description["shape"])
            low, high = (np.asarray(description[key]).astype(dtype).reshape(shape) for key in ("low", "high"))
            return spaces.Box(low, high, shape, dtype.type)
        case "discrete":
            return spaces.Discrete(description["n"], start=description["start"])
        case "multi_discrete":
            return spaces.MultiDiscrete(np.asarray(description["nvec"]), start=np.asarray(description["start"]))
        case "multi_binary":
            return spaces.MultiBinary(description["n"])
        case "dict":
            return spaces.Dict({key: space_from_json(part) for key, part in description["spaces"].items()})
        case "tuple":
            return spaces.Tuple([space_from_json(part) for part in description["spaces"]])
    raise ConfigError("a space of unknown type", got=description["type"])
