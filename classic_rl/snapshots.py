"""The state of running environments as plain values, so that a resumed run goes on in the same episodes.

Works where an environment and its wrappers keep their state in numbers, arrays and random generators: all of
gymnasium's classic control and toy text; and where an environment has `state_dict` and `load_state_dict`. Simulators
that keep it in foreign objects (Box2D, MuJoCo) give None, and a resumed run starts new episodes there.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import SyncVectorEnv, VectorEnv

from rlhf.config import Config

_STATELESS = (
    gymnasium.Space,
    EnvSpec,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    type,
    gymnasium.Env,
    Config,
)
"""Attributes of these types are made again by the constructor."""

_FOREIGN = object()


def snapshot(environments: VectorEnv) -> list[dict[str, Any]] | None:
    """Describe the state of all environments with tensors and plain values; None where that is impossible."""
    holders = list(_state_holders(environments))
    if not holders:
        return None
    described = []
    for holder in holders:
        if hasattr(holder, "load_state_dict"):
            # Copied through the encoding: a running environment changes its own lists and arrays.
            described.append(_encode(holder.state_dict()))
            continue
        layer = {}
        for name, value in vars(holder).items():
            if name == "envs" or isinstance(value, _STATELESS):
                continue
            encoded = _encode(value)
            if encoded is _FOREIGN:
                if holder is environments.unwrapped:
                    continue  # factories and the like of the vector wrapper itself
                return None
            layer[name] = encoded
        described.append(layer)
    return described


def restore(environments: VectorEnv, described: list[dict[str, Any]]) -> None:
    """Put environments of the same config back into the state that `snapshot` described."""
    holders = list(_state_holders(environments))
    if len(holders) != len(described):
        raise ValueError(f"the snapshot describes {len(described)} layers, these environments have {len(holders)}")
    for holder, layer in zip(holders, described, strict=True):
        if hasattr(holder, "load_state_dict"):
            holder.load_state_dict(_decode(layer))
            continue
        for name, encoded in layer.items():
            setattr(holder, name, _decode(encoded))


def _state_holders(environments: VectorEnv) -> Iterator[Any]:
    """The vector environment, then each environment's wrappers from the outermost to the environment itself."""
    match environments.unwrapped:
        case CartPoleVectorEnv() as vector:
            yield vector
        case SyncVectorEnv() as vector:
            yield vector
            for layer in vector.envs:
                while isinstance(layer, gymnasium.Wrapper):
                    yield layer
                    layer = layer.env
                yield layer


def _encode(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str():
            return value
        case np.random.Generator():
            return {"generator": value.bit_generator.state}
        case np.ndarray() | np.generic() if value.dtype.kind in "bif":
            return torch.from_numpy(np.array(value))
        case list() | tuple():
            items = [_encode(item) for item in value]
            if any(item is _FOREIGN for item in items):
                return _FOREIGN
            return {"tuple": items} if isinstance(value, tuple) else items
        case dict() if all(isinstance(key, str) for key in value):
            items = {key: _encode(item) for key, item in value.items()}
            return _FOREIGN if any(item is _FOREIGN for item in items.values()) else {"dict": items}
    return _FOREIGN


def _decode(encoded: Any) -> Any:
    match encoded:
        case torch.Tensor():
            return encoded.numpy().copy() if encoded.ndim else encoded.numpy()[()]
        case list():
            return [_decode(item) for item in encoded]
        case {"generator": state}:
            bit_generator = getattr(np.random, state["bit_generator"])()
            bit_generator.state = state
            return np.random.Generator(bit_generator)
        case {"tuple": items}:
            return tuple(_decode(item) for item in items)
        case {"dict": items}:
            return {key: _decode(item) for key, item in items.items()}
    return encoded
