"""Settings of a run: where it writes, how often it looks at itself."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from rlhf.config import Config


class RunConfig(Config):
    """The run directory and its rhythm."""

    directory: str | None = None
    """Where everything is written; null is runs/<recipe>/<config name>/seed_<seed>."""
    seed: int = Field(0, ge=0)
    """Of everything random: initial weights, environments, sampling, shuffling."""
    evaluate_every: int = Field(0, ge=0)
    """Iterations between evaluations, the first before iteration 1; 0 evaluates at the end only."""
    checkpoint_every: int = Field(0, ge=0)
    """Iterations between checkpoints; 0 saves at the end only."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the latest checkpoints stay; the best one stays besides."""
    best_metric: str | None = None
    """An evaluation's metric, such as return_mean, whose best checkpoint is kept; null keeps none for its merit."""
    best_is: Literal["highest", "lowest"] | None = None
    """Which value of best_metric is the best; null is the lowest of a loss or perplexity, the highest of others."""
    resume: bool = False
    """Go on from the latest checkpoint in the directory, exactly as if the run had not stopped."""
    overwrite: bool = False
    """Delete what an earlier run left in the directory."""
    trackers: list[str] = []
    """accelerate's trackers by name: tensorboard, wandb, trackio and others. The files are written in any case."""
    log_every: int = Field(1, ge=1)
    """Iterations between console lines and tracker entries; metrics.jsonl has all of them."""
    progress_bar: bool = True
    """Show a bar with the remaining time where the output is a terminal."""

    @model_validator(mode="after")
    def _refuse_both(self) -> Self:
        if self.resume and self.overwrite:
            raise ValueError("resume goes on with what overwrite would delete; choose one")
        return self


def lowest_is_best(run: RunConfig) -> bool:
    """Whether less of `best_metric` is better.

    >>> lowest_is_best(RunConfig(best_metric="loss")), lowest_is_best(RunConfig(best_metric="return_mean"))
    (True, False)
    """
    if run.best_is is not None:
        return run.best_is == "lowest"
    return (run.best_metric or "").endswith(("loss", "perplexity"))
