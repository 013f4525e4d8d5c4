"""Training a reward model from rankings with `transformers.Trainer`.

What is ours is the loss: a mean over the prompts of the whole optimizer step, exact under any split of the step into
microbatches and processes. What is theirs is everything around it: optimizer, schedule, precision, DDP, checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments

from reward_models.collation import EncodedRanking, EncodingReport, RankingCollator, encode_rankings, scatter_scores
from reward_models.evaluation import evaluate_scores, score_rankings
from reward_models.model import RewardModel
from reward_models.settings import (
    RewardModelConfig,
    check_gold_scores,
    maximum_length,
    prompt_losses,
    training_arguments,
)
from rlhf.data.records import Ranking
from rlhf.errors import TrainingError


class RankingTrainer(Trainer):
    """`transformers.Trainer` with a ranking loss.

    Args:
        model: What is trained, in place.
        settings: The training settings.
        rankings: Encoded rankings to learn from.
        held_out: Encoded rankings to evaluate on.
        tokenizer: The reward model's own.
        max_length: Most tokens the rankings were encoded with, for the scorer that follows.
        arguments: `transformers.TrainingArguments`.
    """

    # The loss below is divided by the prompts of the whole step; Trainer must not divide it by the microbatches again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: RewardModel,
        *,
        settings: RewardModelConfig,
        rankings: Sequence[EncodedRanking],
        held_out: Sequence[EncodedRanking],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None,
        arguments: TrainingArguments,
    ) -> None:
        self.reward_model, self.tokenizer, self.max_length = model, tokenizer, max_length
        self.settings, self.rankings, self.held_out = settings, rankings, held_out
        self.pad_id: int = tokenizer.pad_token_id  # type: ignore[assignment]
        self.counts: dict[str, float] = {}
        """What encoding cut or left out, for the record."""
        super().__init__(
            model=model,
            args=arguments,
            data_collator=RankingCollator(self.pad_id),
            train_dataset=_Rankings(rankings),
            processing_class=tokenizer,
        )
        self.remove_callback(PrinterCallback)

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
        scores = scatter_scores(model(inputs["input_ids"], inputs["attention_mask"], inputs["shared_lengths"]), inputs)
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
        scores = score_rankings(self.reward_model, self.held_out, pad_id=self.pad_id)
        return {f"{metric_key_prefix}/{name}": value for name, value in evaluate_scores(scores, self.held_out).items()}

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole training; an epoch's last one may have fewer prompts."""
        microbatches = len(self.get_train_dataloader())
        return math.ceil(microbatches / self.args.gradient_accumulation_steps) * self.settings.epochs


class _Rankings(Dataset):
    def __init__(self, rankings: Sequence[EncodedRanking]) -> None:
        self.rankings = rankings

    def __len__(self) -> int:
        return len(self.rankings)

    def __getitem__(self, index: int) -> EncodedRanking:
        return self.rankings[index]


def make_trainer(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    rankings: Sequence[Ranking],
    *,
    held_out: Sequence[Ranking],
    settings: RewardModelConfig,
    seed: int = 0,
) -> RankingTrainer:
    """Encode the rankings, print what that cut or left out, and set up a trainer.

    Args:
        model: From `make_reward_model`; trained in place.
        tokenizer: From `prepare_tokenizer`.
        rankings: To learn from.
        held_out: To evaluate on.
        settings: How to train.
        seed: Of the order of rankings.

    Raises:
        DataError: A candidate is too long under `overlong: refuse`, or the loss needs scores the data lacks.
        ConfigError: Batch sizes or precision do not fit the processes or the machine.
    """
    model.chunk_tokens = settings.chunk_tokens
    check_gold_scores(rankings, settings)
    arguments = training_arguments(settings, directory=gettempdir(), seed=seed)  # nothing is written there
    encode: dict[str, Any] = {
        "max_length": maximum_length(model, settings),
        "overlong": settings.overlong,
        "inner_end": settings.inner_end,
    }
    encoded, report = encode_rankings(rankings, tokenizer, name="rankings", **encode)
    encoded_held_out, held_out_report = encode_rankings(held_out, tokenizer, name="held-out rankings", **encode)
    if arguments.process_index == 0:
        print(f"to learn from: {report}\nheld out: {held_out_report}", flush=True)
    trainer = RankingTrainer(
        model,
        settings=settings,
        rankings=encoded,
        held_out=encoded_held_out,
        tokenizer=tokenizer,
        max_length=encode["max_length"],
        arguments=arguments,
    )
    trainer.counts = {**_counts(report, "train"), **_counts(held_out_report, "held_out")}
    return trainer


def train_reward_model(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    rankings: Sequence[Ranking],
    *,
    held_out: Sequence[Ranking],
    settings: RewardModelConfig,
    seed: int = 0,
) -> dict[str, float]:
    """Train a reward model in place, without a run directory, and evaluate it on held-out rankings.

    `optimize_reward_model` does the same within a `Run`. Arguments and errors as `make_trainer`; besides,
    `TrainingError` for a loss that is not finite.

    Returns:
        `evaluation/...` of `evaluate_scores`, `train/loss` (mean over the run), `train/seconds`, and the counts of
        what was cut or left out.
    """
    trainer = make_trainer(model, tokenizer, rankings, held_out=held_out, settings=settings, seed=seed)
    result = trainer.train()
    model.eval()
    seconds = result.metrics["train_runtime"]
    return {**trainer.evaluate(), "train/loss": result.training_loss, "train/seconds": seconds, **trainer.counts}


def _counts(report: EncodingReport, prefix: str) -> dict[str, float]:
    names = ("truncated_candidates", "dropped_candidates", "dropped_rankings", "uninformative_rankings")
    return {f"{prefix}/{name}": float(getattr(report, name)) for name in names}
