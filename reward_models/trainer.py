"""Training a reward model from rankings with `transformers.Trainer`.

What is ours is the loss: a mean over the prompts of the whole optimizer step, exact under any split of the step into
microbatches and processes. What is theirs is everything around it: optimizer, schedule, precision, DDP, checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments

from reward_models.collation import (
    EncodedRanking,
    EncodingReport,
    Overlong,
    RankingCollator,
    encode_rankings,
    scatter_scores,
)
from reward_models.evaluation import evaluate_scores, score_rankings
from reward_models.losses import AllPairs, Margin, RankingLossConfig, centering_loss, ranking_loss
from reward_models.model import RewardModel
from rlhf.config import Config
from rlhf.data.records import Ranking
from rlhf.errors import ConfigError, DataError, TrainingError

logger = logging.getLogger(__name__)


class Centering(Config):
    """Pulls scores towards 0 during training."""

    coefficient: float = Field(0.01, gt=0)
    form: Literal["squares", "pair_sums"] = "squares"
    """squares: mean of s^2; pair_sums: mean over pairs of (s_i + s_j)^2, as Eisenstein et al. 2023 for K = 2."""


class RewardModelConfig(Config):
    """How a reward model is trained."""

    loss: RankingLossConfig = AllPairs()
    centering: Centering | None = None
    epochs: int = Field(1, ge=1)
    """Passes over the rankings; more than one usually overfits (InstructGPT, arXiv 2203.02155, section 3.5)."""
    learning_rate: float = Field(1e-5, gt=0)
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)
    batch_prompts: int = Field(32, ge=1)
    """Prompts, each with all its candidates, of one optimizer step over all processes."""
    microbatch_prompts: int | None = Field(None, ge=1)
    """Prompts whose activations are held at once, per process; None takes the whole batch. Changes no gradient."""
    chunk_tokens: int = Field(8192, ge=1)
    """Tokens, padding included, of one forward within a microbatch; rows are sorted by length. For speed only."""
    max_length: int | None = Field(None, ge=2)
    """Most tokens of prompt plus completion; None takes the model's context length."""
    overlong: Overlong = "refuse"
    """What happens to longer candidates. refuse: an error. truncate: the completion loses its end, then the prompt
    its start; the end token stays. drop: the candidate is left out, and a ranking with fewer than two as well."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is mixed precision (weights and head stay float32) and needs a GPU that has it."""


class RankingTrainer(Trainer):
    """`transformers.Trainer` with a ranking loss.

    Args:
        settings: The training settings.
        held_out: Encoded rankings to evaluate on.
        tokenizer: The reward model's own.
        arguments: The same as `transformers.Trainer`'s.
    """

    # The loss below is divided by the prompts of the whole step; Trainer must not divide it by the microbatches again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        settings: RewardModelConfig,
        held_out: Sequence[EncodedRanking],
        tokenizer: PreTrainedTokenizerBase,
        **arguments: Any,
    ) -> None:
        self.settings = settings
        self.held_out = held_out
        self.pad_id: int = tokenizer.pad_token_id  # type: ignore[assignment]
        super().__init__(data_collator=RankingCollator(self.pad_id), **arguments)
        self.model_accepts_loss_kwargs = False

    def get_batch_samples(self, epoch_iterator, num_batches: int, device) -> tuple[list[Any], Tensor | None]:
        """Return the microbatches of one optimizer step and the number of prompts in them, over all processes.

        Every encoded ranking has at least one comparison (`encode_rankings` leaves out the others), so every prompt
        counts.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        prompts = torch.tensor(sum(len(batch["ranks"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(prompts, reduction="sum")  # type: ignore[return-value]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return sum of prompt losses / prompts of the step; DDP averages over processes, hence the factor."""
        scores = scatter_scores(model(inputs["input_ids"], inputs["attention_mask"]), inputs)
        losses = prompt_losses(scores, inputs, settings=self.settings)
        if not bool(losses.isfinite().all()):
            raise TrainingError(
                "the ranking loss is not finite",
                where=f"optimizer step {self.state.global_step + 1}",
                got=f"scores between {scores.min().item():g} and {scores.max().item():g}",
                remedy="Lower the learning rate, or train in float32.",
            )
        prompts = len(losses) if num_items_in_batch is None else num_items_in_batch
        loss = losses.sum() / prompts
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"scores": scores}) if return_outputs else loss

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "evaluation"
    ) -> dict[str, float]:
        """Score the held-out rankings and measure them (`reward_models.evaluation.evaluate_scores`).

        Every process scores all of them, so that each has the same numbers without a collective.
        """
        model = self.accelerator.unwrap_model(self.model)
        scores = score_rankings(model, self.held_out, pad_id=self.pad_id)
        metrics = {f"{metric_key_prefix}/{k}": v for k, v in evaluate_scores(scores, self.held_out).items()}
        self.log(dict(metrics))
        return metrics


def prompt_losses(scores: Tensor, batch: dict[str, Tensor], *, settings: RewardModelConfig) -> Tensor:
    """Return [P] losses of a collated batch: the ranking loss plus centering."""
    losses = ranking_loss(
        scores, batch["ranks"], mask=batch["mask"], loss=settings.loss, gold_scores=batch.get("gold_scores")
    ).losses
    if settings.centering is not None:
        centering = centering_loss(scores, mask=batch["mask"], form=settings.centering.form)
        losses = losses + settings.centering.coefficient * centering
    return losses


class _Rankings(Dataset):
    def __init__(self, rankings: Sequence[EncodedRanking]) -> None:
        self.rankings = rankings

    def __len__(self) -> int:
        return len(self.rankings)

    def __getitem__(self, index: int) -> EncodedRanking:
        return self.rankings[index]


