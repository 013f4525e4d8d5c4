"""Every policy-optimization preset on CartPole: the check to run after touching the core; one table, one figure."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from classic_rl.experiments.grid import Grid, run_grid
from classic_rl.experiments.sanity import SOLVED, TASK, report, variants
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.training.experiment import write_report
from rlhf.training.run import Run, RunConfig


class SanityConfig(Config):
    """Which presets, on how many seeds."""

    presets: list[str] = []
    """Names; an empty list takes all that an environment can feed, and the trust-region methods."""
    seeds: list[int] = Field([0, 1, 2, 3, 4], min_length=1)
    """Each preset runs with each of them."""
    jobs: int = Field(2, ge=1)
    """Runs at a time, each in a process with one thread."""
    run: RunConfig = RunConfig()


def main(config: SanityConfig) -> dict[str, float]:
    """Write `table.md`, `figure.png` and `results.json` into the run directory."""
    methods = variants(Path(__file__).parent / "configs")
    unknown = sorted(set(config.presets) - set(methods))
    if unknown:
        raise ConfigError("no such preset", where="presets", got=", ".join(unknown), expected=", ".join(methods))
    chosen = {name: methods[name] for name in config.presets or methods}
    run = Run(config.run, resolved=config, iterations=0, recipe="sanity")
    grid = Grid(base={"ends_at_return": SOLVED}, tasks={TASK: {}}, variants=chosen, seeds=config.seeds)
    results = run_grid(grid, directory=run.directory, jobs=config.jobs, name="sanity")
    table, numbers = report(results, directory=run.directory)
    write_report(run, table, numbers)
    return run.finish(**numbers)


CONFIG = SanityConfig

if __name__ == "__main__":
    launch(__file__)
