"""Optimize a reward model too far, on purpose: gold score and proxy over sqrt(KL), fits, and what helps."""

from __future__ import annotations

from pydantic import Field

from reward_models.overoptimization.grid import run_lab
from reward_models.overoptimization.plan import plan_lab
from reward_models.overoptimization.report import report
from reward_models.overoptimization.settings import OptimizationConfig, StartConfig, Variant
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.experiment import write_report
from rlhf.training.run import Run, RunConfig


class OveroptimizationConfig(Config):
    """A start per seed, and every variant from it."""

    start: StartConfig
    optimization: OptimizationConfig
    variants: dict[str, Variant] = Field(min_length=1)
    """Name -> what is optimized, and what holds it."""
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Each has a policy, rankings and reward models of its own."""
    jobs: int = Field(2, ge=1)
    """Cells at a time, each in a process with one thread."""
    run: RunConfig = RunConfig()

    def plan(self) -> list[str]:
        """What `rlhf explain` tells of it."""
        seeds = len(self.seeds)
        return plan_lab(self.start, self.optimization, self.variants, seeds=seeds, jobs=self.jobs)


def main(config: OveroptimizationConfig) -> dict[str, float]:
    """Write `table.md`, `figure.png` and `results.json` into the run directory."""
    run = Run(config.run, resolved=config, iterations=0, recipe="overoptimization")
    starts, policies = run_lab(
        config.start,
        config.optimization,
        config.variants,
        seeds=config.seeds,
        directory=run.directory,
        jobs=config.jobs,
    )
    table, numbers = report(starts, policies, variants=config.variants, seeds=config.seeds, directory=run.directory)
    write_report(run, table, numbers)
    return run.finish(**numbers["summary"])


CONFIG = OveroptimizationConfig

if __name__ == "__main__":
    launch(__file__)
