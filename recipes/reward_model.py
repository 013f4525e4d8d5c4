"""Train a reward model from K-way rankings: your own file, or a procedural task as shipped."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from reward_models.loading import make_reward_model, prepare_tokenizer
from reward_models.model import Adapters
from reward_models.procedural import rank_random_answers
from reward_models.recording import optimize_reward_model
from reward_models.scorer import RewardModelScorer
from reward_models.settings import Normalization, RewardModelConfig
from reward_models.trainer import make_trainer
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.data.loading import load_rankings, split_holdout
from rlhf.data.records import Ranking
from rlhf.data.sources import DataConfig
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_tokenizer
from rlhf.lm.tasks import TaskConfig, make_task
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig


class RewardModelRunConfig(Config):
    """A base model, rankings, and how to learn from them."""

    model: ModelConfig
    data: DataConfig | None = None
    """Rankings from a file, folder or hub set; null ranks random answers to `task` by its gold scorer."""
    task: TaskConfig | None = None
    """A procedural task instead of data."""
    num_candidates: int = Field(4, ge=2)
    """Answers ranked per prompt of `task`."""
    held_out_data: DataConfig | None = None
    """Rankings to evaluate on; null holds out a share of `data`."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """That share; which rankings are held out does not depend on the run's seed."""
    chat_template: str | None = None
    """Jinja template for chat messages where the tokenizer has none, or to replace its own; saved with the model."""
    context_factor: float = Field(1.0, ge=1)
    """Lengthens the context so many times by interpolating rotary positions (see `extend_context`)."""
    training: RewardModelConfig = RewardModelConfig()
    normalization: Normalization | None = Normalization()
    """Gives scores mean 0 and standard deviation 1, as RL wants them; null keeps the raw scores."""
    adapters: Adapters = "merge"
    """How a model trained with `model.lora` is saved: merge needs no base, keep is small and needs its base."""
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.data is None) == (self.task is None):
            raise ValueError("set exactly one of `data` (rankings) and `task` (a procedural one)")
        if self.task is not None and self.held_out_data is not None:
            raise ValueError("a task brings its own held-out rankings; remove held_out_data")
        return self


def load(config: RewardModelRunConfig) -> tuple[list[Ranking], list[Ranking], PreTrainedTokenizerBase]:
    """Return rankings to learn from, rankings held out, and the base model's tokenizer."""
    if config.data is not None:
        rankings = load_rankings(config.data)
        if config.held_out_data is not None:
            return rankings, load_rankings(config.held_out_data), load_tokenizer(config.model)
        return *split_holdout(rankings, fraction=config.held_out), load_tokenizer(config.model)
    task = make_task(config.task or TaskConfig(name="vowel_words"))
    rankings = rank_random_answers(task, task.prompts, num_candidates=config.num_candidates, seed=0)
    held_out = rank_random_answers(task, task.held_out_prompts, num_candidates=config.num_candidates, seed=1)
    tokenizer = character_tokenizer(task.alphabet) if config.model.config else load_tokenizer(config.model)
    return rankings, held_out, tokenizer


def main(config: RewardModelRunConfig) -> dict[str, float]:
    """Train, evaluate on held-out rankings, save the folder `<run directory>/reward_model`."""
    rankings, held_out, tokenizer = load(config)
    tokenizer = prepare_tokenizer(tokenizer, chat_template=config.chat_template)
    seed = config.run.seed
    model = make_reward_model(config.model, tokenizer, seed=seed, context_factor=config.context_factor)
    trainer = make_trainer(model, tokenizer, rankings, held_out=held_out, settings=config.training, seed=seed)
    run = Run(
        config.run,
        resolved=config,
        iterations=trainer.optimizer_steps,
        accelerator=trainer.accelerator,
        recipe="reward_model",
    )
    metrics = optimize_reward_model(trainer, run)
    if trainer.accelerator.is_main_process:
        scorer = RewardModelScorer.from_trainer(trainer, normalization=config.normalization)
        scorer.save_pretrained(run.directory / "reward_model", adapters=config.adapters)
        run.say(f"saved to {run.directory / 'reward_model'}")
    return metrics


CONFIG = RewardModelRunConfig

if __name__ == "__main__":
    launch(__file__)
