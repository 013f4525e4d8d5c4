"""Fine-tune a language model on demonstrations: the first stage of RLHF."""

from __future__ import annotations

from functools import partial
from typing import Self

from pydantic import model_validator

from rlhf.cli import launch
from rlhf.config import Config
from rlhf.lm.actors import make_generator, pick_tokenizer
from rlhf.lm.evaluation import EvaluationConfig, evaluate_policy
from rlhf.lm.generator_config import GeneratorConfig, TransformersGeneratorConfig
from rlhf.lm.loading import ModelConfig, load_causal_lm
from rlhf.lm.sampling import SamplingConfig
from rlhf.lm.sft import SftConfig, make_sft_trainer, optimize_sft, save_sft
from rlhf.lm.sources import (
    RewardConfig,
    SourceConfig,
    load_demonstration_sets,
    load_prompt_sets,
    make_reward,
    refuse_judge_of_a_task,
)
from rlhf.training.distributed import seed_everything
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig


class SftRunConfig(Config):
    """A run: a model, demonstrations, and how to learn from them."""

    model: ModelConfig
    demonstrations: SourceConfig
    training: SftConfig = SftConfig()
    reward: RewardConfig | None = None
    """Judges answers to the held-out prompts in evaluation; null looks at the held-out loss only."""
    sampling: SamplingConfig = SamplingConfig()
    generator: GeneratorConfig = TransformersGeneratorConfig()
    """What writes the answers that `reward` judges: the model itself, or vLLM."""
    evaluation: EvaluationConfig = EvaluationConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _refuse_judge_of_other_records(self) -> Self:
        if self.reward is not None:
            remedy = "set reward to null, or to a function that judges yours"
            refuse_judge_of_a_task(self.demonstrations, [self.reward], remedy=remedy)
        return self


def main(config: SftRunConfig) -> dict[str, float]:
    """Train, evaluate, save the model to `<run directory>/model`, the best to `model_best` where asked for."""
    demonstrations, held_out = load_demonstration_sets(config.demonstrations)
    prompts = load_prompt_sets(config.demonstrations)[1] if config.reward is not None else []
    tokenizer = pick_tokenizer(config.model, config.demonstrations)
    seed_everything(config.run.seed)  # a fresh model is drawn now
    model = load_causal_lm(config.model, tokenizer)
    trainer = make_sft_trainer(
        model, tokenizer, demonstrations, config=config.training, held_out=held_out, seed=config.run.seed
    )
    steps, accelerator = trainer.optimizer_steps, trainer.accelerator
    run = Run(config.run, resolved=config, iterations=steps, accelerator=accelerator, recipe="sft")
    judged = None
    if config.reward is not None:
        rewards = {"score": make_reward(config.reward)}
        generator = make_generator(
            trainer.model, tokenizer, config=config.generator, accelerator=accelerator, seed=config.run.seed
        )
        judged = partial(
            evaluate_policy,
            generator,
            tokenizer,
            prompts=prompts,
            rewards=rewards,
            sampling=config.sampling,
            config=config.evaluation,
            device=accelerator.device,
            accelerator=accelerator,
        )
    metrics = optimize_sft(trainer, run, judge=judged, patience=config.training.patience)
    save_sft(trainer, run.directory / "model")
    return metrics


CONFIG = SftRunConfig

if __name__ == "__main__":
    launch(__file__)
