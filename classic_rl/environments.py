"""Vector environments, made through gymnasium and checked for what the collectors rely on.

The collectors rely on gymnasium's NEXT_STEP autoreset: when an episode ends at step t, the observation returned
at t is the true final one, and the following step ignores its action and returns the first observation of a new
episode with reward 0. So V(s') of a truncated step needs nothing special, and the reset step is masked out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import gymnasium
import numpy as np
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from pydantic import Field, field_validator, model_validator

from classic_rl.distributions import make_distribution
from classic_rl.envpool_backend import ENVPOOL_ONLY, EnvpoolEnvironments
from classic_rl.randomization import DomainRandomization, RandomizationConfig
from classic_rl.spaces import flatten_observations, is_image, observation_size
from classic_rl.sync_environments import simplified
from rlhf.config import Config
from rlhf.errors import ConfigError


class EnvironmentConfig(Config):
    """Which environment, how many at once, and what is normalized."""

    id: str
    """A gymnasium id such as CartPole-v1; `module:Id-v0` imports `module` first."""
    num_envs: int = Field(8, ge=1)
    """Environments stepped together, over all processes."""
    kwargs: dict[str, Any] = {}
    """Passed to the environment; `render_mode` is refused (it slows some environments two to three times)."""
    vectorization: Literal["auto", "vector_entry_point", "sync", "async", "envpool"] = "auto"
    """auto takes the environment's own vector form where it has one (CartPole), one loop in this process otherwise. The
    vector form draws all initial states from one generator: several processes start other episodes than one process
    does. With sync every environment has its own seed, and any number of processes gives the same run. envpool takes
    EnvPool's C++ environments (extra `envpool`): it pays for Box2D, Atari and for 16 environments or more."""
    randomization: RandomizationConfig | None = None
    """Physics, noise and delay drawn per episode; the environments are then stepped one by one (sync or async)."""
    normalize_observations: bool = False
    """Subtract the running mean, divide by the running standard deviation."""
    clip_observations: float = Field(10.0, gt=0)
    """Bound of a normalized observation; unused without normalize_observations."""
    normalize_rewards: bool = False
    """Divide by the running standard deviation of the discounted return."""
    clip_rewards: float = Field(10.0, gt=0)
    """Bound of a normalized reward; unused without normalize_rewards."""

    @model_validator(mode="after")
    def _randomize_one_by_one(self) -> Self:
        if self.randomization is not None and self.vectorization in ("vector_entry_point", "envpool"):
            raise ValueError(
                "environments in a vector form of their own cannot be randomized; set vectorization to sync"
            )
        return self

    @field_validator("kwargs")
    @classmethod
    def _refuse_rendering(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        return refuse_rendering(kwargs)


def refuse_rendering(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an environment's arguments unless they ask for pictures."""
    if "render_mode" in kwargs:
        raise ValueError("render_mode slows training environments and shows nothing; remove it")
    return kwargs


def make_environments(config: EnvironmentConfig, *, num_envs: int | None = None, images: bool = False) -> VectorEnv:
    """Make the vector environment and check that it can be trained on.

    Args:
        config: What to make.
        num_envs: Overrides `config.num_envs`, for one process's share and for evaluation.
        images: Whether whoever asks can read image observations.

    Returns:
        A vector environment with NEXT_STEP autoreset, without a render mode.

    Raises:
        ConfigError: Unknown or outdated id, a missing extra, bad kwargs, another autoreset, an unsupported space.
    """
    environments = _make(config, num_envs or config.num_envs)
    mode = environments.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        raise ConfigError(
            "the vector environment does not reset on the next step",
            where="environment.id",
            got=str(mode),
            expected="AutoresetMode.NEXT_STEP, gymnasium's default",
            remedy="Set environment.vectorization to sync.",
        )
    if not (images and is_image(environments.single_observation_space)):
        observation_size(environments.single_observation_space)
    make_distribution(environments.single_action_space)
    return environments


def make_rendering(config: EnvironmentConfig) -> VectorEnv | None:
    """Make one environment that draws, `render_mode="rgb_array"`, for films; None where there is no such mode.

    Raises:
        ConfigError: As `make_environments`.
    """
    kwargs = {name: value for name, value in config.kwargs.items() if name not in ENVPOOL_ONLY}
    single = config.model_copy(update={"vectorization": "sync", "kwargs": kwargs})
    probe = _make(single, 1)
    probe.close()
    if "rgb_array" not in probe.envs[0].metadata.get("render_modes", []):
        return None
    return _make(single, 1, render_mode="rgb_array")


def _make(config: EnvironmentConfig, num_envs: int, *, render_mode: str | None = None) -> VectorEnv:
    """Make it through gymnasium or EnvPool, with what goes wrong told in our words."""
    where = "environment.id"
    rendering = {} if render_mode is None else {"render_mode": render_mode}
    try:
        if config.vectorization == "envpool":
            return EnvpoolEnvironments(config.id, num_envs=num_envs, kwargs=config.kwargs)
        made = gymnasium.make_vec(
            config.id,
            num_envs=num_envs,
            vectorization_mode=_vectorization(config),
            wrappers=_wrappers(config),
            **config.kwargs,
            **rendering,
        )
        return simplified(made)
    except ConfigError:
        raise
    except gymnasium.error.DependencyNotInstalled as error:
        raise ConfigError(
            f"the environment needs a package that is missing: {error}", where=where, got=config.id
        ) from error
    except (gymnasium.error.UnregisteredEnv, gymnasium.error.DeprecatedEnv, ModuleNotFoundError) as error:
        raise ConfigError(str(error).rstrip("."), where=where, got=config.id, remedy=_nearest_ids(config.id)) from error
    except (gymnasium.error.Error, TypeError, ValueError) as error:
        raise ConfigError(
            f"the environment cannot be made: {error}", where="environment", got=f"{config.id} with {config.kwargs}"
        ) from error


def _vectorization(config: EnvironmentConfig) -> str | None:
    """Return gymnasium's name of the mode; None lets it choose. Its own vector forms take no wrappers."""
    if config.vectorization == "auto":
        return None if config.randomization is None else "sync"
    return config.vectorization


def _wrappers(config: EnvironmentConfig) -> list[Callable[[gymnasium.Env], gymnasium.Wrapper]] | None:
    randomization = config.randomization
    return None if randomization is None else [lambda environment: DomainRandomization(environment, randomization)]


def _nearest_ids(identifier: str) -> str:
    nearest = difflib.get_close_matches(identifier, list(gymnasium.registry), n=3)
    return f"Did you mean {' or '.join(nearest)}?" if nearest else "`gymnasium.pprint_registry()` lists what there is."


def share_of_environments(num_envs: int, *, num_processes: int, process: int) -> slice:
    """Return which of all environments belong to one process.

    Raises:
        ConfigError: They cannot be divided evenly.
    """
    if num_envs % num_processes:
        raise ConfigError(
            "environments cannot be shared evenly among the processes",
            where="environment.num_envs",
            got=num_envs,
            expected=f"a multiple of {num_processes} processes",
        )
    share = num_envs // num_processes
    return slice(process * share, (process + 1) * share)


def reset_with_seeds(environments: VectorEnv, seeds: Sequence[int]) -> np.ndarray:
    """Reset environment i with `seeds[i]`, as `start_with_seeds`; returns the flattened first observations [N, D]."""
    observations, _ = start_with_seeds(environments, seeds)
    return flatten_observations(environments.single_observation_space, observations)


def start_with_seeds(environments: VectorEnv, seeds: Sequence[int]) -> tuple[Any, dict[str, Any]]:
    """Reset environment i with `seeds[i]`; equal seeds give equal initial states.

    An environment's own vector form (CartPole's) knows one seed for all and keeps its states as columns of
    `state`; there one column per distinct seed is drawn and copied. ALE's takes one seed per game.

    Args:
        environments: A vector environment.
        seeds: One seed per environment.

    Returns:
        The first observations and infos, as gymnasium's `reset`.

    Raises:
        ConfigError: The environment's own vector form keeps its state elsewhere.
    """
    match environments.unwrapped:
        case SyncVectorEnv() | AsyncVectorEnv() | EnvpoolEnvironments():
            return environments.reset(seed=[int(seed) for seed in seeds])
        case CartPoleVectorEnv() as cart_poles:
            columns = {}
            for seed in dict.fromkeys(int(seed) for seed in seeds):
                cart_poles.reset(seed=seed)
                columns[seed] = cart_poles.state[:, 0].copy()
            cart_poles.state = np.stack([columns[int(seed)] for seed in seeds], axis=1)
            return cart_poles.state.T.astype(np.float32), {}
        case vector if type(vector).__module__.startswith("ale_py"):  # an extra, so its class is not imported here
            return environments.reset(seed=(np.asarray(seeds) % 2**31).astype(np.int64))  # pyright: ignore
    raise ConfigError(
        "this environment's own vector form cannot start each copy from a given seed",
        where="environment.vectorization",
        got=type(environments.unwrapped).__name__,
        remedy="Set environment.vectorization to sync.",
    )


def episode_limit(environments: VectorEnv) -> int | None:
    """Return the environment's own limit of steps per episode, None where it has none."""
    if environments.spec is not None and environments.spec.max_episode_steps is not None:
        return environments.spec.max_episode_steps
    return getattr(environments.unwrapped, "max_episode_steps", None)
