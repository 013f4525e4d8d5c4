"""PPO with nine implementation details, and without each of them: what carries the result, with intervals."""

from __future__ import annotations

from pydantic import Field

from classic_rl.experiments.grid import Grid, run_grid
from classic_rl.experiments.implementation_details import report
from classic_rl.experiments.ppo_surrogates import random_returns
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.experiment import write_report
from rlhf.training.run import Run, RunConfig


class DetailsConfig(Config):
    """Which variants on which environments, for how long."""

    grid: Grid
    jobs: int = Field(2, ge=1)
    """Runs at a time, each in a process with one thread."""
    run: RunConfig = RunConfig()


def main(config: DetailsConfig) -> dict[str, float]:
    """Write `table.md`, `figure.png` and `results.json` into the run directory."""
    run = Run(config.run, resolved=config, iterations=0, recipe="implementation_details")
    random = random_returns(config.grid, directory=run.directory, jobs=config.jobs)
    results = run_grid(config.grid, directory=run.directory, jobs=config.jobs, name="implementation_details")
    table, numbers = report(config.grid, results, random, directory=run.directory)
    write_report(run, table, numbers)
    return run.finish(**numbers)


CONFIG = DetailsConfig

if __name__ == "__main__":
    launch(__file__)
