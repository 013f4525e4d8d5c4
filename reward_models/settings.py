"""How a reward model is trained: our settings, what they mean for transformers, and the loss that they name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import TrainingArguments

from reward_models.collation import InnerEnd, Overlong
from reward_models.losses import AllPairs, Margin, RankingLossConfig, centering_loss, ranking_loss
from reward_models.model import RewardModel
from rlhf.config import Config
from rlhf.data.records import Ranking
from rlhf.data.settings import DataConfig
from rlhf.errors import ConfigError, DataError


class Centering(Config):
    """Pulls scores towards 0 during training."""

    coefficient: float = Field(0.01, gt=0)
    """Weight of the penalty beside the ranking loss."""
    form: Literal["squares", "pair_sums"] = "squares"
    """squares: mean of s^2; pair_sums: mean over pairs of (s_i + s_j)^2, as Eisenstein et al. 2023 for K = 2."""


class Normalization(Config):
    """Gives scores a zero point and a unit after training, which a loss on differences leaves undetermined."""

    unit_variance: bool = True
    """Scale to standard deviation 1 too; false shifts the mean to 0 and keeps the unit of the ranking loss."""
    references: DataConfig | None = None
    """Demonstrations `{prompt, completion}` on which mean and deviation are taken, such as samples of the model that RL
    starts from; null takes the candidates of training, at most 512 of them."""


class RewardModelConfig(Config):
    """How a reward model is trained."""

    loss: RankingLossConfig = AllPairs()
    centering: Centering | None = None
    epochs: int = Field(1, ge=1)
    """Passes over the rankings; more than one usually overfits (InstructGPT, arXiv 2203.02155, section 3.5)."""
    learning_rate: float = Field(1e-5, gt=0)
    """AdamW's, at its peak."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warmup: constant, or down to 0 linearly or along a cosine."""
    warmup_fraction: float = Field(0.0, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled decay; 0 for biases and norms in any case."""
    adam_epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient of all parameters together is scaled down to this norm."""
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
    inner_end: InnerEnd = "refuse"
    """A completion that spells the end token in its midst: refuse it, or take the spelling as plain text, as the scorer
    does in RL. Completions that models wrote hold such spellings now and then."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is mixed precision (weights and head stay float32) and needs a GPU that has it."""


def prompt_losses(scores: Tensor, batch: dict[str, Tensor], *, settings: RewardModelConfig) -> Tensor:
    """Return [P] losses of a collated batch: the ranking loss plus centering."""
    losses = ranking_loss(
        scores, batch["ranks"], mask=batch["mask"], loss=settings.loss, gold_scores=batch.get("gold_scores")
    ).losses
    if settings.centering is not None:
        centering = centering_loss(scores, mask=batch["mask"], form=settings.centering.form)
        losses = losses + settings.centering.coefficient * centering
    return losses


def training_arguments(settings: RewardModelConfig, *, directory: str | Path, seed: int) -> TrainingArguments:
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
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would hide a broken loss behind the average of earlier ones
        eval_strategy="no",
        save_strategy="no",
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        seed=seed,
    )
    # One process takes one GPU; where it sees several, transformers would split our batches between them by their
    # first axis (DataParallel), which here is candidates for some tensors and prompts for others.
    arguments._n_gpu = min(arguments.n_gpu, 1)
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


def maximum_length(model: RewardModel, settings: RewardModelConfig) -> int | None:
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


def check_gold_scores(rankings: Sequence[Ranking], settings: RewardModelConfig) -> None:
    """Refuse data without scores where the loss reads them, before any training."""
    match settings.loss:
        case AllPairs(margin=Margin(per="gold_score")) if any(one.scores is None for one in rankings):
            raise DataError(
                "margins by gold_score need scores, and some rankings have none",
                where="training.loss.margin.per",
                remedy="Use per: rank or per: pair.",
            )
