"""Supervised fine-tuning on demonstrations, by TRL's SFTTrainer behind a config of our own.

This is the only file that imports TRL. Tokenization is ours, so that the model is trained on exactly the token ids that
generation and RL will show it later, its end token included; TRL contributes the training loop, packing and the fused
loss.

The model object is spent afterwards: TRL binds a fused forward to it, and a deep copy of it would keep calling the
original weights. Later stages load the folder that is written here.
"""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from rlhf.data.records import Demonstration
from rlhf.data.tokenization import end_token_ids, require_special_tokens
from rlhf.data.tokenizer_saving import save_tokenizer
from rlhf.errors import ConfigError, TrainingError
from rlhf.lm.sft_best import BestModel
from rlhf.lm.sft_config import SftConfig
from rlhf.lm.sft_rows import IGNORED_LABEL, tokenize_demonstrations, warn_of_unlearned_ends
from rlhf.lm.supervised_loss import score_labels_on_cpu
from rlhf.training.distributed import gather_objects, preserved_random_state
from rlhf.training.linear import use_fast_linear
from rlhf.training.run import Run
from rlhf.training.run_config import lowest_is_best

__all__ = [
    "IGNORED_LABEL",
    "SftConfig",
    "evaluate_sft",
    "make_sft_trainer",
    "optimize_sft",
    "save_sft",
    "tokenize_demonstrations",
    "train_sft",
]

LogFunction = Callable[[int, dict[str, float]], None]
"""(optimizer step, metrics) -> None"""


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    config: SftConfig,
    folder: str | Path,
    held_out: Sequence[Demonstration] = (),
    seed: int = 0,
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
        seed: Of the order of demonstrations, and of dropout where the model has it.
        on_log: Receives the metrics of every optimizer step, on the main process.

    Returns:
        "loss" (mean over the run), "steps", "seconds", "examples_per_second", "dropped" (demonstrations left out as
        too long); with held-out ones "evaluation_loss", "evaluation_perplexity" and "evaluation_token_accuracy", over
        learned tokens.

    Raises:
        DataError: A demonstration longer than `max_length`, or none at all.
        ModelError: The tokenizer lacks a pad or an end token.
        TrainingError: The loss is not finite.
    """
    trainer = make_sft_trainer(model, tokenizer, demonstrations, config=config, held_out=held_out, seed=seed)
    if on_log is not None:
        trainer.add_callback(_Tell(on_log))
    outcome = trainer.train()
    metrics = {
        "loss": outcome.training_loss,
        "steps": float(outcome.global_step),
        "seconds": outcome.metrics["train_runtime"],
        "examples_per_second": outcome.metrics["train_samples_per_second"],
        "dropped": float(trainer.dropped),
    }
    if held_out:
        metrics |= {f"evaluation_{name}": value for name, value in evaluate_sft(trainer).items()}
    save_sft(trainer, folder)
    return metrics


def optimize_sft(
    trainer: Any,
    run: Run,
    *,
    judge: Callable[[], dict[str, float]] | None = None,
    patience: int | None = None,
) -> dict[str, float]:
    """Train to the end inside a run: every optimizer step is one of its iterations.

    With `run.best_metric` or `patience`, the model of the best evaluation is kept in `<run directory>/model_best`.

    Args:
        trainer: From `make_sft_trainer`.
        run: With `iterations=trainer.optimizer_steps`; with `run.resume` training goes on from the last checkpoint.
        judge: More to evaluate than the held-out loss, for instance answers of `trainer.model`.
        patience: Evaluations without a better one after which the run ends; None never ends it early.

    Returns:
        The metrics of summary.json.

    Raises:
        ConfigError: The run resumes, but the trainer has no checkpoint of that step; or `patience` without
            `run.evaluate_every`.
        TrainingError: The loss is not finite.
    """
    if patience is not None and run.config.evaluate_every == 0:
        raise ConfigError(
            "patience counts evaluations, and the run has none on the way",
            where="run.evaluate_every",
            got=0,
            remedy="Set run.evaluate_every to a number of steps, or training.patience to null.",
        )
    folder = run.directory / "checkpoints" / "trainer"
    trainer.args.output_dir = str(folder)
    trainer.args.save_total_limit = run.config.keep_checkpoints
    checkpoint = folder / f"checkpoint-{run.completed}" if run.completed > 0 else None
    if checkpoint is not None and not checkpoint.is_dir():
        raise ConfigError(
            "the run has no model checkpoint of its last completed step",
            where=str(checkpoint),
            remedy="Start over with run.overwrite=true; run.checkpoint_every writes checkpoints on the way.",
        )
    evaluation = _Evaluation(trainer, run, judge=judge, patience=patience)
    run.evaluate = evaluation
    run.track(trainer=_TrainerCheckpoint(trainer))
    trainer.add_callback(_RecordInRun(run, evaluation))
    try:
        outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BaseException:
        run.stopped()
        raise
    best = _tell_best(run, evaluation)
    return run.finish(**{"train/loss": outcome.training_loss, "dropped": trainer.dropped}, **best)


def _tell_best(run: Run, evaluation: _Evaluation) -> dict[str, float]:
    """Say where the best model lies, which the last one need not be; its numbers for summary.json."""
    best = evaluation.best
    if best is None or best.best is None:
        return {}
    run.say(f"the best model, {best.metric} {best.best:.4g} at step {best.step}, is in {run.directory / 'model_best'}")
    return {f"best/{best.metric}": best.best, "best/step": best.step}


def evaluate_sft(trainer: Any) -> dict[str, float]:
    """Held-out "loss" in nats per learned token, "perplexity" = exp(loss), "token_accuracy"; none without such data."""
    if trainer.eval_dataset is None:
        return {}
    outcome = trainer.evaluate()
    loss = outcome["eval_loss"]
    accuracy = outcome.get("eval_mean_token_accuracy", math.nan)
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "token_accuracy": accuracy}


def save_sft(trainer: Any, folder: str | Path) -> None:
    """Write the model and its tokenizer as an ordinary folder."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    defaults, ends = getattr(model, "generation_config", None), end_token_ids(trainer.processing_class)
    if defaults is not None:  # a template may close turns with another token than eos_token: generation stops at both
        defaults.eos_token_id = ends if len(ends) > 1 else ends[0]
    trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        (Path(folder) / "training_args.bin").unlink(missing_ok=True)  # a pickle; model folders hold safetensors only
        save_tokenizer(trainer.processing_class, folder)
    trainer.accelerator.wait_for_everyone()


