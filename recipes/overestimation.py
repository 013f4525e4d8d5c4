"""Why max over Q is too large: Double DQN's two figures, and predicted beside realised values while learning."""

from __future__ import annotations

from pydantic import Field

from classic_rl.experiments.grid import Grid, run_grid
from classic_rl.experiments.off_policy import OffPolicyTraining
from classic_rl.experiments.overestimation_report import report
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.experiment import write_report
from rlhf.training.run import Run, RunConfig


class OverestimationConfig(Config):
    """How many draws behind figure 1, and which agents learn where."""

    draws: int = Field(100, ge=1)
    """Repetitions behind each bar of figure 1; the paper's are 100."""
    grid: Grid
    jobs: int = Field(2, ge=1)
    """Runs at a time, each in a process with one thread."""
    run: RunConfig = RunConfig()


def main(config: OverestimationConfig) -> dict[str, float]:
    """Write `table.md`, three figures and `results.json` into the run directory."""
    run = Run(config.run, resolved=config, iterations=0, recipe="overestimation")
    results = run_grid(
        config.grid, training=OffPolicyTraining, directory=run.directory, jobs=config.jobs, name="overestimation"
    )
    table, numbers = report(results, directory=run.directory, draws=config.draws)
    write_report(run, table, numbers)
    return run.finish(
        **{
            f"error/{name} {kind}": value
            for name, row in numbers["polynomial_fits"].items()
            for kind, value in row.items()
        }
    )


CONFIG = OverestimationConfig

if __name__ == "__main__":
    launch(__file__)
