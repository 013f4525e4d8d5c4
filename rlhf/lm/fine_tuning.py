"""Reinforcement learning of a language model, from settings to a saved folder: what `grpo` and `ppo_rlhf` share.

The two recipes differ in their defaults only; which algorithm runs is a row of settings, not a class.
"""

from __future__ import annotations

from typing import Literal, Self

from accelerate import Accelerator
from pydantic import Field, model_validator

from rlhf.config import Config
from rlhf.core.algorithm import AlgorithmConfig
from rlhf.core.presets import AlgorithmChoice
from rlhf.lm.actors import Actors, make_actors, prepare_start, require_groups, share_backbone
from rlhf.lm.collector import PromptCollector
from rlhf.lm.collector_config import CollectorConfig
from rlhf.lm.critic import CriticConfig
from rlhf.lm.doctor import Doctor, DoctorConfig
from rlhf.lm.ema import EmaConfig, PolicyAverage, evaluate_both
from rlhf.lm.evaluation import EvaluationConfig, make_evaluation
from rlhf.lm.generator_config import GeneratorConfig, TransformersGeneratorConfig
from rlhf.lm.loading import ModelConfig, resolve_precision
from rlhf.lm.ptx import ImitationLoss, PtxConfig, make_imitation
from rlhf.lm.sft import SftConfig
from rlhf.lm.sources import (
    RewardConfig,
    SourceConfig,
    load_demonstration_sets,
    load_prompt_sets,
    make_reward,
    refuse_judge_of_a_task,
)
from rlhf.lm.watch import Watch, WatchConfig
from rlhf.training.distributed import make_accelerator
from rlhf.training.learner import Learner
from rlhf.training.loop import Observer, optimize_policy
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig
from rlhf.training.update_config import UpdateConfig


class FineTuningConfig(Config):
    """A run: a model, prompts, rewards, an algorithm."""

    model: ModelConfig
    critic: CriticConfig = CriticConfig()
    """Where the critic starts (`critic: head`, `copy`, `adapter` or a folder), and its warm-up."""
    prompts: SourceConfig
    sft: SftConfig | None = None
    """Fine-tune the model on the source's demonstrations first; null starts from the model as it is."""
    reward: RewardConfig | list[RewardConfig]
    """What is optimized; a reward model: `reward_models:RewardModelScorer.from_pretrained`."""
    gold: RewardConfig | None = None
    """A scorer that only evaluation looks at: where the reward rises and it falls, there is over-optimization."""
    algorithm: AlgorithmChoice
    collector: CollectorConfig = CollectorConfig()
    generator: GeneratorConfig = TransformersGeneratorConfig()
    """What writes the completions: the model itself, or vLLM."""
    update: UpdateConfig = UpdateConfig(learning_rate=1e-6)
    ptx: PtxConfig | None = None
    """Mix the language-modelling loss of given texts into every minibatch (PPO-ptx)."""
    ema: EmaConfig | None = None
    """Keep a moving average of the policy; saved to `model_ema`."""
    iterations: int = Field(ge=1)
    """Rollouts; each is followed by one update."""
    evaluation: EvaluationConfig = EvaluationConfig()
    doctor: DoctorConfig = DoctorConfig()
    """Checks before the first update."""
    watch: WatchConfig = WatchConfig()
    """Warnings on the way, and a KL budget that ends the run."""
    mixed_precision: Literal["no", "bf16", "auto"] | None = None
    """bf16 runs forwards in bfloat16, the trained weights stay as they are; auto does where the GPU has it; null takes
    the launcher's word."""
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _refuse_judge_of_other_records(self) -> Self:
        rewards = self.reward if isinstance(self.reward, list) else [self.reward]
        remedy = "set reward.function to one that judges yours"
        refuse_judge_of_a_task(self.prompts, rewards, remedy=remedy)
        if self.gold is not None:
            refuse_judge_of_a_task(self.prompts, [self.gold], remedy="set gold to null, or to a judge of yours")
        return self


def fine_tune(config: FineTuningConfig, *, recipe: str) -> dict[str, float]:
    """Train, evaluate, save the model to `<run directory>/model`.

    Args:
        config: The whole run.
        recipe: Name of the recipe, part of the default run directory.

    Returns:
        The metrics of summary.json.

    Raises:
        UserError: Settings, data, model or rewards that cannot be used, before anything is trained.
    """
    require_groups(config.algorithm, config.collector)
    accelerator = make_accelerator(mixed_precision=resolve_precision(config.mixed_precision))
    run = Run(config.run, resolved=config, iterations=config.iterations, accelerator=accelerator, recipe=recipe)
    prompts, held_out = load_prompt_sets(config.prompts)
    reward = make_reward(config.reward)
    start, tokenizer = prepare_start(
        config.model, config.prompts, sft=config.sft, folder=run.directory / "sft", run=run, accelerator=accelerator
    )
    algorithm = config.algorithm.with_length(config.collector.sampling.max_completion_length)
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
    share_backbone(reward, actors.policy)
    mixed = _make_mixed(config, actors, accelerator)
    if mixed is not None:
        run.track(ptx=mixed)
    learner = Learner(
        actors.policy, algorithm, config.update, accelerator=accelerator, seed=config.run.seed, mixed=mixed
    )
    collector = PromptCollector(
        prompts,
        policy=actors.policy,
        generator=actors.generator,
        tokenizer=tokenizer,
        reward=reward,
        config=config.collector,
        algorithm=algorithm,
        reference=actors.reference,
        accelerator=accelerator,
        seed=config.run.seed,
    )
    rewards = {"score": reward} | ({"gold": make_reward(config.gold)} if config.gold is not None else {})
    run.evaluate = make_evaluation(collector, held_out, rewards, config.evaluation)
    average = PolicyAverage(actors.policy, config.ema) if config.ema is not None else None
    observers = _make_observers(config, algorithm, run=run, learner=learner, collector=collector, average=average)
    warmup = config.critic.warmup_iterations if algorithm.needs_critic else 0
    metrics = optimize_policy(collector, learner, run, observers=observers, critic_warmup=warmup)
    actors.save(run.directory / "model", accelerator)
    if average is not None:
        with average.in_place():
            actors.save(run.directory / "model_ema", accelerator)
    return metrics


def _make_mixed(config: FineTuningConfig, actors: Actors, accelerator: Accelerator) -> ImitationLoss | None:
    """The texts that are imitated on the way."""
    if config.ptx is None:
        return None
    return make_imitation(
        config.ptx,
        load_demonstration_sets(config.prompts)[0] if config.ptx.data is None else None,
        tokenizer=actors.tokenizer,
        accelerator=accelerator,
        device=accelerator.device,
        seed=config.run.seed,
    )


def _make_observers(
    config: FineTuningConfig,
    algorithm: AlgorithmConfig,
    *,
    run: Run,
    learner: Learner,
    collector: PromptCollector,
    average: PolicyAverage | None,
) -> list[Observer]:
    """Who looks at the run; the evaluation is looked at too."""
    watch = Watch(config.watch, say=run.say, clips_tokens=algorithm.ratio == "token")
    run.track(watch=watch)
    observers: list[Observer] = [watch]
    if config.doctor.enabled:
        observers.append(Doctor(config.doctor, run=run, learner=learner, collector=collector))
    assert run.evaluate is not None
    run.evaluate = watch.watching(run.evaluate)
    if average is not None:
        run.track(average=average)
        observers.append(average)
        if config.ema is not None and config.ema.evaluate:
            run.evaluate = evaluate_both(run.evaluate, average)
    return observers