def make_sft_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demonstrations: Sequence[Demonstration],
    *,
    config: SftConfig,
    held_out: Sequence[Demonstration] = (),
    seed: int = 0,
) -> Any:
    """TRL's trainer over rows that are tokenized already, with everything off that talks to the outside.

    Returns:
        A `trl.SFTTrainer` with two more attributes: `optimizer_steps` of the whole run, and `dropped`, the number of
        demonstrations left out as too long.

    Raises:
        DataError: A demonstration longer than `max_length`, or none at all.
        ModelError: The tokenizer lacks a pad or an end token.
    """
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

    require_special_tokens(tokenizer)
    use_fast_linear(model)
    rows, dropped = tokenize_demonstrations(tokenizer, demonstrations, config=config)
    warn_of_unlearned_ends(rows, tokenizer)
    held_out_rows = tokenize_demonstrations(tokenizer, held_out, config=config)[0] if held_out else []
    disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        settings = _trl_settings(config, seed=seed)
    trainer = QuietTrainer(
        model=model,
        args=settings,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out_rows) if held_out_rows else None,
        callbacks=[_RefuseNonFinite()],
    )
    score_labels_on_cpu(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.dropped = dropped
    batches = math.ceil(len(trainer.train_dataset) / (settings.per_device_train_batch_size * settings.world_size))
    steps_per_epoch = math.ceil(batches / settings.gradient_accumulation_steps)
    trainer.optimizer_steps = config.max_steps or math.ceil(config.epochs * steps_per_epoch)
    return trainer


def _trl_settings(config: SftConfig, *, seed: int) -> Any:
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
    if share % rows:
        raise ConfigError(
            "a process's share of the batch is no multiple of the microbatch",
            where="sft.microbatch_size",
            got=rows,
            expected=f"a divisor of {share}",
        )
    return trl.SFTConfig(
        output_dir=tempfile.gettempdir(),  # nothing is written there: checkpoints are off until a run asks for them
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
        neftune_noise_alpha=config.neftune_noise,
        packing=config.packing,
        eval_packing=False,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the default logs the last finite loss instead, and trains on
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        seed=seed,
        data_seed=seed,
        trust_remote_code=False,
    )


class _RefuseNonFinite(TrainerCallback):
    """Stops a run whose loss is not finite; transformers would go on and save it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {name.replace('_', ' ')} is not finite",
                    where=f"sft, step {state.global_step}",
                    got=value,
                    remedy="Lower learning_rate, and check that the model was saved whole.",
                )


class _Tell(TrainerCallback):
    """Hands every step's metrics on."""

    def __init__(self, on_log: LogFunction) -> None:
        self._on_log = on_log

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        if logs is not None and "loss" in logs and state.is_world_process_zero:
            self._on_log(state.global_step, _our_names(logs))


class _Evaluation:
    """The run's evaluation, made once a step: both the early stop and the run ask for it."""

    def __init__(
        self, trainer: Any, run: Run, *, judge: Callable[[], dict[str, float]] | None, patience: int | None
    ) -> None:
        self._trainer, self._judge = trainer, judge
        self._step, self._metrics = -1, dict[str, float]()
        self.ends_because: str | None = None
        self.best: BestModel | None = None
        if run.config.best_metric is not None or patience is not None:
            self.best = BestModel(
                lambda: save_sft(trainer, run.directory / "model_best"),
                metric=(run.config.best_metric or "loss").removeprefix("evaluation/"),
                highest=run.config.best_metric is not None and not lowest_is_best(run.config),
                patience=patience,
            )
            run.track(best_model=self.best)

    def __call__(self) -> dict[str, float]:
        step = self._trainer.state.global_step
        if step != self._step:
            self._step = step
            self._metrics = evaluate_sft(self._trainer) | (self._judge() if self._judge is not None else {})
            if self.best is not None and step > 0:
                everywhere = gather_objects(self._trainer.accelerator, self._metrics)
                self.ends_because = self.best.look(everywhere[0], step=step)
        return self._metrics


class _TrainerCheckpoint:
    """Writes the trainer's own checkpoint whenever the run writes one; `trainer.train` reads it when resuming."""

    replicated = True

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def state_dict(self) -> dict[str, int]:
        self._trainer._save_checkpoint(self._trainer.model, None)
        return {"step": self._trainer.state.global_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Nothing: weights, optimizer and schedule come from the trainer's folder of that step."""


class _RecordInRun(TrainerCallback):
    """Makes every optimizer step one iteration of a run."""

    def __init__(self, run: Run, evaluation: _Evaluation) -> None:
        self._run, self._evaluation = run, evaluation
        self._iterations: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._iterations = self._run.iterations()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        iteration = next(self._iterations)
        assert iteration == state.global_step + 1, "run and trainer count different steps"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        every = self._run.config.evaluate_every
        if every > 0 and state.global_step % every == 0:
            with preserved_random_state():  # before the record, because it decides whether this step is the last
                self._evaluation()
        reason = self._evaluation.ends_because
        self._run.finish_iteration(state.global_step, None, _our_names(logs), ends_because=reason)
        if reason is not None:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        next(self._iterations, None)
        self._iterations = iter(())  # after an early stop the run's own generator ends here


def _our_names(logs: dict[str, Any]) -> dict[str, float]:
    names = {"mean_token_accuracy": "token_accuracy", "loss": "loss", "grad_norm": "grad_norm"}
    names["learning_rate"] = "learning_rate"
    return {ours: float(logs[theirs]) for theirs, ours in names.items() if theirs in logs}
