"""Train a gymnasium policy by a plain policy gradient: REINFORCE's five forms, off-policy, or a Q actor-critic."""

from __future__ import annotations

from pydantic import Field

from classic_rl.collector import Processes
from classic_rl.environments import EnvironmentConfig, make_environments
from classic_rl.episodes import CollectEpisodes
from classic_rl.evaluation import EvaluationConfig, evaluate
from classic_rl.networks import NetworkConfig
from classic_rl.policy import ActorCritic
from classic_rl.policy_gradient import (
    Collect,
    PolicyGradientMethod,
    learn_from_rollouts,
    make_learner,
    make_rollout_collector,
    needs_critic,
)
from classic_rl.reinforce import Reinforce
from classic_rl.saving import save
from classic_rl.threads import limit_threads
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.distributed import make_accelerator
from rlhf.training.run import Run, RunConfig
from rlhf.training.update_config import UpdateConfig


class PolicyGradientConfig(Config):
    """A run: an environment, a form of the policy gradient, and how much of both."""

    environment: EnvironmentConfig
    algorithm: PolicyGradientMethod = Reinforce()
    collect: Collect = CollectEpisodes()
    iterations: int = Field(ge=1)
    """Rollouts; each is followed by one update."""
    network: NetworkConfig = NetworkConfig()
    """hidden_sizes [] is a policy linear in the observation: softmax-linear, or Gaussian-linear for Box actions."""
    update: UpdateConfig = UpdateConfig(flatten_parameters=True)
    evaluation: EvaluationConfig = EvaluationConfig()
    threads: int = Field(1, ge=1)
    """Of torch and NumPy; more than one slows small networks down."""
    run: RunConfig = RunConfig()


def main(config: PolicyGradientConfig) -> dict[str, float]:
    """Train, evaluate greedily, save the policy to `<run directory>/policy`."""
    limit_threads(config.threads)
    accelerator = make_accelerator()
    probe = make_environments(config.environment, num_envs=1)
    policy = ActorCritic(
        probe.single_observation_space,
        probe.single_action_space,
        network=config.network,
        critic=needs_critic(config.algorithm),
        seed=config.run.seed,
    )
    learner = make_learner(policy, config.algorithm, config.update, accelerator=accelerator, seed=config.run.seed)
    processes = Processes(count=accelerator.num_processes, index=accelerator.process_index, reduce=learner.reduce)
    collector = make_rollout_collector(
        learner, policy, config.environment, collect=config.collect, seed=config.run.seed, processes=processes
    )
    run = Run(
        config.run, resolved=config, iterations=config.iterations, accelerator=accelerator, recipe="policy_gradient"
    )
    run.evaluate = lambda: evaluate(
        policy,
        config.environment,
        config.evaluation,
        normalizer=collector.observation_normalizer,
        videos=run.directory / "videos" if accelerator.is_main_process else None,
    )
    metrics = learn_from_rollouts(collector, learner, run)
    if accelerator.is_main_process:
        save(run.directory / "policy", policy, normalizer=collector.observation_normalizer)
    return metrics


CONFIG = PolicyGradientConfig

if __name__ == "__main__":
    launch(__file__)
