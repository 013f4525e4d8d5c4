"""Train a language model in a text environment: many turns an episode, a reward for each, the same loop as CartPole."""

from __future__ import annotations

from pydantic import Field

from rlhf.cli import launch
from rlhf.config import Config
from rlhf.core.presets import AlgorithmChoice
from rlhf.lm.actors import make_actors
from rlhf.lm.critic import CriticConfig
from rlhf.lm.episode_collector import EpisodeCollector, EpisodeCollectorConfig
from rlhf.lm.episode_evaluation import EpisodeEvaluationConfig, make_episode_evaluation
from rlhf.lm.loading import ModelConfig
from rlhf.lm.players import prepare_player
from rlhf.lm.sft import SftConfig
from rlhf.lm.text_environments import EnvironmentConfig, make_factory
from rlhf.lm.watch import Watch, WatchConfig
from rlhf.training.distributed import make_accelerator
from rlhf.training.learner import Learner
from rlhf.training.loop import optimize_policy
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig
from rlhf.training.update_config import UpdateConfig


class TextEnvironmentConfig(Config):
    """A run: a model, an environment that talks, an algorithm."""

    model: ModelConfig
    critic: CriticConfig = CriticConfig()
    environment: EnvironmentConfig
    sft: SftConfig | None = None
    """Imitate the environment's demonstrations first; null starts from the model as it is."""
    algorithm: AlgorithmChoice = Field("ppo_rlhf", validate_default=True)
    collector: EpisodeCollectorConfig = EpisodeCollectorConfig()
    update: UpdateConfig = UpdateConfig(learning_rate=1e-6)
    iterations: int = Field(ge=1)
    """Rollouts; each is followed by one update."""
    evaluation: EpisodeEvaluationConfig = EpisodeEvaluationConfig()
    watch: WatchConfig = WatchConfig()
    run: RunConfig = RunConfig()


def main(config: TextEnvironmentConfig) -> dict[str, float]:
    """Play, learn, evaluate, save the model to `<run directory>/model`."""
    accelerator = make_accelerator()
    run = Run(config.run, resolved=config, iterations=config.iterations, accelerator=accelerator)
    factory = make_factory(config.environment)
    start, tokenizer = prepare_player(
        config.model, config.environment, factory, sft=config.sft, run=run, accelerator=accelerator
    )
    algorithm = config.algorithm.with_length(config.collector.max_episode_length)
    temperature, reference = config.collector.sampling.temperature, config.watch.kl_budget is not None
    critic = config.critic.start
    actors = make_actors(
        start,
        algorithm,
        temperature=temperature,
        critic=critic,
        tokenizer=tokenizer,
        keep_reference=reference,
        accelerator=accelerator,
    )
    learner = Learner(actors.policy, algorithm, config.update, accelerator=accelerator, seed=config.run.seed)
    parts = {"policy": actors.policy, "generator": actors.generator, "reference": actors.reference}
    parts |= {"accelerator": accelerator, "seed": config.run.seed}
    collector = EpisodeCollector(factory, tokenizer=tokenizer, config=config.collector, **parts)
    watch = Watch(config.watch, say=run.say, clips_tokens=algorithm.ratio == "token")
    run.track(watch=watch)
    run.evaluate = watch.watching(make_episode_evaluation(collector, config.evaluation))
    warmup = config.critic.warmup_iterations if algorithm.needs_critic else 0
    metrics = optimize_policy(collector, learner, run, observers=[watch], critic_warmup=warmup)
    actors.save(run.directory / "model", accelerator)
    return metrics


CONFIG = TextEnvironmentConfig

if __name__ == "__main__":
    launch(__file__)
