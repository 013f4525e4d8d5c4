"""Whole episodes: playing them, and collecting them in groups that start from one state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from pydantic import Field

from classic_rl.acting import Forward, valid_actions
from classic_rl.collector import CollectSteps, GymCollector, StepCollector, Steps
from classic_rl.environments import EnvironmentConfig, episode_limit, start_with_seeds
from classic_rl.off_policy import observation_array
from classic_rl.policy import ActorCritic
from rlhf.config import Config
from rlhf.core.algorithm import AlgorithmConfig
from rlhf.core.types import Rollout
from rlhf.errors import ConfigError

_NOISE_CHUNK = 128
"""Steps whose action noise is drawn at once."""


class CollectEpisodes(Config):
    """One whole episode of every environment; groups of episodes start from the same state."""

    type: Literal["episodes"] = "episodes"
    group_size: int = Field(1, ge=1)
    """Episodes per initial state; num_envs / group_size initial states are drawn per rollout."""
    max_steps: int | None = Field(None, ge=1)
    """Longer episodes are cut and count as truncated; None leaves it to the environment's own limit."""


def play_episodes(
    environments: VectorEnv,
    seeds: Sequence[int],
    act: Callable[[np.ndarray, int, np.ndarray | None], tuple[np.ndarray, np.ndarray]],
    forward: Forward,
    *,
    max_steps: int,
    normalized: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Steps:
    """Play one episode in every environment.

    Environments that end early are stepped on until the last one ends; those steps are masked out.

    Args:
        environments: They are reset here.
        seeds: Of environment i's episode.
        act: From what the policy sees, the step's number and the masks of valid actions to (actions, actions for the
            environment). It calls `forward`.
        forward: Whose memory begins here.
        max_steps: Where an episode is cut.
        normalized: From raw observations to what the policy sees; None leaves them.

    Returns:
        Rows of the longest episode's length.
    """
    space, policy = environments.single_observation_space, forward.policy
    new, infos = start_with_seeds(environments, seeds)
    masks = valid_actions(environments, infos, policy)
    forward.forget(environments.num_envs)
    memory, alive = forward.memory, np.ones(environments.num_envs, dtype=bool)
    record: list[tuple[np.ndarray, ...]] = []
    raws, masks_seen = [observation_array(space, new)], []
    seen = [raws[0] if normalized is None else normalized(raws[0])]
    while alive.any():
        actions, accepted = act(seen[-1], len(record), masks)
        new, rewards, terminated, truncated, infos = environments.step(accepted)
        over = terminated | truncated
        if masks is not None:
            masks_seen.append(masks)
            masks = valid_actions(environments, infos, policy, ended=over)
        if len(record) + 1 == max_steps:
            truncated = truncated | ~terminated
        record.append((actions, rewards.astype(np.float32), terminated & alive, truncated & alive, alive))
        raws.append(observation_array(space, new))
        seen.append(raws[-1] if normalized is None else normalized(raws[-1]))
        alive = alive & ~(terminated | truncated)
    actions, rewards, terminated, truncated, mask = (np.stack(column, axis=1) for column in zip(*record, strict=True))
    starts = np.zeros((len(mask), mask.shape[1] + 1), dtype=bool)
    starts[:, 0] = True
    return Steps(
        observations=np.stack(seen, axis=1),
        raw_observations=None if normalized is None else np.stack(raws, axis=1),
        actions=actions,
        rewards=np.where(mask, rewards, 0.0).astype(np.float32),
        terminated=terminated,
        truncated=truncated,
        mask=mask,
        action_masks=np.stack(masks_seen, axis=1) if masks_seen else None,
        starts=None if memory is None else starts,
        memory=memory,
    )


class EpisodeCollector(GymCollector):
    """Plays one whole episode per environment and rollout; B = environments, T = the longest episode.

    Group g of a rollout starts from one reset seed in all its environments, so a group's scores differ only
    through the policy's own draws (and, in environments with random dynamics, share those).

    Args:
        collect: Group size and limit.
        policy, environment, algorithm, seed, processes: See `GymCollector`.

    Raises:
        ConfigError: The algorithm needs groups of at least two, groups cannot be divided, or episodes may never end.
    """

    def __init__(
        self,
        collect: CollectEpisodes,
        policy: ActorCritic,
        environment: EnvironmentConfig,
        algorithm: AlgorithmConfig,
        **shared: Any,
    ) -> None:
        if algorithm.needs_groups and collect.group_size < 2:
            raise ConfigError(
                f"advantages {algorithm.advantages.type!r} compare the episodes of a group",
                where="collect.group_size",
                got=collect.group_size,
                expected="at least 2",
            )
        super().__init__(policy, environment, algorithm, **shared)
        if self.num_envs % collect.group_size:
            raise ConfigError(
                "environments cannot be divided into groups",
                where="environment.num_envs",
                got=self.num_envs,
                expected=f"a multiple of collect.group_size = {collect.group_size} on every process",
            )
        limit = episode_limit(self.environments)
        if limit is None and collect.max_steps is None:
            raise ConfigError(
                "the environment has no limit of steps, so an episode may never end",
                where="collect.max_steps",
                remedy="Set collect.max_steps.",
            )
        self.max_steps = min(value for value in (limit, collect.max_steps) if value is not None)
        self.group_size = collect.group_size

    def collect(self) -> Rollout:
        """Play and measure."""
        self.forward.refresh()
        groups = self.total_envs // self.group_size
        seeds = np.random.SeedSequence((self.seed, self.collected)).generate_state(groups)
        steps = play_episodes(
            self.environments,
            np.repeat(seeds, self.group_size)[self.share].tolist(),
            self._act,
            self.forward,
            max_steps=self.max_steps,
            normalized=self.observation_normalizer,
        )
        returns, lengths = steps.rewards.sum(axis=1).tolist(), steps.mask.sum(axis=1).tolist()
        group_ids = torch.arange(self.total_envs)[self.share] // self.group_size
        rollout = self.rollout(steps, metrics=self.episode_metrics(returns, lengths, steps), group_ids=group_ids)
        self.collected += 1
        return rollout

    def _act(self, seen: np.ndarray, step: int, masks: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        if step % _NOISE_CHUNK == 0:
            self._noise = self.noise(_NOISE_CHUNK, chunk=step // _NOISE_CHUNK)
        actions = self.policy.distribution.sample(self.forward(seen, masks=masks), self._noise[step % _NOISE_CHUNK])
        return actions, self.policy.distribution.to_environment(actions)


def make_collector(
    collect: CollectSteps | CollectEpisodes,
    policy: ActorCritic,
    environment: EnvironmentConfig,
    algorithm: AlgorithmConfig,
    **shared: Any,
) -> StepCollector | EpisodeCollector:
    """Make the collector that `collect` describes; see the classes for the rest."""
    maker = StepCollector if isinstance(collect, CollectSteps) else EpisodeCollector
    return maker(collect, policy, environment, algorithm, **shared)
