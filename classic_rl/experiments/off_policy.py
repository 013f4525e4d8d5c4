"""One off-policy training as a function of JSON settings: the cell of the off-policy experiments.

Agents and the loop's steps are those of `rlhf run off_policy`; only the run directory is replaced by numbers kept in
memory. `rlhf run rainbow` and `rlhf run overestimation` are grids of these.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from pydantic import Field

from classic_rl.agents import AgentConfig, make_agent
from classic_rl.environments import EnvironmentConfig, make_environments
from classic_rl.evaluation import EvaluationConfig, play_greedily
from classic_rl.off_policy import OffPolicySchedule, Player, action_masks_of, observation_array, start
from classic_rl.threads import limit_threads
from rlhf.config import Config, validate

TAIL = 0.01
"""A realised return counts where what is not seen of it weighs less than this: gamma^k < TAIL."""


class OffPolicyTraining(Config):
    """What one cell trains: the settings of `rlhf run off_policy`."""

    environment: EnvironmentConfig
    agent: AgentConfig
    schedule: OffPolicySchedule
    evaluation: EvaluationConfig = EvaluationConfig()
    measure_values: bool = False
    """Compare at every evaluation the predicted values of greedy episodes with their realised discounted returns."""
    seed: int = Field(0, ge=0)
    """Of everything random."""


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train once.

    Args:
        settings: Of `OffPolicyTraining`.

    Returns:
        Per iteration "env_steps", "greedy" (mean return of greedy episodes) and "training" (mean return of the last 100
        training episodes, null before the first); with `measure_values` "predicted" and "realised"; "seconds".
    """
    started = time.monotonic()
    limit_threads(1)
    config = validate(OffPolicyTraining, settings, where="the cell's settings")
    schedule = config.schedule
    agent = make_agent(config.agent, environment=config.environment, schedule=schedule, seed=config.seed)
    player = Player(agent, config.environment, schedule, seed=config.seed)
    names = ["env_steps", "greedy", "training", *(["predicted", "realised"] if config.measure_values else [])]
    record: dict[str, Any] = {name: [] for name in names}
    for iteration in range(1, schedule.iterations + 1):
        metrics = player.play_until(min(iteration * schedule.steps_per_iteration, schedule.total_steps))
        returns, _ = play_greedily(agent, config.environment, config.evaluation)
        record["env_steps"].append(player.env_steps)
        record["greedy"].append(float(returns.mean()))
        record["training"].append(metrics.get("rollout/return_mean_100"))
        if config.measure_values:
            predicted, realised = values_of_greedy_play(
                agent, config.environment, config.evaluation, discount=config.agent.discount
            )
            record["predicted"].append(predicted)
            record["realised"].append(realised)
    player.environments.close()
    return {**record, "seconds": time.monotonic() - started}


def values_of_greedy_play(
    agent: Any, environment: EnvironmentConfig, config: EvaluationConfig, *, discount: float
) -> tuple[float, float]:
    """Return the mean of max_a Q(s, a), and of the discounted return that greedy play realises from the same states.

    Every state counts whose return is known: its episode terminated, or so many steps follow that the rest weighs less
    than `TAIL`. Source of the comparison: van Hasselt et al. 2016, figure 3, https://arxiv.org/abs/1509.06461 (whose
    text prints argmax_a Q where the value max_a Q is meant).
    """
    predicted, realised = [], []
    for values, rewards, terminated in _greedy_episodes(agent, environment, config):
        returns = np.zeros(len(rewards) + 1)
        for step in reversed(range(len(rewards))):
            returns[step] = rewards[step] + discount * returns[step + 1]
        unseen = 0 if terminated or discount == 0 else math.ceil(math.log(TAIL) / math.log(discount))
        known = len(rewards) - unseen
        if known > 0:
            predicted.append(values[:known])
            realised.append(returns[:known])
    if not predicted:
        return math.nan, math.nan
    return float(np.concatenate(predicted).mean()), float(np.concatenate(realised).mean())


def _greedy_episodes(
    agent: Any, environment: EnvironmentConfig, config: EvaluationConfig
) -> list[tuple[np.ndarray, np.ndarray, bool]]:
    """Per episode: max_a Q at each step, the rewards as the agent learns them, and whether it terminated."""
    environments = make_environments(environment, num_envs=config.episodes, images=True)
    new, infos = start(environments, config.seed)
    alive = np.ones(config.episodes, dtype=bool)
    ends = np.zeros(config.episodes, dtype=bool)
    values: list[np.ndarray] = []
    rewards: list[np.ndarray] = []
    lengths = np.zeros(config.episodes, dtype=np.int64)
    while alive.any() and (config.max_steps is None or len(rewards) < config.max_steps):
        observations = observation_array(environments.single_observation_space, new)
        masks = action_masks_of(environments, infos)
        q = agent.policy.action_values(observations)
        values.append((q if masks is None else np.where(masks, q, -np.inf)).max(axis=1))
        actions = agent.greedy(observations, **({} if masks is None else {"action_masks": masks}))
        new, reward, terminated, truncated, infos = environments.step(agent.to_environment(actions))
        rewards.append(np.sign(reward) if agent.config.clip_rewards else np.asarray(reward, dtype=np.float64))
        lengths += alive
        ends |= terminated & alive
        alive &= ~(terminated | truncated)
    environments.close()
    all_values, all_rewards = np.stack(values, axis=1), np.stack(rewards, axis=1)
    return [
        (all_values[row, :length], all_rewards[row, :length], bool(ends[row])) for row, length in enumerate(lengths)
    ]
