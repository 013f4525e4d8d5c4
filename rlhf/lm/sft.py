"""Supervised fine-tuning on demonstrations, by TRL's SFTTrainer behind a config of our own.

This is the only file that imports TRL. Tokenization is ours, so that the model is trained on exactly the token ids that
generation and RL will show it later, its end token included; TRL contributes the training loop, packing and the fused
loss.

The model object is spent afterwards: TRL binds a fused forward to it, and a deep copy of it would keep calling the
original weights. Later stages load the folder that is written here.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlhf.config import Config
from rlhf.data.records import Demonstration
from rlhf.data.tokenization import encode_completion, encode_prompt, require_special_tokens
from rlhf.errors import ConfigError, DataError, TrainingError

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
"""The label that torch's cross-entropy leaves out."""

LogFunction = Callable[[int, dict[str, float]], None]
"""(optimizer step, metrics) -> None"""


class SftConfig(Config):
    """How demonstrations are imitated."""

    learning_rate: float = Field(2e-5, gt=0)
    """Peak learning rate of AdamW."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How it falls over the run, to 0 at its end."""
    warmup_fraction: float = Field(0.03, ge=0, lt=1)
    """Share of the run in which the learning rate rises to its peak."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """The gradient of all parameters together is scaled down to this norm."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the demonstrations; not used where `max_steps` is set."""
    max_steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of `epochs`."""
    batch_size: int = Field(32, ge=1)
    """Demonstrations (packed rows with `packing`) per optimizer step, over all processes."""
    microbatch_size: int | None = Field(None, ge=1)
    """Most rows in one forward of one process; None is the whole share of the process. Changes memory, not gradients."""
    max_length: int = Field(1024, ge=2)
    """Most tokens of prompt and completion together; the length of a packed row."""
    too_long: Literal["error", "drop"] = "error"
    """What happens to a longer demonstration. Cutting is not offered: it would teach answers without an end."""
    packing: bool = False
    """Put several demonstrations into one row; they do not see one another. Pays with flash attention on a GPU."""
    completion_only: bool = True
    """Learn the completion only, not the prompt."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Mixed precision; auto is bfloat16 on a GPU that has it, else float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between log lines."""
    evaluate_every: int = Field(0, ge=0)
    """Optimizer steps between evaluations of the held-out loss; 0 evaluates at the end only."""
    seed: int = 0
    """Of the order of demonstrations, and of dropout where the model has it."""

    @model_validator(mode="after")
    def _refuse_uneven_microbatches(self) -> Self:
        if self.microbatch_size is not None and self.batch_size % self.microbatch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is no multiple of microbatch_size {self.microbatch_size}; make it one"
            )
        return self


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    config: SftConfig,
    folder: str | Path,
    held_out: Sequence[Demonstration] = (),
    on_log: LogFunction | None = None,
) -> dict[str, float]:
    """Fine-tune `model` and write it to `folder`.

    Args:
        model: A causal language model, bare or with LoRA adapters. Not to be used afterwards: load the folder.
        tokenizer: Saved beside the model.
        demonstrations: At least one.
        config: Settings.
        folder: Where the ordinary model folder goes; `AutoModelForCausalLM.from_pretrained` opens it.
        held_out: Demonstrations for the evaluation loss.
        on_log: Receives every log line; on the main process only.

    Returns:
        "loss" (mean over the run), "steps", "seconds", "examples_per_second", "learned_tokens_per_example", "dropped"
        (demonstrations left out as too long); with held-out ones "evaluation_loss" and "evaluation_perplexity", per
        learned token.

    Raises:
        DataError: A demonstration longer than `max_length`, or none at all.
        ModelError: The tokenizer lacks a pad or an end token.
        TrainingError: The loss is not finite.
    """
    require_special_tokens(tokenizer)
    train_rows, dropped = tokenize_demonstrations(tokenizer, demonstrations, config=config)
    evaluation_rows, _ = tokenize_demonstrations(tokenizer, held_out, config=config) if held_out else ([], 0)
    trainer = _make_trainer(
        model, tokenizer, train_rows, evaluation_rows, config=config, folder=Path(folder), on_log=on_log
    )
    outcome = trainer.train()
    evaluation = trainer.evaluate() if evaluation_rows else {}
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (Path(folder) / "training_args.bin").unlink(missing_ok=True)  # a pickle; model folders hold safetensors only
    learned = sum(label != IGNORED_LABEL for row in train_rows for label in row["labels"]) / len(train_rows)
    seconds = outcome.metrics["train_runtime"]
    metrics = {
        "loss": outcome.training_loss,
        "steps": float(outcome.global_step),
        "seconds": seconds,
        "examples_per_second": outcome.metrics["train_samples_per_second"],
        "learned_tokens_per_example": learned,
        "dropped": float(dropped),
    }
    if evaluation:
        loss = evaluation["eval_loss"]
        metrics |= {"evaluation_loss": loss, "evaluation_perplexity": float(torch.tensor(loss).exp())}
    return metrics


