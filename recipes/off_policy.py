"""Train a gymnasium agent off-policy: from replayed transitions, with any agent of `classic_rl`."""

from __future__ import annotations

from pydantic import Field

from classic_rl.agents import AgentConfig, make_agent
from classic_rl.environments import EnvironmentConfig
from classic_rl.evaluation import EvaluationConfig, evaluate_agent
from classic_rl.off_policy import OffPolicySchedule, learn_off_policy
from classic_rl.saliency import draw_game, require_streams
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
    saliency_images: int = Field(0, ge=0)
    """Observations of a greedy game for which a dueling network of images shows where it looks, in `saliency.png`."""
    threads: int = 1
    """Of torch and NumPy; more than one slows small networks down."""
    run: RunConfig = RunConfig()


def main(config: OffPolicyConfig) -> dict[str, float]:
    """Train, evaluate greedily, save the policy to `<run directory>/policy`."""
    limit_threads(config.threads)
    if config.saliency_images:
        require_streams(config.agent)
    agent = make_agent(config.agent, environment=config.environment, schedule=config.schedule, seed=config.run.seed)
    run = Run(config.run, resolved=config, iterations=config.schedule.iterations, recipe="off_policy")
    run.evaluate = lambda: evaluate_agent(agent, config.environment, config.evaluation, videos=run.directory / "videos")
    metrics = learn_off_policy(agent, config.environment, config.schedule, run)
    save_agent(run.directory / "policy", agent)
    if config.saliency_images:
        file, images = run.directory / "saliency.png", config.saliency_images
        draw_game(file, agent.policy, config.environment, config.evaluation, images=images)
    return metrics


CONFIG = OffPolicyConfig

if __name__ == "__main__":
    launch(__file__)
