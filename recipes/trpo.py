"""Train a gymnasium policy by steps of bounded KL: TRPO, the natural gradient, or TRPO with a dual variable."""

from __future__ import annotations

from pydantic import Field

from classic_rl.collector import CollectSteps, Processes, StepCollector
from classic_rl.environments import EnvironmentConfig, make_environments
from classic_rl.evaluation import EvaluationConfig, evaluate
from classic_rl.networks import NetworkConfig
from classic_rl.policy import ActorCritic
from classic_rl.saving import save
from classic_rl.threads import limit_threads
from classic_rl.trust_region import Trpo, TrustRegion, TrustRegionLearner
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.distributed import make_accelerator
from rlhf.training.loop import optimize_policy
from rlhf.training.run import Run, RunConfig


class TrpoConfig(Config):
    """A run: an environment, a trust-region method, and how much of both."""

    environment: EnvironmentConfig
    algorithm: TrustRegion = Trpo()
    collect: CollectSteps = CollectSteps(steps=256)
    iterations: int = Field(ge=1)
    """Rollouts; each is followed by one policy step and the critic's regression."""
    network: NetworkConfig = NetworkConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    threads: int = Field(1, ge=1)
    """Of torch and NumPy; more than one slows small networks down."""
    run: RunConfig = RunConfig()


def main(config: TrpoConfig) -> dict[str, float]:
    """Train, evaluate greedily, save the policy to `<run directory>/policy`."""
    limit_threads(config.threads)
    accelerator = make_accelerator()
    probe = make_environments(config.environment, num_envs=1)
    policy = ActorCritic(
        probe.single_observation_space, probe.single_action_space, network=config.network, seed=config.run.seed
    )
    learner = TrustRegionLearner(policy, config.algorithm, accelerator=accelerator, seed=config.run.seed)
    processes = Processes(count=accelerator.num_processes, index=accelerator.process_index, reduce=learner.reduce)
    collector = StepCollector(
        config.collect, policy, config.environment, learner.algorithm, seed=config.run.seed, processes=processes
    )
    run = Run(config.run, resolved=config, iterations=config.iterations, accelerator=accelerator, recipe="trpo")
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


CONFIG = TrpoConfig

if __name__ == "__main__":
    launch(__file__)
