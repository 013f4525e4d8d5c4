"""Train in one world and in randomized ones, then try every policy in worlds that differ from the simulator."""

from __future__ import annotations

from pydantic import Field

from classic_rl.experiments.domain_randomization import report
from classic_rl.experiments.grid import Grid, run_grid
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.experiment import write_report
from rlhf.training.run import Run, RunConfig


class DomainRandomizationConfig(Config):
    """What is trained, and how many runs go at a time."""

    grid: Grid
    jobs: int = Field(2, ge=1)
    """Runs at a time, each in a process with one thread."""
    run: RunConfig = RunConfig()


def main(config: DomainRandomizationConfig) -> dict[str, float]:
    """Write `table.md`, `figure.png` and `results.json` into the run directory."""
    run = Run(config.run, resolved=config, iterations=0, recipe="domain_randomization")
    results = run_grid(config.grid, directory=run.directory, jobs=config.jobs, name="domain_randomization")
    table, numbers = report(config.grid, results, directory=run.directory)
    write_report(run, table, numbers)
    return run.finish(**numbers)


CONFIG = DomainRandomizationConfig

if __name__ == "__main__":
    launch(__file__)
