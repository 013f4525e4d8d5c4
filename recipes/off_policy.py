"""Train a gymnasium agent off-policy: from replayed transitions, with any agent of `classic_rl`."""

from __future__ import annotations

from classic_rl.agents import AgentConfig, make_agent
from classic_rl.environments import EnvironmentConfig
from classic_rl.evaluation import EvaluationConfig, evaluate_agent
from classic_rl.off_policy import OffPolicySchedule, learn_off_policy
from classic_rl.saving import save_agent
from classic_rl.threads import limit_threads
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig


class OffPolicyConfig(Config):
    """A run: an environment, an agent, and how much of both."""

    environment: EnvironmentConfig
    agent: AgentConfig
    schedule: OffPolicySchedule
    evaluation: EvaluationConfig = EvaluationConfig()
    threads: int = 1
    """Of torch and NumPy; more than one slows small networks down."""
    run: RunConfig = RunConfig()


def main(config: OffPolicyConfig) -> dict[str, float]:
    """Train, evaluate greedily, save the policy to `<run directory>/policy`."""
    limit_threads(config.threads)
    agent = make_agent(config.agent, environment=config.environment, schedule=config.schedule, seed=config.run.seed)
    run = Run(config.run, resolved=config, iterations=config.schedule.iterations, recipe="off_policy")
    run.evaluate = lambda: evaluate_agent(agent, config.environment, config.evaluation, videos=run.directory / "videos")
    metrics = learn_off_policy(agent, config.environment, config.schedule, run)
    save_agent(run.directory / "policy", agent)
    return metrics


CONFIG = OffPolicyConfig

if __name__ == "__main__":
    launch(__file__)
