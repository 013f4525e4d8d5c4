"""The PPO paper's table of eleven surrogates, measured beside the published scores; stops and resumes cell by cell."""

from __future__ import annotations

from pydantic import Field

from classic_rl.experiments.grid import Grid, run_grid
from classic_rl.experiments.ppo_surrogates import random_returns, report
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.experiment import write_report
from rlhf.training.run import Run, RunConfig


class SurrogatesConfig(Config):
    """Which variants on which environments, for how long."""

    grid: Grid
    jobs: int = Field(2, ge=1)
    """Runs at a time, each in a process with one thread."""
    run: RunConfig = RunConfig()


def main(config: SurrogatesConfig) -> dict[str, float]:
    """Write `table.md`, `figure.png` and `results.json` into the run directory."""
    run = Run(config.run, resolved=config, iterations=0, recipe="ppo_surrogates")
    random = random_returns(config.grid, directory=run.directory, jobs=config.jobs)
    results = run_grid(config.grid, directory=run.directory, jobs=config.jobs, name="ppo_surrogates")
    table, numbers = report(config.grid, results, random, directory=run.directory)
    write_report(run, table, numbers)
    return run.finish(**numbers)


CONFIG = SurrogatesConfig

if __name__ == "__main__":
    launch(__file__)
