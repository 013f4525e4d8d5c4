"""From a policy and running environments to a `Rollout`.

`StepCollector` runs every environment for a fixed number of steps and bootstraps at the cut: for presets with a
critic. `EpisodeCollector` (in `classic_rl.episodes`) plays whole episodes, in groups that start from one state: for
presets that compare scores, and for rewards to go.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from classic_rl.acting import Forward, valid_actions
from classic_rl.environments import (
    EnvironmentConfig,
    make_environments,
    share_of_environments,
    start_with_seeds,
)
from classic_rl.networks import NumpyMirror
from classic_rl.normalization import FirstStatistics, ObservationNormalizer, RewardNormalizer
from classic_rl.off_policy import observation_array
from classic_rl.policy import ActorCritic
from classic_rl.snapshots import restore, snapshot
from classic_rl.spaces import is_image, observation_size
from rlhf.config import Config
from rlhf.core.algorithm import AlgorithmConfig
from rlhf.core.masking import Reduce, identity
from rlhf.core.types import Rollout
from rlhf.errors import ConfigError


class CollectSteps(Config):
    """A fixed number of steps of every environment, cut wherever episodes stand."""

    type: Literal["steps"] = "steps"
    steps: int = Field(128, ge=1)
    """Steps of each environment per rollout; a rollout has steps x num_envs."""


@dataclass(frozen=True)
class Processes:
    """Which share of the environments this process runs, and how sums cross processes."""

    count: int = 1
    index: int = 0
    reduce: Reduce = identity


@dataclass(frozen=True)
class Steps:
    """What happened, as arrays; observations are normalized and have one more entry in time than the rest."""

    observations: np.ndarray
    """[N, T + 1, D] float32, images [N, T + 1, ...] uint8."""
    raw_observations: np.ndarray | None
    """[N, T + 1, D] float32, where they are normalized and not part of the statistics yet."""
    actions: np.ndarray
    """[N, T, ...]."""
    rewards: np.ndarray
    """[N, T] float32, raw."""
    terminated: np.ndarray
    """[N, T] bool."""
    truncated: np.ndarray
    """[N, T] bool."""
    mask: np.ndarray
    """[N, T] bool, False on reset steps and after the end of a row."""
    action_masks: np.ndarray | None = None
    """[N, T, A] bool, the valid actions, where the environment tells them."""
    starts: np.ndarray | None = None
    """[N, T + 1] bool, True where an episode's first observation stands; with a memory."""
    memory: np.ndarray | None = None
    """[N, K] float32, what the policy remembered before the first observation."""
    clipped_actions: float | None = None
    """Share of Box action components outside the bounds."""


