"""Evaluation: whole episodes in environments of their own, with frozen normalization."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gymnasium.vector import VectorEnv
from pydantic import Field, field_validator

from classic_rl.acting import Forward
from classic_rl.collector import Steps
from classic_rl.environments import EnvironmentConfig, episode_limit, make_environments, refuse_rendering
from classic_rl.episodes import play_episodes
from classic_rl.normalization import ObservationNormalizer
from classic_rl.off_policy import action_masks_of, observation_array, start
from classic_rl.policy import ActorCritic
from classic_rl.video import filmed, next_files, require_package
from rlhf.config import Config
from rlhf.errors import ConfigError


class EvaluationConfig(Config):
    """How a policy is judged."""

    episodes: int = Field(20, ge=1)
    """Episodes per evaluation; each has a seed of its own, the same ones in every evaluation."""
    deterministic: bool = True
    """True plays the most probable action (the mean of a Gaussian), False samples."""
    seed: int = 1_000_000
    """First reset seed; far from the training seeds."""
    max_steps: int | None = Field(None, ge=1)
    """Cuts longer episodes; None leaves it to the environment's own limit."""
    kwargs: dict[str, Any] = {}
    """Changes of environment.kwargs while evaluating, such as whole games instead of single lives."""
    video: int = Field(0, ge=0)
    """Further episodes per evaluation that are filmed, as MP4 files in `<run directory>/videos` (extra `video`). They
    are played in an environment of their own; training environments never draw."""

    @field_validator("video")
    @classmethod
    def _require_package(cls, video: int) -> int:
        if video:
            require_package()
        return video

    @field_validator("kwargs")
    @classmethod
    def _refuse_rendering(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        return refuse_rendering(kwargs)

    def adapt(self, environment: EnvironmentConfig) -> EnvironmentConfig:
        """The environment in which is evaluated."""
        return environment.model_copy(update={"kwargs": {**environment.kwargs, **self.kwargs}})


def evaluate(
    policy: ActorCritic,
    environment: EnvironmentConfig,
    config: EvaluationConfig | None = None,
    *,
    normalizer: ObservationNormalizer | None = None,
    videos: Path | None = None,
) -> dict[str, float]:
    """Play `episodes` episodes with raw rewards, and film `video` ones.

    Args:
        policy: What is judged; its parameters are only read.
        environment: The training environment's config; reward normalization does not apply.
        config: How.
        normalizer: The training run's, which is read and not updated.
        videos: Folder of the films; None films nothing.

    Returns:
        return_mean, return_std (population), return_min, return_max, length_mean.

    Raises:
        ConfigError: Episodes may never end.
    """
    config = config or EvaluationConfig()
    environment = config.adapt(environment)
    environments = make_environments(environment, num_envs=config.episodes, images=True)
    try:
        steps = _play(policy, environments, config, normalizer=normalizer)
    finally:
        environments.close()
    for file, judged in _films(config, videos):
        with filmed(environment, file) as stage:
            _play(policy, stage, judged, normalizer=normalizer)
    returns = steps.rewards.sum(axis=1, dtype=np.float64)
    return {
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "length_mean": float(steps.mask.sum(axis=1).mean()),
    }


def _play(
    policy: ActorCritic, environments: VectorEnv, config: EvaluationConfig, *, normalizer: ObservationNormalizer | None
) -> Steps:
    """Play one episode in every environment."""
    limit, actor = _require_limit(environments, config), _Actor(policy, config)
    seeds = range(config.seed, config.seed + environments.num_envs)
    return play_episodes(environments, seeds, actor, actor.forward, max_steps=limit, normalized=normalizer)


def _films(config: EvaluationConfig, folder: Path | None) -> list[tuple[Path, EvaluationConfig]]:
    """The files to film, each with a config whose seed is its episode's own."""
    if folder is None or not config.video:
        return []
    files = next_files(folder, config.video)
    return [(file, config.model_copy(update={"seed": config.seed + index})) for index, file in enumerate(files)]


def _require_limit(environments: VectorEnv, config: EvaluationConfig) -> int:
    limits = [value for value in (episode_limit(environments), config.max_steps) if value is not None]
    if not limits:
        raise ConfigError(
            "the environment has no limit of steps, so an episode may never end",
            where="evaluation.max_steps",
            remedy="Set evaluation.max_steps.",
        )
    return min(limits)


class Actor(Protocol):
    """What `evaluate_agent` needs: every off-policy agent and every loaded one has it."""

    def greedy(self, observations: np.ndarray, *, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Return deterministic actions."""
        ...

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Turn them into what the environment accepts."""
        ...


def evaluate_agent(
    agent: Actor,
    environment: EnvironmentConfig,
    config: EvaluationConfig | None = None,
    *,
    videos: Path | None = None,
) -> dict[str, float]:
    """Play `episodes` greedy episodes of an off-policy agent with raw rewards; images and action masks are understood.

    Args:
        agent: What is judged; it is not changed.
        environment: The training environment's config.
        config: How; such agents are judged by their deterministic actions.
        videos: Folder of the films; None films nothing.

    Returns:
        As `evaluate`.

    Raises:
        ConfigError: Episodes may never end, or `deterministic` is false.
    """
    config = config or EvaluationConfig()
    if not config.deterministic:
        raise ConfigError("off-policy agents are judged by their greedy actions", where="evaluation.deterministic")
    returns, lengths = play_greedily(agent, environment, config)
    for file, judged in _films(config, videos):
        with filmed(judged.adapt(environment), file) as stage:
            _play_greedily(agent, stage, judged)
    return {
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_min": float(returns.min()),
        "return_max": float(returns.max()),
        "length_mean": float(lengths.mean()),
    }


def play_greedily(
    agent: Actor, environment: EnvironmentConfig, config: EvaluationConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the undiscounted returns [episodes] and lengths [episodes] of greedy episodes."""
    environments = make_environments(config.adapt(environment), num_envs=config.episodes, images=True)
    try:
        return _play_greedily(agent, environments, config)
    finally:
        environments.close()


def _play_greedily(agent: Actor, environments: VectorEnv, config: EvaluationConfig) -> tuple[np.ndarray, np.ndarray]:
    """Play one episode in every environment."""
    returns, lengths = np.zeros(environments.num_envs), np.zeros(environments.num_envs)
    for _, rewards, alive in _greedy_steps(agent, environments, config):
        returns += rewards * alive
        lengths += alive
    return returns, lengths


def greedy_observations(agent: Actor, environments: VectorEnv, config: EvaluationConfig) -> np.ndarray:
    """Return what a greedy agent saw, [steps, *observation], in one episode of the first environment."""
    steps = _greedy_steps(agent, environments, config)
    return np.stack([observations[0] for observations, _, alive in steps if alive[0]])


def _greedy_steps(
    agent: Actor, environments: VectorEnv, config: EvaluationConfig
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield observations [N, ...] as stored, rewards [N] of the actions there, and whose episodes still ran [N]."""
    limit = _require_limit(environments, config)
    new, infos = start(environments, config.seed)
    alive = np.ones(environments.num_envs, dtype=bool)
    for _ in range(limit):
        observations = observation_array(environments.single_observation_space, new)
        masks: Any = action_masks_of(environments, infos)
        actions = agent.greedy(observations, **({} if masks is None else {"action_masks": masks}))
        new, rewards, terminated, truncated, infos = environments.step(agent.to_environment(actions))
        yield observations, rewards, alive
        alive = alive & ~(terminated | truncated)
        if not alive.any():
            return


class _Actor:
    def __init__(self, policy: ActorCritic, config: EvaluationConfig) -> None:
        self.forward, self.distribution = Forward(policy), policy.distribution
        self.generator = None if config.deterministic else np.random.default_rng(config.seed)

    def __call__(self, seen: np.ndarray, step: int, masks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        parameters = self.forward(seen, masks=masks)
        if self.generator is None:
            actions = self.distribution.greedy(parameters)
        else:
            actions = self.distribution.sample(parameters, self.distribution.noise(self.generator, (len(seen),)))
        return actions, self.distribution.to_environment(actions)
