"""One training as a function of JSON settings: the cell of the on-policy experiments.

The loop, the learner and the collectors are those of `rlhf run on_policy` and `rlhf run trpo`; only the run directory
is replaced by numbers kept in memory, because an experiment is hundreds of short runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Annotated, Any, Self, cast

import gymnasium
import numpy as np
import torch
from pydantic import Field, model_validator

from classic_rl.collector import CollectSteps
from classic_rl.divergence import describe, kl_from
from classic_rl.environments import EnvironmentConfig, episode_limit, make_environments
from classic_rl.episodes import CollectEpisodes, make_collector
from classic_rl.evaluation import EvaluationConfig, evaluate
from classic_rl.networks import NetworkConfig
from classic_rl.policy import ActorCritic
from classic_rl.randomization import RandomizationConfig
from classic_rl.threads import limit_threads
from classic_rl.trust_region import TrustRegion, TrustRegionLearner, shared_algorithm
from rlhf.config import Config, validate
from rlhf.core.presets import AlgorithmChoice
from rlhf.core.types import Experience, Rollout
from rlhf.errors import TrainingError
from rlhf.training.learner import Learner
from rlhf.training.loop import optimize_policy
from rlhf.training.run import Run
from rlhf.training.update_config import UpdateConfig

RATIO_RANGE = 0.2
"""PPO's clip range; how much of an update ends outside of it is recorded for every algorithm."""


class Training(Config):
    """What one cell trains: the settings of `rlhf run on_policy`, or of `rlhf run trpo` with `trust_region`."""

    environment: EnvironmentConfig
    algorithm: AlgorithmChoice | None = None
    trust_region: TrustRegion | None = None
    """Instead of `algorithm`."""
    collect: Annotated[CollectSteps | CollectEpisodes, Field(discriminator="type")] = CollectSteps()
    iterations: int = Field(ge=1)
    """Rollouts; each is followed by one update."""
    network: NetworkConfig = NetworkConfig()
    update: UpdateConfig = UpdateConfig(flatten_parameters=True)
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = Field(0, ge=0)
    """Of weights, environments, actions and shuffling."""
    worlds: dict[str, RandomizationConfig] = {}
    """Name -> a world that the trained policy is evaluated in besides; ranges of one value fix its parameters."""
    record: list[str] = []
    """Metrics kept per iteration besides the returns, such as `entropy`."""
    measure_distance: bool = False
    """Record per iteration how far the update moved the policy: see `Distance`."""
    ends_at_return: float | None = None
    """Training ends once the last 100 training episodes have this mean return; null spends all iterations."""

    @model_validator(mode="after")
    def _one_algorithm(self) -> Self:
        if (self.algorithm is None) == (self.trust_region is None):
            raise ValueError("give either algorithm or trust_region")
        return self


def train(settings: dict[str, Any]) -> dict[str, Any]:
    """Train once.

    Args:
        settings: Of `Training`.

    Returns:
        "env_steps" and "returns" per iteration (the mean return of the training episodes that ended in it, null where
        none did), "last_100" (mean return of the last 100 training episodes), "greedy" (mean return of the greedy
        evaluation), "worlds" {world: mean greedy return
        in it}, "recorded" {metric: [per iteration]}, "reached_at" (environment steps at which `ends_at_return`
        was reached, or null), "seconds"; with "diverged", the reason, where the loss or the gradient became infinite:
        training ends there and the numbers are those until then.
    """
    started = time.monotonic()
    limit_threads(1)
    config = validate(Training, settings, where="the cell's settings")
    learner, collector = _make(config)
    memory = _Memory(config.iterations, record=config.record)
    diverged = None
    observers: list[Any] = []
    if config.measure_distance:
        observers.append(Distance(learner.policy))
    if config.ends_at_return is not None:
        observers.append(_Solved(collector, config.ends_at_return))
    try:
        optimize_policy(collector, learner, cast(Run, memory), observers=observers)
    except TrainingError as error:
        diverged = str(error)
    normalizer = collector.observation_normalizer
    evaluation = evaluate(learner.policy, config.environment, config.evaluation, normalizer=normalizer)
    collector.close()
    return {
        "env_steps": memory.env_steps,
        "returns": memory.returns,
        "last_100": memory.last_100,
        "greedy": evaluation["return_mean"],
        "worlds": {name: _in_world(learner.policy, config, world, normalizer) for name, world in config.worlds.items()},
        "recorded": memory.recorded,
        "reached_at": memory.env_steps[-1] if memory.ended_because is not None else None,
        "seconds": time.monotonic() - started,
        **({} if diverged is None else {"diverged": diverged}),
    }


def _in_world(policy: ActorCritic, config: Training, world: RandomizationConfig, normalizer: Any) -> float:
    """Mean greedy return where the environment is as `world` says, whatever it was in training."""
    environment = config.environment.model_copy(update={"randomization": world})
    return evaluate(policy, environment, config.evaluation, normalizer=normalizer)["return_mean"]


