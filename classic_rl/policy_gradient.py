"""The plain policy gradients under one face: REINFORCE's forms, off-policy gradients, the Q actor-critic."""

from __future__ import annotations

import time
from typing import Annotated, assert_never

from accelerate import Accelerator
from pydantic import Field

from classic_rl.actor_critic import QActorCritic, QActorCriticLearner, TransitionCollector
from classic_rl.collector import CollectSteps, Processes
from classic_rl.environments import EnvironmentConfig
from classic_rl.episodes import CollectEpisodes, EpisodeCollector
from classic_rl.off_policy_gradient import OffPolicyGradient, OffPolicyLearner
from classic_rl.policy import ActorCritic
from classic_rl.reinforce import Reinforce, ReinforceLearner
from classic_rl.rollout_learner import RolloutLearner
from rlhf.errors import ConfigError
from rlhf.training.run import Run
from rlhf.training.update_config import UpdateConfig

PolicyGradientMethod = Annotated[Reinforce | OffPolicyGradient | QActorCritic, Field(discriminator="type")]
Collect = Annotated[CollectSteps | CollectEpisodes, Field(discriminator="type")]


def needs_critic(method: PolicyGradientMethod) -> bool:
    """Whether the policy must predict V(s)."""
    return isinstance(method, Reinforce) and method.baseline == "value"


def make_learner(
    policy: ActorCritic,
    method: PolicyGradientMethod,
    update: UpdateConfig,
    *,
    accelerator: Accelerator | None = None,
    seed: int = 0,
) -> ReinforceLearner | OffPolicyLearner | QActorCriticLearner:
    """Return the learner of a method."""
    match method:
        case Reinforce():
            return ReinforceLearner(policy, method, update, accelerator=accelerator, seed=seed)
        case OffPolicyGradient():
            return OffPolicyLearner(policy, method, update, accelerator=accelerator, seed=seed)
        case QActorCritic():
            return QActorCriticLearner(policy, method, update, accelerator=accelerator, seed=seed)
        case _:
            assert_never(method)


def make_rollout_collector(
    learner: RolloutLearner,
    policy: ActorCritic,
    environment: EnvironmentConfig,
    *,
    collect: CollectSteps | CollectEpisodes,
    seed: int = 0,
    processes: Processes | None = None,
) -> EpisodeCollector | TransitionCollector:
    """Return what gathers the learner's rollouts: whole episodes, or single steps for the Q actor-critic.

    Raises:
        ConfigError: Steps where episodes are needed, or the other way round.
    """
    wanted = CollectSteps if isinstance(learner, QActorCriticLearner) else CollectEpisodes
    if not isinstance(collect, wanted):
        raise ConfigError(
            "the method learns from " + ("single steps" if wanted is CollectSteps else "whole episodes"),
            where="collect.type",
            got=collect.type,
            expected="steps" if wanted is CollectSteps else "episodes",
        )
    if isinstance(collect, CollectSteps):
        return TransitionCollector(collect, policy, environment, learner.algorithm, seed=seed, processes=processes)
    return EpisodeCollector(collect, policy, environment, learner.algorithm, seed=seed, processes=processes)


def learn_from_rollouts(
    collector: EpisodeCollector | TransitionCollector, learner: RolloutLearner, run: Run
) -> dict[str, float]:
    """Collect, learn, record, until the run's iterations are done; the small sibling of `optimize_policy`.

    Returns:
        The metrics of summary.json.
    """
    run.track(collector=collector, learner=learner)
    try:
        for iteration in run.iterations():
            started = time.monotonic()
            rollout = collector.collect()
            collected = time.monotonic()
            metrics = learner.update(rollout, progress=run.progress(iteration), progress_step=1 / run.total)
            metrics["time/collect_seconds"] = collected - started
            metrics["time/update_seconds"] = time.monotonic() - collected
            run.finish_iteration(iteration, rollout, metrics)
    except BaseException:
        run.stopped()
        raise
    return run.finish()