def tokenize_demonstrations(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], *, config: SftConfig
) -> tuple[list[dict[str, list[int]]], int]:
    """Turn demonstrations into rows of token ids and labels.

    Args:
        tokenizer: The model's.
        demonstrations: What to learn.
        config: `max_length`, `too_long` and `completion_only` are read.

    Returns:
        Rows {"input_ids", "labels"}, labels -100 where nothing is learned, and the number of dropped demonstrations.

    Raises:
        DataError: A demonstration is too long and `too_long` is error, or no row is left.
    """
    rows, dropped = [], 0
    for index, demonstration in enumerate(demonstrations):
        where = demonstration.source or f"demonstration {index}"
        prompt = encode_prompt(tokenizer, demonstration.prompt, where=where)
        completion = encode_completion(tokenizer, demonstration.prompt, demonstration.completion, where=where)
        if len(prompt) + len(completion) > config.max_length:
            if config.too_long == "error":
                raise DataError(
                    "the demonstration is too long",
                    where=where,
                    got=f"{len(prompt) + len(completion)} tokens",
                    expected=f"at most {config.max_length}",
                    remedy="Raise max_length, or set too_long: drop.",
                )
            dropped += 1
            continue
        hidden = [IGNORED_LABEL] * len(prompt) if config.completion_only else prompt
        rows.append({"input_ids": prompt + completion, "labels": hidden + completion})
    if not rows:
        raise DataError(
            "no demonstration is left to learn from",
            got=f"{dropped} dropped as longer than max_length={config.max_length}",
            remedy="Raise max_length, or check the data file.",
        )
    if dropped:
        logger.warning(
            "%d of %d demonstrations are longer than max_length and were dropped.", dropped, len(demonstrations)
        )
    return rows, dropped


def _make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: list[dict[str, list[int]]],
    evaluation_rows: list[dict[str, list[int]]],
    *,
    config: SftConfig,
    folder: Path,
    on_log: LogFunction | None,
) -> Any:
    """TRL's trainer over rows that are tokenized already, with everything off that talks to the outside."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTTrainer

    class QuietTrainer(SFTTrainer):
        """Sends no telemetry and leaves no model card in the folder."""

        def _send_telemetry(self) -> None:
            pass

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            pass

    disable_progress_bar()
    trainer = QuietTrainer(
        model=model,
        args=_trl_settings(config, folder=folder, with_evaluation=bool(evaluation_rows)),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(evaluation_rows) if evaluation_rows else None,
        callbacks=[_LogCallback(on_log)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _trl_settings(config: SftConfig, *, folder: Path, with_evaluation: bool) -> Any:
    """Our settings in TRL's words; what TRL switches on by default is said explicitly."""
    import trl

    on_cpu = not torch.cuda.is_available()
    bfloat16 = config.precision == "bfloat16" or (
        config.precision == "auto" and not on_cpu and torch.cuda.is_bf16_supported()
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.batch_size % processes:
        raise ConfigError(
            "the batch cannot be shared evenly",
            where="sft.batch_size",
            got=config.batch_size,
            expected=f"a multiple of the {processes} processes",
        )
    share = config.batch_size // processes
    rows = min(config.microbatch_size or share, share)
    return trl.SFTConfig(
        output_dir=str(folder),
        use_cpu=on_cpu,
        bf16=bfloat16,
        gradient_checkpointing=config.gradient_checkpointing,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.learning_rate_schedule,
        warmup_steps=config.warmup_fraction,  # below 1 it is a share of the run
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=rows,
        per_device_eval_batch_size=rows,
        gradient_accumulation_steps=share // rows,
        max_length=config.max_length,
        packing=config.packing,
        eval_packing=False,
        logging_steps=config.log_every,
        eval_strategy="steps" if with_evaluation and config.evaluate_every else "no",
        eval_steps=config.evaluate_every or None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not on_cpu,
        seed=config.seed,
        data_seed=config.seed,
        trust_remote_code=False,
    )


class _LogCallback(TrainerCallback):
    """Hands the trainer's log lines on, and stops a run whose loss is not finite."""

    def __init__(self, on_log: LogFunction | None) -> None:
        self._on_log = on_log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        for name in ("loss", "eval_loss"):
            if name in logs and not math.isfinite(logs[name]):
                raise TrainingError(
                    f"the {name.replace('_', ' ')} is not finite",
                    where=f"sft, step {state.global_step}",
                    got=logs[name],
                    remedy="Lower learning_rate, and check that the model was saved whole.",
                )
        if self._on_log is not None and state.is_world_process_zero:
            metrics = {_NAMES[name]: float(value) for name, value in logs.items() if name in _NAMES}
            if metrics:
                self._on_log(state.global_step, metrics)


_NAMES = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "mean_token_accuracy": "token_accuracy",
    "eval_loss": "evaluation_loss",
    "eval_mean_token_accuracy": "evaluation_token_accuracy",
}
"""The trainer's names -> ours."""