class GymCollector:
    """What both collectors share: acting, measuring, normalizing, statistics, state.

    Acting goes through a NumPy mirror of the actor. `old_log_probs` and `values` come from one batched torch forward
    after collection: they are exactly the trainer's, and one call for a whole rollout is cheap.

    Randomness: rollout k draws its action noise from a generator seeded by (seed, k) for all environments of all
    processes, and each process takes its columns; so the noise depends on neither the number of processes nor a resume.

    Args:
        policy: The actor-critic that is being trained, unwrapped.
        environment: Which environments to make.
        algorithm: Says whether values, a reference or groups are needed.
        seed: Seeds environments and actions.
        processes: This process's share.

    Raises:
        ConfigError: The environments cannot be made, shared, or used as the algorithm needs.
    """

    def __init__(
        self,
        policy: ActorCritic,
        environment: EnvironmentConfig,
        algorithm: AlgorithmConfig,
        *,
        seed: int = 0,
        processes: Processes | None = None,
    ) -> None:
        _refuse_language_only(algorithm)
        self.policy, self.algorithm, self.seed = policy, algorithm, seed
        self.processes = processes or Processes()
        self.share = share_of_environments(
            environment.num_envs, num_processes=self.processes.count, process=self.processes.index
        )
        self.total_envs, self.num_envs = environment.num_envs, self.share.stop - self.share.start
        self.environments = make_environments(environment, num_envs=self.num_envs, images=True)
        self.space = self.environments.single_observation_space
        self.forward = Forward(policy)
        # Frozen at construction, before any checkpoint is restored; a checkpoint then brings its own.
        self.reference = copy.deepcopy(policy).requires_grad_(False) if algorithm.needs_reference else None
        self.observation_normalizer = self.reward_normalizer = None
        if environment.normalize_observations:
            if is_image(self.space):
                raise ConfigError(
                    "images are scaled by the network and not normalized",
                    where="environment.normalize_observations",
                    got=True,
                    expected="false",
                )
            self.observation_normalizer = ObservationNormalizer(
                observation_size(self.space), clip=environment.clip_observations
            )
        if environment.normalize_rewards:
            discount = getattr(algorithm.advantages, "discount", 1.0)
            self.reward_normalizer = RewardNormalizer(self.num_envs, discount=discount, clip=environment.clip_rewards)
        self.collected = 0
        self.total_env_steps = 0
        self.recent_returns: deque[float] = deque(maxlen=100)

    # --- acting ---------------------------------------------------------------------------------------------------

    def noise(self, steps: int, *, chunk: int = 0) -> np.ndarray:
        """[steps, N, ...] action noise of the current rollout for this process's environments."""
        generator = np.random.default_rng((self.seed, self.collected, chunk))
        return self.policy.distribution.noise(generator, (steps, self.total_envs))[:, self.share]

    @property
    def mirror(self) -> NumpyMirror:
        """The actor's layers in NumPy."""
        return self.forward.mirror

    def normalized(self, raw: np.ndarray) -> np.ndarray:
        """Raw flattened observations as the policy sees them."""
        return raw if self.observation_normalizer is None else self.observation_normalizer(raw)

    # --- measuring ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def rollout(self, steps: Steps, *, metrics: dict[str, float], group_ids: Tensor | None = None) -> Rollout:
        """Measure log-probs and values of what happened, update normalizers, and wrap it up."""
        device = next(self.policy.parameters()).device
        ends = steps.terminated | steps.truncated
        rewards = steps.rewards
        if self.reward_normalizer is not None:
            rewards = self.reward_normalizer(rewards, episode_ends=ends, mask=steps.mask, reduce=self.processes.reduce)
        if self.observation_normalizer is not None and steps.raw_observations is not None:
            self.observation_normalizer.update(steps.raw_observations[:, :-1][steps.mask], reduce=self.processes.reduce)
        observations = torch.from_numpy(steps.observations).to(device)
        actions = torch.from_numpy(steps.actions).to(device)
        inputs, features = self._inputs(steps, observations)
        outputs = self.policy.outputs(inputs, features=features[:, :-1])
        scores = self.policy.distribution.log_probs_and_entropy(outputs, actions)
        values = self.policy.values_of(features) if self.algorithm.needs_critic else None
        terminated = torch.from_numpy(steps.terminated).to(device)
        reference = None if self.reference is None else self.reference(inputs, actions).log_probs
        return Rollout(
            inputs=inputs,
            actions=actions,
            action_mask=torch.from_numpy(steps.mask).to(device),
            rewards=torch.from_numpy(rewards).to(device),
            old_log_probs=scores[0],
            episode_ends=torch.from_numpy(ends).to(device),
            values=None if values is None else values[:, :-1],
            # After a truncation the next observation is the true final one (NEXT_STEP), so its value bootstraps.
            next_values=None if values is None else values[:, 1:].masked_fill(terminated, 0.0),
            ref_log_probs=reference,
            group_ids=group_ids,
            metrics=metrics,
        )

    def _inputs(self, steps: Steps, observations: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """What the policy is given again in updates, and its features [N, T + 1, F] including the last observation."""
        device, whole = observations.device, {"observations": observations}
        if steps.starts is not None and steps.memory is not None:
            whole["starts"] = torch.from_numpy(np.ascontiguousarray(steps.starts)).to(device)
            whole["memory"] = torch.from_numpy(steps.memory).to(device)
        features = self.policy.features(whole)
        inputs = {name: tensor if name == "memory" else tensor[:, :-1] for name, tensor in whole.items()}
        if steps.action_masks is not None:
            inputs["action_masks"] = torch.from_numpy(steps.action_masks).to(device)
        return inputs, features

    def episode_metrics(self, returns: list[float], lengths: list[int], steps: Steps) -> dict[str, float]:
        """Statistics of the episodes that ended in this rollout, over all processes."""
        sums = torch.tensor([sum(returns), sum(lengths), len(returns), steps.mask.sum()], dtype=torch.float64)
        total_return, total_length, episodes, env_steps = self.processes.reduce(sums).tolist()
        self.total_env_steps += int(env_steps)
        self.recent_returns.extend(returns)
        metrics = {
            "rollout/episodes": episodes,
            "rollout/env_steps": env_steps,
            "rollout/total_env_steps": float(self.total_env_steps),
        }
        if episodes:
            metrics["rollout/return_mean"] = total_return / episodes
            metrics["rollout/length_mean"] = total_length / episodes
        if self.recent_returns:
            metrics["rollout/return_mean_100"] = sum(self.recent_returns) / len(self.recent_returns)
        if steps.clipped_actions is not None:
            metrics["rollout/clipped_action_fraction"] = steps.clipped_actions
        return metrics

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs beside the policy's weights."""
        return {
            "collected": self.collected,
            "total_env_steps": self.total_env_steps,
            "recent_returns": list(self.recent_returns),
            "reference": None if self.reference is None else self.reference.state_dict(),
            "observation_normalizer": _state(self.observation_normalizer),
            "reward_normalizer": _state(self.reward_normalizer),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s content."""
        self.collected, self.total_env_steps = state["collected"], state["total_env_steps"]
        self.recent_returns = deque(state["recent_returns"], maxlen=100)
        for name in ("reference", "observation_normalizer", "reward_normalizer"):
            ours, theirs = getattr(self, name), state[name]
            if (ours is None) != (theirs is None):
                raise ConfigError(
                    f"{name} differs between the checkpoint and this run's config",
                    where="resume",
                    got="absent from the checkpoint" if theirs is None else "only in the checkpoint",
                    remedy="Resume with the config that the run was started with.",
                )
            if ours is not None:
                ours.load_state_dict(theirs)

    def close(self) -> None:
        """Close the environments."""
        self.environments.close()


def _refuse_language_only(algorithm: AlgorithmConfig) -> None:
    if algorithm.language_only is not None:
        raise ConfigError(
            f"the algorithm needs {algorithm.language_only}, which only a language model's rollout has",
            where="algorithm",
            expected="an algorithm that environments can feed",
            remedy="Use rloo, grpo, reinforce or ppo here; run this one with `rlhf run grpo` or `rlhf run ppo_rlhf`.",
        )


def _state(holder: Any) -> Any:
    return None if holder is None else holder.state_dict()


class StepCollector(GymCollector):
    """Runs every environment for a fixed number of steps; B = environments, T = steps.

    Args:
        collect: How many steps.
        policy, environment, algorithm, seed, processes: See `GymCollector`.

    Raises:
        ConfigError: The algorithm compares scores of whole episodes.
    """

    def __init__(
        self,
        collect: CollectSteps,
        policy: ActorCritic,
        environment: EnvironmentConfig,
        algorithm: AlgorithmConfig,
        **shared: Any,
    ) -> None:
        if algorithm.needs_groups:
            raise ConfigError(
                f"advantages {algorithm.advantages.type!r} compare whole episodes of a group",
                where="collect.type",
                got="steps",
                expected="episodes",
                remedy="Set collect: {type: episodes, group_size: 8}.",
            )
        if algorithm.discounted_state_weight:
            raise ConfigError(
                "discounted_state_weight counts steps from the episode's start, and these rows begin anywhere in one",
                where="algorithm.discounted_state_weight",
                remedy="Set collect: {type: episodes}.",
            )
        super().__init__(policy, environment, algorithm, **shared)
        if self.reference is not None and policy.needs_rows:
            raise ConfigError(
                "these rows begin anywhere in an episode, where a reference would need a memory of its own",
                where="network.memory",
                got="an algorithm with a reference policy",
                remedy="Set collect: {type: episodes}, or leave out the KL to the reference.",
            )
        self.steps = collect.steps
        self._reset()

    def _reset(self) -> None:
        seeds = np.random.SeedSequence((self.seed, self.collected)).generate_state(self.total_envs)[self.share]
        new, infos = start_with_seeds(self.environments, seeds.tolist())
        self.observations = observation_array(self.space, new)
        self.action_masks = valid_actions(self.environments, infos, self.policy)
        self.ended = np.zeros(self.num_envs, dtype=bool)
        self.starts = np.ones(self.num_envs, dtype=bool)
        self.forward.forget(self.num_envs)
        self.episode_returns, self.episode_lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)

    def collect(self) -> Rollout:
        """Run the environments on and measure."""
        self.forward.refresh()
        steps = self._run()
        returns, lengths = self._finished_episodes(steps)
        rollout = self.rollout(steps, metrics=self.episode_metrics(returns, lengths, steps))
        self.collected += 1
        return rollout

    def _run(self) -> Steps:
        """The hot loop: one network forward, one draw, one environment step, a few array writes."""
        length, distribution = self.steps, self.policy.distribution
        noise, memory = self.noise(length), self.forward.memory
        # Time comes first here so that each write is one contiguous block; rows come first in the rollout.
        seen = np.empty((length + 1, *self.observations.shape), dtype=self.observations.dtype)
        normalizer, first = self.observation_normalizer, None
        if normalizer is not None and normalizer.count == 0:
            first = FirstStatistics(normalizer, reduce=self.processes.reduce)
        raw_seen = np.empty_like(seen) if normalizer is not None and first is None else None
        actions = np.empty((length, self.num_envs, *distribution.action_shape), dtype=_numpy_dtype(distribution))
        rewards = np.empty((length, self.num_envs), dtype=np.float32)
        terminated, truncated = np.empty_like(rewards, dtype=bool), np.empty_like(rewards, dtype=bool)
        raw, clipped = self.observations, None if distribution.action_dtype == torch.int64 else 0
        masks, starts, ended, masks_seen = self.action_masks, self.starts, self.ended, []
        starts_seen = None if memory is None else np.empty((length + 1, self.num_envs), dtype=bool)
        for step in range(length):
            if first is not None:
                first.add(raw[~ended])
            seen[step] = observations = self.normalized(raw)
            if raw_seen is not None:
                raw_seen[step] = raw
            if starts_seen is not None:
                starts_seen[step] = starts
            outputs = self.forward(observations, starts=starts, masks=masks)
            actions[step] = drawn = distribution.sample(outputs, noise[step])
            accepted = distribution.to_environment(drawn)
            new, rewards[step], terminated[step], truncated[step], infos = self.environments.step(accepted)
            raw = observation_array(self.space, new)
            starts, ended = ended, terminated[step] | truncated[step]
            if masks is not None:
                masks_seen.append(masks)
                masks = valid_actions(self.environments, infos, self.policy, ended=ended)
            if clipped is not None:
                clipped += np.count_nonzero(accepted.reshape(drawn.shape) != drawn)
        seen[length] = self.normalized(raw)
        if first is not None:
            first.finish()
        if raw_seen is not None:
            raw_seen[length] = raw
        if starts_seen is not None:
            starts_seen[length] = starts
        # The step after an end only resets; `ended` says so of the previous rollout's last step.
        mask = ~np.concatenate([self.ended[None], (terminated | truncated)[:-1]])
        self.observations, self.action_masks, self.starts, self.ended = raw, masks, starts, ended
        return Steps(
            observations=seen.swapaxes(0, 1),
            raw_observations=None if raw_seen is None else raw_seen.swapaxes(0, 1),
            actions=actions.swapaxes(0, 1),
            rewards=rewards.T,
            terminated=terminated.T,
            truncated=truncated.T,
            mask=mask.T,
            action_masks=np.stack(masks_seen, axis=1) if masks_seen else None,
            starts=None if starts_seen is None else starts_seen.T,
            memory=memory,
            clipped_actions=None if clipped is None else float(clipped / actions.size),
        )

    def _finished_episodes(self, steps: Steps) -> tuple[list[float], list[int]]:
        """Raw returns and lengths of the episodes that ended; carries the unfinished ones over."""
        returns, lengths = [], []
        sums, counts = np.cumsum(steps.rewards * steps.mask, axis=1, dtype=np.float64), np.cumsum(steps.mask, axis=1)
        before_sum, before_count = -self.episode_returns, -self.episode_lengths
        for row, step in np.argwhere(steps.terminated | steps.truncated):
            returns.append(float(sums[row, step] - before_sum[row]))
            lengths.append(int(counts[row, step] - before_count[row]))
            before_sum[row], before_count[row] = sums[row, step], counts[row, step]
        self.episode_returns, self.episode_lengths = sums[:, -1] - before_sum, counts[:, -1] - before_count
        return returns, lengths

    def state_dict(self) -> dict[str, Any]:
        """With the running episodes, where their environments can be described."""
        return {
            **super().state_dict(),
            "environments": snapshot(self.environments),
            "observations": torch.from_numpy(self.observations.copy()),
            "ended": torch.from_numpy(self.ended.copy()),
            "starts": torch.from_numpy(self.starts.copy()),
            "action_masks": None if self.action_masks is None else torch.from_numpy(self.action_masks.copy()),
            "memory": None if self.forward.memory is None else torch.from_numpy(self.forward.memory.copy()),
            "episode_returns": torch.from_numpy(self.episode_returns.copy()),
            "episode_lengths": torch.from_numpy(self.episode_lengths.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the very same episodes; where they could not be saved, start new ones and say so."""
        super().load_state_dict(state)
        if state["environments"] is None:
            warnings.warn(
                "these environments keep their state where it cannot be saved: the resumed run starts new episodes, "
                "so it does not equal the uninterrupted one",
                stacklevel=2,
            )
            self._reset()
            return
        restore(self.environments, state["environments"])
        for name in ("observations", "ended", "starts", "episode_returns", "episode_lengths"):
            setattr(self, name, state[name].numpy().copy())
        self.action_masks = None if state["action_masks"] is None else state["action_masks"].numpy().copy()
        self.forward.memory = None if state["memory"] is None else state["memory"].numpy().copy()


def _numpy_dtype(distribution: Any) -> type:
    return np.int64 if distribution.action_dtype == torch.int64 else np.float32
