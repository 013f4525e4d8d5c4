"""The pieces of Rainbow, each added to DQN alone and each left out of all: learning curves and a table."""

from __future__ import annotations

from pydantic import Field

from classic_rl.experiments.grid import Grid, run_grid
from classic_rl.experiments.off_policy import OffPolicyTraining
from classic_rl.experiments.rainbow import report
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.experiment import write_report
from rlhf.training.run import Run, RunConfig


class RainbowConfig(Config):
    """Which pieces, where, for how long."""

    grid: Grid
    jobs: int = Field(2, ge=1)
    """Runs at a time, each in a process with one thread."""
    run: RunConfig = RunConfig()


def main(config: RainbowConfig) -> dict[str, float]:
    """Write `table.md`, `figure.png` and `results.json` into the run directory."""
    run = Run(config.run, resolved=config, iterations=0, recipe="rainbow")
    results = run_grid(
        config.grid, training=OffPolicyTraining, directory=run.directory, jobs=config.jobs, name="rainbow"
    )
    table, numbers = report(results, directory=run.directory)
    write_report(run, table, numbers)
    return run.finish(**{f"late/{name}": sum(row["late"]) / len(row["late"]) for name, row in numbers.items()})


CONFIG = RainbowConfig

if __name__ == "__main__":
    launch(__file__)
