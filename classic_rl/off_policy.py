"""The loop of off-policy learning: act, store, and learn from what is stored.

    each step of the environments:  act -> step -> store (reset steps of NEXT_STEP autoreset masked)
    every `train_every` env steps:  `updates_per_train` gradient updates

An agent (`classic_rl.dqn` and others) brings its replay and its update; the loop is one for all.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from pydantic import Field
from torch import Tensor

from classic_rl.environments import EnvironmentConfig, make_environments
from classic_rl.replay import ReplayBuffer
from classic_rl.snapshots import restore, snapshot
from classic_rl.spaces import flatten_observations, is_image, observation_size
from rlhf.config import Config
from rlhf.errors import ConfigError, TrainingError
from rlhf.training.run import Run


class OffPolicySchedule(Config):
    """How many steps are made, and how many updates per step. Steps are counted over all environments together."""

    total_steps: int = Field(ge=1)
    """Environment steps of the whole run; steps that only reset are not counted."""
    start_steps: int = Field(1000, ge=0)
    """Steps of random actions; training starts after them."""
    train_every: int = Field(1, ge=1)
    """Steps between trainings; those due before start_steps are left out."""
    updates_per_train: int | None = Field(1, ge=1)
    """Gradient updates per training; null makes one per step, so train_every of them."""
    steps_per_iteration: int = Field(1000, ge=1)
    """Steps between lines of metrics; run.evaluate_every and run.checkpoint_every count these."""

    @property
    def iterations(self) -> int:
        """Of the run."""
        return math.ceil(self.total_steps / self.steps_per_iteration)


class Agent(Protocol):
    """What the loop needs of an algorithm."""

    replay: ReplayBuffer

    def act(self, observations: np.ndarray, *, env_steps: int, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Return exploring actions [N, ...] as the replay stores them."""
        ...

    def greedy(self, observations: np.ndarray, *, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Return deterministic actions [N, ...], for evaluation and prediction."""
        ...

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Turn stored actions into what the environment accepts."""
        ...

    def update(self, *, env_steps: int) -> dict[str, Any]:
        """Make one gradient update; returns numbers or tensors of one element, which the loop averages."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimizer, replay, generators, counters: everything that going on exactly needs."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        ...


def learn_off_policy(
    agent: Agent, environment: EnvironmentConfig, schedule: OffPolicySchedule, run: Run
) -> dict[str, float]:
    """Act, store, learn, record, until the schedule's steps are made.

    Args:
        agent: Acts and learns.
        environment: Where.
        schedule: How long and how often.
        run: Where everything is written, made with `iterations=schedule.iterations`; with `run.resume` the loop goes on
            exactly where the run stopped, in the same episodes where the environments can be saved.

    Returns:
        The metrics of summary.json.

    Raises:
        TrainingError: A number that is not finite, with the iteration and the last good checkpoint.
    """
    player = Player(agent, environment, schedule, seed=run.config.seed)
    run.track(agent=agent, player=player)
    try:
        for iteration in run.iterations():
            metrics = player.play_until(min(iteration * schedule.steps_per_iteration, schedule.total_steps))
            _require_finite(metrics, iteration, run)
            run.finish_iteration(iteration, None, metrics)
    except BaseException:
        run.stopped()
        raise
    finally:
        player.environments.close()
    return run.finish()


def _require_finite(metrics: dict[str, float], iteration: int, run: Run) -> None:
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise TrainingError(
            f"not finite: {', '.join(broken)}",
            where=f"iteration {iteration}",
            remedy=f"The last good checkpoint is {run.latest_checkpoint or 'none'}. Lower the learning rate, or set a "
            "gradient norm to clip at.",
        )


class Player:
    """Steps the environments, stores what happened and trains when it is due.

    Args:
        agent: Acts and learns.
        environment: Which environments to make.
        schedule: How often to train.
        seed: Of the environments.

    Raises:
        ConfigError: The environments cannot be made, or are to be normalized.
    """

    _EPISODES = ("observations", "action_masks", "ended", "episode_returns", "episode_lengths")

    def __init__(
        self, agent: Agent, environment: EnvironmentConfig, schedule: OffPolicySchedule, *, seed: int = 0
    ) -> None:
        refuse_normalization(environment)
        self.agent, self.schedule, self.seed = agent, schedule, seed
        self.environments = make_environments(environment, images=True)
        self.space, self.num_envs = self.environments.single_observation_space, environment.num_envs
        self.env_steps, self.updates, self._since_training = 0, 0, 0
        self.recent_returns: deque[float] = deque(maxlen=100)
        self._reset(seed)

    def _reset(self, seed: int) -> None:
        new, infos = start(self.environments, seed)
        self.observations = observation_array(self.space, new)
        self.action_masks = action_masks_of(self.environments, infos)
        self.ended = np.zeros(self.num_envs, dtype=bool)
        self.episode_returns, self.episode_lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)

    def play_until(self, env_steps: int) -> dict[str, float]:
        """Go on until `env_steps` steps are made in all; returns the metrics of these steps."""
        before, updates = self.env_steps, self.updates
        returns: list[float] = []
        lengths: list[int] = []
        sums: dict[str, Any] = {}
        while self.env_steps < env_steps:
            self._step(returns, lengths)
            while self._since_training >= self.schedule.train_every:
                self._since_training -= self.schedule.train_every
                if self.env_steps > self.schedule.start_steps:
                    self._train(sums)
        self.recent_returns.extend(returns)
        metrics = {name: float(total) / max(1, self.updates - updates) for name, total in sums.items()}
        return metrics | self._episode_metrics(returns, lengths, self.env_steps - before)

    def _step(self, returns: list[float], lengths: list[int]) -> None:
        """One step of every environment."""
        observations, masks, mask = self.observations, self.action_masks, ~self.ended
        actions = self.agent.act(observations, env_steps=self.env_steps, action_masks=masks)
        new, rewards, terminated, truncated, infos = self.environments.step(self.agent.to_environment(actions))
        self.observations = observation_array(self.space, new)
        if masks is not None:
            self.action_masks = action_masks_of(self.environments, infos)
        self.agent.replay.add(
            observations=observations,
            actions=actions,
            rewards=rewards,
            next_observations=self.observations,
            terminated=terminated,
            truncated=truncated,
            mask=mask,
            action_masks=masks,
            next_action_masks=self.action_masks,
        )
        made = int(np.count_nonzero(mask))
        self.env_steps += made
        self._since_training += made
        self.episode_returns += rewards  # 0 on reset steps
        self.episode_lengths += mask
        self.ended = terminated | truncated
        if np.count_nonzero(self.ended):
            returns.extend(self.episode_returns[self.ended].tolist())
            lengths.extend(self.episode_lengths[self.ended].tolist())
            self.episode_returns[self.ended], self.episode_lengths[self.ended] = 0, 0

    def _train(self, sums: dict[str, Any]) -> None:
        count = self.schedule.updates_per_train or self.schedule.train_every
        for _ in range(count):
            for name, value in self.agent.update(env_steps=self.env_steps).items():
                sums[name] = sums.get(name, 0.0) + value
        self.updates += count

    def _episode_metrics(self, returns: list[float], lengths: list[int], env_steps: int) -> dict[str, float]:
        metrics = {
            "rollout/episodes": float(len(returns)),
            "rollout/env_steps": float(env_steps),
            "rollout/total_env_steps": float(self.env_steps),
            "updates": float(self.updates),
        }
        if returns:
            metrics["rollout/return_mean"] = float(np.mean(returns))
            metrics["rollout/length_mean"] = float(np.mean(lengths))
        if self.recent_returns:
            metrics["rollout/return_mean_100"] = sum(self.recent_returns) / len(self.recent_returns)
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the running episodes where their environments can be described."""
        return {
            "env_steps": self.env_steps,
            "updates": self.updates,
            "since_training": self._since_training,
            "recent_returns": list(self.recent_returns),
            "environments": snapshot(self.environments),
            **{name: _copied(getattr(self, name)) for name in self._EPISODES},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in the very same episodes; where they could not be saved, start new ones and say so.

        The agent's replay must have been restored before.
        """
        self.env_steps, self.updates, self._since_training = (
            state[name] for name in ("env_steps", "updates", "since_training")
        )
        self.recent_returns = deque(state["recent_returns"], maxlen=100)
        if state["environments"] is None:
            warnings.warn(
                "these environments keep their state where it cannot be saved: the resumed run starts new episodes, "
                "so it does not equal the uninterrupted one",
                stacklevel=2,
            )
            self.agent.replay.cut()
            self._reset(self.seed + self.env_steps)
            return
        restore(self.environments, state["environments"])
        for name in self._EPISODES:
            setattr(self, name, _copied(state[name]))


def _copied(value: np.ndarray | None) -> np.ndarray | None:
    return None if value is None else value.copy()


# --- environments -----------------------------------------------------------------------------------------------------


def refuse_normalization(environment: EnvironmentConfig) -> None:
    """Raise ConfigError where observations or rewards are to be normalized.

    Statistics that move would change the meaning of what is already stored.
    """
    for name in ("normalize_observations", "normalize_rewards"):
        if getattr(environment, name):
            raise ConfigError(
                "off-policy agents learn from raw observations and rewards",
                where=f"environment.{name}",
                got=True,
                expected="false",
                remedy="Wrap the environment with fixed scales where it needs them.",
            )


def start(environments: VectorEnv, seed: int) -> tuple[Any, dict[str, Any]]:
    """Reset every environment, each with a seed of its own derived from `seed`."""
    match environments.unwrapped:
        case SyncVectorEnv() | AsyncVectorEnv():
            seeds = np.random.SeedSequence(seed).generate_state(environments.num_envs)
            return environments.reset(seed=[int(value) for value in seeds])
    return environments.reset(seed=seed)


def observation_form(space: spaces.Space) -> tuple[tuple[int, ...], Any]:
    """Return shape and dtype of one observation as it is stored: images as uint8, everything else as float32 vectors.

    Raises:
        ConfigError: The space is none that networks here can read.
    """
    if is_image(space):
        return tuple(space.shape or ()), np.uint8
    return (observation_size(space),), np.float32


def observation_array(space: spaces.Space, observations: Any) -> np.ndarray:
    """Turn observations of a vector environment into the stored form, [N, *shape]."""
    if is_image(space):
        return np.asarray(observations).astype(np.uint8)
    return flatten_observations(space, observations)


def action_masks_of(
    environments: VectorEnv, infos: dict[str, Any], *, ended: np.ndarray | None = None
) -> np.ndarray | None:
    """Return the valid actions [N, A] bool of the present observations, None where the environment tells none.

    They come as `info["action_mask"]` of every reset and step, or from a method `action_masks()` of the environment
    (sb3-contrib's convention). Where an episode has `ended` [N] everything is valid: nothing is done there.

    Raises:
        ConfigError: An observation without any valid action.
    """
    masks = infos.get("action_mask")
    if masks is None:
        if not isinstance(environments.unwrapped, SyncVectorEnv) or not all(
            hasattr(single.unwrapped, "action_masks") for single in environments.unwrapped.envs
        ):
            return None
        masks = [single.unwrapped.action_masks() for single in environments.unwrapped.envs]
    masks = np.stack([np.asarray(mask) for mask in masks]).astype(bool)
    if ended is not None:
        masks[ended] = True
    if not masks.any(axis=1).all():
        raise ConfigError("an observation without any valid action", where="action_mask", got=str(masks.astype(int)))
    return masks


def to_tensor(observations: np.ndarray, *, device: torch.device | str = "cpu") -> Tensor:
    """Return observations as a tensor on a device; images stay bytes until the network scales them."""
    return torch.from_numpy(observations).to(device)
