"""Train a gymnasium policy with any on-policy algorithm of the shared core: the twin of `ppo_rlhf` and `grpo`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from classic_rl.collector import CollectSteps, Processes
from classic_rl.environments import EnvironmentConfig, episode_limit, make_environments
from classic_rl.episodes import CollectEpisodes, make_collector
from classic_rl.evaluation import EvaluationConfig, evaluate
from classic_rl.networks import NetworkConfig
from classic_rl.policy import ActorCritic
from classic_rl.saving import save
from classic_rl.threads import limit_threads
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.core.presets import AlgorithmChoice
from rlhf.training.distributed import make_accelerator
from rlhf.training.learner import Learner
from rlhf.training.loop import optimize_policy
from rlhf.training.run import Run, RunConfig
from rlhf.training.update_config import UpdateConfig


class OnPolicyConfig(Config):
    """A run: an environment, an algorithm, and how much of both."""

    environment: EnvironmentConfig
    algorithm: AlgorithmChoice
    collect: Annotated[CollectSteps | CollectEpisodes, Field(discriminator="type")] = CollectSteps()
    iterations: int = Field(ge=1)
    """Rollouts; each is followed by one update."""
    network: NetworkConfig = NetworkConfig()
    update: UpdateConfig = UpdateConfig(flatten_parameters=True)
    evaluation: EvaluationConfig = EvaluationConfig()
    threads: int = Field(1, ge=1)
    """Of torch and NumPy; more than one slows small networks down."""
    run: RunConfig = RunConfig()


def main(config: OnPolicyConfig) -> dict[str, float]:
    """Train, evaluate greedily, save the policy to `<run directory>/policy`."""
    limit_threads(config.threads)
    accelerator = make_accelerator()
    probe = make_environments(config.environment, num_envs=1, images=True)
    policy = ActorCritic(
        probe.single_observation_space,
        probe.single_action_space,
        network=config.network,
        critic=config.algorithm.needs_critic,
        seed=config.run.seed,
    )
    algorithm = config.algorithm.with_length(episode_limit(probe) or 1)
    learner = Learner(policy, algorithm, config.update, accelerator=accelerator, seed=config.run.seed)
    processes = Processes(count=accelerator.num_processes, index=accelerator.process_index, reduce=learner.reduce)
    collector = make_collector(
        config.collect, policy, config.environment, algorithm, seed=config.run.seed, processes=processes
    )
    run = Run(config.run, resolved=config, iterations=config.iterations, accelerator=accelerator, recipe="on_policy")
    run.evaluate = lambda: evaluate(
        policy,
        config.environment,
        config.evaluation,
        normalizer=collector.observation_normalizer,
        videos=run.directory / "videos" if accelerator.is_main_process else None,
    )
    metrics = optimize_policy(collector, learner, run)
    if accelerator.is_main_process:
        save(run.directory / "policy", policy, normalizer=collector.observation_normalizer)
    return metrics


CONFIG = OnPolicyConfig

if __name__ == "__main__":
    launch(__file__)
