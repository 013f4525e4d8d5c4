"""Reinforcement learning of a language model in a text environment, from settings to a saved folder.

The multi-turn twin of `rlhf.lm.fine_tuning`: the same loop, learner, doctor and watch, another collector.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.config import Config
from rlhf.core.algorithm import AlgorithmConfig
from rlhf.core.presets import AlgorithmChoice
from rlhf.errors import ConfigError
from rlhf.lm.actors import make_actors
from rlhf.lm.critic import CriticConfig
from rlhf.lm.doctor import Doctor, DoctorConfig
from rlhf.lm.episode_collector import EpisodeCollector, EpisodeCollectorConfig
from rlhf.lm.episode_evaluation import EpisodeEvaluationConfig, make_episode_evaluation
from rlhf.lm.generator_config import GeneratorConfig, TransformersGeneratorConfig
from rlhf.lm.loading import ModelConfig, resolve_precision
from rlhf.lm.players import prepare_player
from rlhf.lm.sft import SftConfig
from rlhf.lm.text_environments import EnvironmentConfig, make_factory
from rlhf.lm.watch import Watch, WatchConfig
from rlhf.training.distributed import make_accelerator
from rlhf.training.learner import Learner
from rlhf.training.loop import Observer, optimize_policy
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig
from rlhf.training.update_config import UpdateConfig


class EpisodeTrainingConfig(Config):
    """A run: a model, an environment that talks, an algorithm."""

    model: ModelConfig
    critic: CriticConfig = CriticConfig()
    """Where the critic starts, and its warm-up."""
    environment: EnvironmentConfig
    sft: SftConfig | None = None
    """Imitate the environment's demonstrations first; null starts from the model as it is."""
    algorithm: AlgorithmChoice = Field("ppo_rlhf", validate_default=True)
    collector: EpisodeCollectorConfig = EpisodeCollectorConfig()
    generator: GeneratorConfig = TransformersGeneratorConfig()
    """What writes the turns: the model itself, or vLLM."""
    update: UpdateConfig = UpdateConfig(learning_rate=1e-6)
    iterations: int = Field(ge=1)
    """Rollouts; each is followed by one update."""
    evaluation: EpisodeEvaluationConfig = EpisodeEvaluationConfig()
    doctor: DoctorConfig = DoctorConfig()
    """Checks before the first update."""
    watch: WatchConfig = WatchConfig()
    """Warnings on the way, and a KL budget that ends the run."""
    mixed_precision: Literal["no", "bf16", "auto"] | None = None
    """bf16 runs forwards in bfloat16, the trained weights stay as they are; auto does where the GPU has it; null takes
    the launcher's word."""
    run: RunConfig = RunConfig()


def train_on_episodes(config: EpisodeTrainingConfig, *, recipe: str) -> dict[str, float]:
    """Play, learn, evaluate, save the model to `<run directory>/model`.

    Args:
        config: The whole run.
        recipe: Name of the recipe, part of the default run directory.

    Returns:
        The metrics of summary.json.

    Raises:
        UserError: Settings, model or environment that cannot be used, before anything is trained.
    """
    _require_groups(config)
    accelerator = make_accelerator(mixed_precision=resolve_precision(config.mixed_precision))
    run = Run(config.run, resolved=config, iterations=config.iterations, accelerator=accelerator, recipe=recipe)
    factory = make_factory(config.environment)
    start, tokenizer = prepare_player(
        config.model, config.environment, factory, sft=config.sft, run=run, accelerator=accelerator
    )
    algorithm = config.algorithm.with_length(config.collector.max_episode_length)
    actors = make_actors(
        start,
        algorithm,
        temperature=config.collector.sampling.temperature,
        critic=config.critic.start,
        tokenizer=tokenizer,
        keep_reference=config.watch.kl_budget is not None,
        generator=config.generator,
        accelerator=accelerator,
        seed=config.run.seed,
    )
    learner = Learner(actors.policy, algorithm, config.update, accelerator=accelerator, seed=config.run.seed)
    collector = EpisodeCollector(
        factory,
        policy=actors.policy,
        generator=actors.generator,
        tokenizer=tokenizer,
        config=config.collector,
        algorithm=algorithm,
        reference=actors.reference,
        accelerator=accelerator,
        seed=config.run.seed,
    )
    run.evaluate = make_episode_evaluation(collector, config.evaluation)
    observers = _make_observers(config, algorithm, run=run, learner=learner, collector=collector)
    warmup = config.critic.warmup_iterations if algorithm.needs_critic else 0
    metrics = optimize_policy(collector, learner, run, observers=observers, critic_warmup=warmup)
    actors.save(run.directory / "model", accelerator)
    return metrics


def _make_observers(
    config: EpisodeTrainingConfig,
    algorithm: AlgorithmConfig,
    *,
    run: Run,
    learner: Learner,
    collector: EpisodeCollector,
) -> list[Observer]:
    """Who looks at the run; the evaluation is looked at too."""
    watch = Watch(config.watch, say=run.say, clips_tokens=algorithm.ratio == "token")
    run.track(watch=watch)
    assert run.evaluate is not None
    run.evaluate = watch.watching(run.evaluate)
    doctor = [Doctor(config.doctor, run=run, learner=learner, collector=collector)] if config.doctor.enabled else []
    return [watch, *doctor]


def _require_groups(config: EpisodeTrainingConfig) -> None:
    """Refuse a group algorithm without groups, before anything is loaded."""
    if config.algorithm.needs_groups and config.collector.group_size < 2:
        raise ConfigError(
            f"{config.algorithm.advantages.type} compares episodes that begin alike, and there is only one of each",
            where="collector.group_size",
            got=config.collector.group_size,
            expected="2 or more; 8 is usual",
        )