def _make(config: Training) -> tuple[Any, Any]:
    """The learner and the collector."""
    probe = make_environments(config.environment, num_envs=1)
    algorithm = config.algorithm if config.algorithm is not None else shared_algorithm(cast(Any, config.trust_region))
    algorithm = algorithm.with_length(episode_limit(probe) or 1)
    policy = ActorCritic(
        probe.single_observation_space,
        probe.single_action_space,
        network=config.network,
        critic=algorithm.needs_critic,
        seed=config.seed,
    )
    probe.close()
    if config.trust_region is not None:
        learner = TrustRegionLearner(policy, config.trust_region, seed=config.seed)
    else:
        learner = Learner(policy, algorithm, config.update, seed=config.seed)
    return learner, make_collector(config.collect, policy, config.environment, algorithm, seed=config.seed)


def play_randomly(settings: dict[str, Any]) -> dict[str, Any]:
    """Play whole episodes with uniformly random actions: the 0 of normalised scores.

    Args:
        settings: "environment" (an id), "episodes", "seed".

    Returns:
        "mean" return and its standard error, "standard_error".
    """
    environment = gymnasium.make(settings["environment"])
    environment.action_space.seed(settings["seed"])
    returns = []
    for episode in range(settings["episodes"]):
        environment.reset(seed=settings["seed"] + episode)
        total, over = 0.0, False
        while not over:
            _, reward, terminated, truncated, _ = environment.step(environment.action_space.sample())
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    environment.close()
    return {"mean": float(np.mean(returns)), "standard_error": float(np.std(returns, ddof=1) / len(returns) ** 0.5)}


class Distance:
    """An observer of `optimize_policy` that measures every update on the states it learned from.

    It adds "distance/kl", the mean over states of the exact KL(old || new); "distance/ratio_max", the largest
    probability ratio of a taken action; "distance/ratio_outside", the share of actions whose ratio left [0.8, 1.2].
    Clipping does not hold ratios inside its range: it only takes away what would push them further out
    (Engstrom et al. 2020, https://arxiv.org/abs/2005.12729, figure 2).

    Args:
        policy: What learns.
    """

    def __init__(self, policy: ActorCritic) -> None:
        self.policy = policy

    @torch.no_grad()
    def before_update(self, iteration: int, rollout: Rollout, experience: Experience) -> str | None:
        """Keep the old distributions."""
        mask = rollout.action_mask
        self._observations, self._actions = rollout.inputs["observations"][mask], rollout.actions[mask]
        self._old_log_probs = rollout.old_log_probs[mask]
        self._old = describe(self.policy.distribution, self.policy.actor(self._observations))
        return None

    @torch.no_grad()
    def after_update(self, iteration: int, metrics: dict[str, float]) -> dict[str, float]:
        """Compare with the new ones."""
        outputs = self.policy.actor(self._observations)
        log_probs, _ = self.policy.distribution.log_probs_and_entropy(outputs, self._actions)
        ratio = torch.exp(log_probs - self._old_log_probs)
        return {
            "distance/kl": kl_from(self._old, self.policy.distribution, outputs).mean().item(),
            "distance/ratio_max": ratio.max().item(),
            "distance/ratio_outside": ((ratio - 1).abs() > RATIO_RANGE).float().mean().item(),
        }


class _Solved:
    """Ends a run once it has reached a return."""

    def __init__(self, collector: Any, threshold: float) -> None:
        self.collector, self.threshold = collector, threshold

    def before_update(self, iteration: int, rollout: Rollout, experience: Experience) -> str | None:
        recent = self.collector.recent_returns
        if len(recent) == recent.maxlen and sum(recent) / len(recent) >= self.threshold:
            return f"the last {len(recent)} episodes returned {self.threshold:g} or more on average"
        return None

    def after_update(self, iteration: int, metrics: dict[str, float]) -> dict[str, float]:
        return {}


class _Memory:
    """What `optimize_policy` needs of a `Run`, without a directory."""

    latest_checkpoint = None

    def __init__(self, total: int, *, record: list[str]) -> None:
        self.total, self._record = total, record
        self.env_steps: list[int] = []
        self.returns: list[float | None] = []
        self.recorded: dict[str, list[float | None]] = {name: [] for name in record}
        self.ended_because: str | None = None
        self._collector: Any = None

    @property
    def last_100(self) -> float:
        """Mean return of the last 100 training episodes; NaN before the first ended."""
        recent = self._collector.recent_returns
        return sum(recent) / len(recent) if recent else math.nan

    def track(self, *, collector: Any, **_: Any) -> None:
        self._collector = collector

    def iterations(self) -> Iterator[int]:
        yield from range(1, self.total + 1)

    def progress(self, iteration: int) -> float:
        return (iteration - 1) / self.total

    def finish_iteration(
        self, iteration: int, rollout: Rollout, metrics: dict[str, float], *, ends_because: str | None = None
    ) -> None:
        self.ended_because = ends_because
        self.env_steps.append(int(rollout.metrics["rollout/total_env_steps"]))
        self.returns.append(rollout.metrics.get("rollout/return_mean"))
        for name in self._record:
            self.recorded[name].append(metrics.get(name, rollout.metrics.get(name)))

    def stopped(self) -> None:
        """Nothing to leave in order."""

    def finish(self) -> dict[str, float]:
        return {}
