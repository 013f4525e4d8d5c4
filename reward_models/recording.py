"""Training a reward model inside a `Run`: its directory, metrics, evaluation and checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from reward_models.trainer import RankingTrainer
from rlhf.errors import ConfigError
from rlhf.training.run import Run

TRAINER = "trainer"
"""Folder of the trainer's checkpoints beside those of `Run`, which hold only the iteration."""


class RecordInRun(TrainerCallback):
    """Makes every optimizer step of a trainer one iteration of a run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._iterations: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Start the run's clock and console."""
        self._iterations = self.run.iterations()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Go on to the next iteration."""
        iteration = next(self._iterations)
        assert iteration == state.global_step + 1, "run and trainer count different steps"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        """Record a step's loss, gradient norm and learning rate; the trainer logs once a step."""
        if logs is not None and "loss" in logs:
            self.run.finish_iteration(state.global_step, None, {name: float(value) for name, value in logs.items()})

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Let the run leave its last iteration."""
        next(self._iterations, None)


def optimize_reward_model(trainer: RankingTrainer, run: Run) -> dict[str, float]:
    """Train to the end, recording every step; the twin of `rlhf.training.optimize_policy`.

    Args:
        trainer: From `make_trainer`.
        run: With `iterations=trainer.optimizer_steps`; with `run.resume` training goes on from the last checkpoint.

    Returns:
        The metrics of summary.json: `evaluation/...`, `loss`, and the counts of what encoding cut or left out.

    Raises:
        ConfigError: The run resumes, but the trainer has no checkpoint of that step.
        TrainingError: The loss is not finite.
    """
    checkpoints = _place_checkpoints(trainer, run)
    checkpoint: Path | None = None
    if run.completed > 0:
        checkpoint = checkpoints / f"checkpoint-{run.completed}"
        if not checkpoint.is_dir():
            raise ConfigError(
                "the run has no model checkpoint of its last completed step",
                where=str(checkpoint),
                remedy="Start over with run.overwrite=true; run.checkpoint_every writes checkpoints on the way.",
            )
    run.evaluate = trainer.evaluate
    trainer.add_callback(RecordInRun(run))
    try:
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
    except BaseException:
        run.stopped()
        raise
    trainer.reward_model.eval()
    return run.finish(**trainer.counts, **{"train/loss": result.training_loss})


def _place_checkpoints(trainer: RankingTrainer, run: Run) -> Path:
    """Tell the trainer where and how often to save; return the folder."""
    folder = run.directory / "checkpoints" / TRAINER
    trainer.args.output_dir = str(folder)
    trainer.args.save_total_limit = run.config.keep_checkpoints
    if run.config.checkpoint_every > 0:
        trainer.args.save_strategy = SaveStrategy.STEPS
        trainer.args.save_steps = run.config.checkpoint_every
    return folder
