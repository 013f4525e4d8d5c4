"""Natural gradient, TRPO, its dual form and PPO side by side: the KL of each update, and the return."""

from __future__ import annotations

from pydantic import Field

from classic_rl.experiments.grid import Grid, run_grid
from classic_rl.experiments.trust_region import report
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.experiment import write_report
from rlhf.training.run import Run, RunConfig


class TrustRegionConfig(Config):
    """Which methods on which environments, for how long."""

    grid: Grid
    jobs: int = Field(2, ge=1)
    """Runs at a time, each in a process with one thread."""
    run: RunConfig = RunConfig()


def main(config: TrustRegionConfig) -> dict[str, float]:
    """Write `table.md`, `figure.png` and `results.json` into the run directory."""
    run = Run(config.run, resolved=config, iterations=0, recipe="trust_region")
    results = run_grid(config.grid, directory=run.directory, jobs=config.jobs, name="trust_region")
    table, numbers = report(config.grid, results, directory=run.directory)
    write_report(run, table, numbers)
    return run.finish(**numbers)


CONFIG = TrustRegionConfig

if __name__ == "__main__":
    launch(__file__)