def train_reward_model(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    rankings: Sequence[Ranking],
    *,
    held_out: Sequence[Ranking],
    settings: RewardModelConfig,
    directory: str | Path,
    seed: int = 0,
    evaluate_every: int = 0,
    checkpoint_every: int = 0,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, float]:
    """Train a reward model in place and evaluate it on held-out rankings.

    Args:
        model: From `make_reward_model`; trained in place.
        tokenizer: From `prepare_tokenizer`.
        rankings: To learn from.
        held_out: To evaluate on.
        settings: How to train.
        directory: For `transformers.Trainer`'s checkpoints.
        seed: Of the order of rankings.
        evaluate_every: Optimizer steps between evaluations; 0 evaluates only at the end.
        checkpoint_every: Optimizer steps between checkpoints; 0 writes none.
        resume: Go on from the last checkpoint in `directory`.
        callbacks: transformers callbacks, for logging.

    Returns:
        `evaluation/...` of `evaluate_scores`, `train/loss` (mean over the run), `train/prompts`, `train/tokens`,
        `train/seconds`, and the counts of what was cut or left out.

    Raises:
        DataError: A candidate is too long under `overlong: refuse`, or the loss needs scores the data lacks.
        ConfigError: Batch sizes or precision do not fit the processes or the machine.
        TrainingError: The loss is not finite.
    """
    model.chunk_tokens = settings.chunk_tokens
    max_length = context_length(model, settings)
    _check_gold_scores(rankings, settings)
    encode = {"tokenizer": tokenizer, "max_length": max_length, "overlong": settings.overlong}
    encoded, report = encode_rankings(rankings, name="rankings", **encode)
    encoded_held_out, held_out_report = encode_rankings(held_out, name="held-out rankings", **encode)
    print(f"training on {report}\nheld out: {held_out_report}", flush=True)
    arguments = training_arguments(
        settings, directory=directory, seed=seed, evaluate_every=evaluate_every, checkpoint_every=checkpoint_every
    )
    trainer = RankingTrainer(
        settings=settings,
        held_out=encoded_held_out,
        tokenizer=tokenizer,
        model=model,
        args=arguments,
        train_dataset=_Rankings(encoded),
        eval_dataset=_Rankings(encoded_held_out),
        callbacks=list(callbacks),
    )
    result = trainer.train(resume_from_checkpoint=resume or None)
    model.eval()
    return {
        **trainer.evaluate(),
        "train/loss": result.training_loss,
        "train/seconds": result.metrics["train_runtime"],
        "train/prompts": float(len(encoded)),
        "train/tokens": float(settings.epochs * sum(len(ids) for one in encoded for ids in one.sequences)),
        **_counts(report, "train"),
        **_counts(held_out_report, "evaluation"),
    }


def training_arguments(
    settings: RewardModelConfig, *, directory: str | Path, seed: int, evaluate_every: int, checkpoint_every: int
) -> TrainingArguments:
    """Translate our settings; every default of transformers that differs by machine is set explicitly."""
    cpu = not torch.cuda.is_available()
    if settings.precision == "bfloat16" and cpu:
        raise ConfigError("bfloat16 needs a GPU", where="training.precision", remedy="Use float32 on the CPU.")
    arguments = TrainingArguments(
        output_dir=str(directory),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.learning_rate_schedule,
        warmup_steps=settings.warmup_fraction,  # below 1, transformers reads it as a share
        weight_decay=settings.weight_decay,
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        use_cpu=cpu,
        dataloader_pin_memory=not cpu,
        report_to="none",
        push_to_hub=False,
        disable_tqdm=True,
        logging_strategy="steps",
        logging_steps=10,
        logging_nan_inf_filter=False,  # it would hide a broken loss behind the average of earlier ones
        eval_strategy="steps" if evaluate_every else "no",
        eval_steps=evaluate_every or None,
        save_strategy="steps" if checkpoint_every else "no",
        save_steps=checkpoint_every or 500,
        save_total_limit=2,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        seed=seed,
    )
    processes = arguments.world_size
    per_process, rest = divmod(settings.batch_prompts, processes)
    microbatch = settings.microbatch_prompts or max(per_process, 1)
    if rest or per_process % microbatch:
        raise ConfigError(
            "a step's prompts cannot be split evenly over processes and microbatches",
            where="training.batch_prompts",
            got=f"{settings.batch_prompts} prompts, {processes} processes, microbatches of {microbatch}",
            remedy="Make batch_prompts a multiple of processes x microbatch_prompts.",
        )
    arguments.per_device_train_batch_size = microbatch
    arguments.gradient_accumulation_steps = per_process // microbatch
    return arguments


def context_length(model: RewardModel, settings: RewardModelConfig) -> int | None:
    """Return the maximum length in force: the setting, else the model's context, else None."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if settings.max_length is not None and context is not None and settings.max_length > context:
        raise ConfigError(
            "max_length exceeds the model's context",
            where="training.max_length",
            got=settings.max_length,
            expected=f"at most {context}",
        )
    return settings.max_length or context


def _check_gold_scores(rankings: Sequence[Ranking], settings: RewardModelConfig) -> None:
    match settings.loss:
        case AllPairs(margin=Margin(per="gold_score")) if any(one.scores is None for one in rankings):
            raise DataError(
                "margins by gold_score need scores, and some rankings have none",
                where="training.loss.margin.per",
                remedy="Use per: rank or per: pair.",
            )


def _counts(report: EncodingReport, prefix: str) -> dict[str, float]:
    names = ("truncated_candidates", "dropped_candidates", "dropped_rankings", "uninformative_rankings")
    return {f"{prefix}/{name}": float(getattr(report, name)) for name in names}
