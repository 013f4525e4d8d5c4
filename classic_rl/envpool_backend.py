"""EnvPool's environments in C++ as a gymnasium vector environment: `environment.vectorization: envpool`.

EnvPool steps many environments in one call, in threads of its own (extra `envpool`). Two of its habits are undone here:

- Where an episode terminates on the very step that reaches its limit, EnvPool reports a truncation only, and a value
  would be bootstrapped from a terminal state. So EnvPool's own limit is put out of reach and the limit is kept here;
  both flags are true then, as in gymnasium's `TimeLimit`.
- It seeds environments when they are made, not when they are reset. Resetting with seeds makes them anew.

Source: Weng et al. 2022, EnvPool, https://arxiv.org/abs/2206.10558.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from rlhf.errors import ConfigError

ENVPOOL_ONLY = ("num_threads",)
"""Settings among `environment.kwargs` that gymnasium's form of the same environment does not have."""
_LIMIT_IN_REWARD = ("MiniGrid", "BabyAI")
"""Families whose reward is 1 - .9 steps / limit: their limit cannot be moved."""


class EnvpoolEnvironments(VectorEnv):
    """N environments of EnvPool with NEXT_STEP autoreset: the step after an end ignores its action and only resets.

    Args:
        identifier: EnvPool's id; mostly gymnasium's.
        num_envs: N.
        kwargs: Of the environment; `max_episode_steps` replaces its limit, `num_threads` (1) is EnvPool's.

    Attributes:
        max_episode_steps: Where an episode is truncated.

    Raises:
        ConfigError: The package is missing, or an id or a setting that it does not know.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}

    def __init__(self, identifier: str, *, num_envs: int, kwargs: dict[str, Any]) -> None:
        self._identifier, self.num_envs = identifier, num_envs
        self._kwargs = {"num_threads": 1, **kwargs}
        _refuse(identifier, kwargs)
        probe = self._make([0] * num_envs, limit=self._kwargs.pop("max_episode_steps", None))
        self.max_episode_steps = int(probe.spec.config.max_episode_steps)
        self._pool = self._make([0] * num_envs, limit=self.max_episode_steps + 1)
        self.single_observation_space, self.single_action_space = probe.observation_space, probe.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._elapsed, self._ended = np.zeros(num_envs, dtype=np.int64), np.zeros(num_envs, dtype=bool)

    def _make(self, seeds: list[int], *, limit: int | None) -> Any:
        import envpool

        limits = {} if limit is None else {"max_episode_steps": limit}
        return envpool.make(
            self._identifier, env_type="gymnasium", num_envs=self.num_envs, seed=seeds, **limits, **self._kwargs
        )

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin episodes everywhere.

        Args:
            seed: One per environment, or one that theirs are derived from; equal seeds give equal episodes. None goes
                on with the random numbers that there are.
            options: Unused; EnvPool has none.
        """
        if seed is not None:
            each = np.random.SeedSequence(seed).generate_state(self.num_envs) if isinstance(seed, int) else seed
            seeds = [int(one) % 2**31 for one in each]  # EnvPool's are C++ integers
            self._pool.close()
            self._pool = self._make(seeds, limit=self.max_episode_steps + 1)
        observations, _ = self._pool.reset()
        self._elapsed[:], self._ended[:] = 0, False
        return observations, {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Step the running episodes and begin new ones where the last step ended one."""
        running, over = np.flatnonzero(~self._ended), np.flatnonzero(self._ended)
        rewards, terminated = np.zeros(self.num_envs, dtype=np.float32), np.zeros(self.num_envs, dtype=bool)
        self._elapsed += 1
        self._elapsed[over] = 0
        parts = []
        if len(running):
            stepped = self._pool.step(actions[running], running)
            rewards[running], terminated[running] = stepped[1], stepped[2]
            parts.append((running, stepped[0]))
        if len(over):
            parts.append((over, self._pool.reset(over)[0]))
        observations = parts[0][1] if len(parts) == 1 else _interleaved(parts, self.num_envs)
        truncated = self._elapsed >= self.max_episode_steps
        self._ended = terminated | truncated
        return observations, rewards, terminated, truncated, {}

    def close_extras(self, **kwargs: Any) -> None:
        """Release EnvPool's threads."""
        self._pool.close()


def _interleaved(parts: list[tuple[np.ndarray, Any]], count: int) -> Any:
    """Put rows of several batches in their places, in dicts and tuples of arrays alike."""
    first = parts[0][1]
    if isinstance(first, dict):
        return {key: _interleaved([(rows, part[key]) for rows, part in parts], count) for key in first}
    if isinstance(first, tuple):
        return tuple(_interleaved([(rows, part[index]) for rows, part in parts], count) for index in range(len(first)))
    whole = np.empty((count, *first.shape[1:]), dtype=first.dtype)
    for rows, part in parts:
        whole[rows] = part
    return whole


def _refuse(identifier: str, kwargs: dict[str, Any]) -> None:
    try:
        import envpool
    except ImportError as error:
        raise ConfigError(
            "the package envpool is missing",
            where="environment.vectorization",
            got="envpool",
            remedy="pip install 'rlhf-toolkit[envpool]'",
        ) from error
    if identifier not in envpool.list_all_envs():
        raise ConfigError(
            "EnvPool has no such environment",
            where="environment.id",
            got=identifier,
            remedy="Ids differ in places (Pong-v5, Taxi-v3); `envpool.list_all_envs()` lists them.",
        )
    if identifier.startswith(_LIMIT_IN_REWARD):
        raise ConfigError(
            "EnvPool computes this environment's reward from its limit of steps, which is kept outside of it here",
            where="environment.vectorization",
            got=f"envpool with {identifier}",
            remedy="Set environment.vectorization to sync.",
        )
    reserved = sorted({"batch_size", "env_type", "num_envs", "seed", "env_seed"} & kwargs.keys())
    if reserved:
        raise ConfigError("set by the toolkit", where="environment.kwargs", got=", ".join(reserved))
