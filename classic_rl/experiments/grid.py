"""Grids of trainings: variants x tasks x seeds, all described in YAML."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from classic_rl.experiments.on_policy import Training
from rlhf.config import Config, merge_settings, validate
from rlhf.errors import TrainingError
from rlhf.training.experiment import Cell, run_cells

Results = dict[tuple[str, str], list[dict[str, Any]]]
"""(variant, task) -> what the cells' `train` returned, in the order of the seeds."""


class Grid(Config):
    """What is trained: the settings of a cell are `base`, changed by its task, changed by its variant."""

    base: dict[str, Any]
    """Settings that all cells share: of `classic_rl.experiments.on_policy.Training`, or of `OffPolicyTraining`."""
    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> changes of base; usually the environment."""
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    """Name -> changes of base and task; usually the algorithm."""
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Each variant runs on each task with each of them."""


def grid_cells(grid: Grid, *, training: type[Config] = Training) -> list[Cell]:
    """Return all cells, seed by seed, so that a stopped experiment has whole tables of its first seeds.

    Args:
        grid: What is trained.
        training: The config of one cell.

    Raises:
        ConfigError: Settings that no training accepts, with the cell's name.
    """
    cells = []
    for seed, task, variant in _order(grid):
        name = f"{variant}-{task}-seed_{seed}"
        settings = merge_settings(merge_settings(grid.base, grid.tasks[task]), grid.variants[variant]) | {"seed": seed}
        validate(training, settings, where=f"cell {name}")
        cells.append(Cell(name, settings))
    return cells


def _order(grid: Grid) -> Iterator[tuple[int, str, str]]:
    return itertools.product(grid.seeds, grid.tasks, grid.variants)


def run_grid(grid: Grid, *, training: type[Config] = Training, directory: Path, jobs: int, name: str) -> Results:
    """Train every cell that has no result in `directory` yet, by the `train` beside its config; see `run_cells`."""
    cells = grid_cells(grid, training=training)
    results = run_cells(cells, f"{training.__module__}:train", directory=directory, jobs=jobs, name=name)
    gathered: Results = {}
    for (_, task, variant), result in zip(_order(grid), results, strict=True):
        gathered.setdefault((variant, task), []).append(result)
    return gathered


def matrix(results: Results, variant: str, tasks: list[str], key: str = "last_100") -> np.ndarray:
    """[seeds, tasks] of one number per run.

    Raises:
        TrainingError: A run in which no episode ended has no mean return.
    """
    missing = [task for task in tasks if any(result[key] is None for result in results[variant, task])]
    if missing:
        raise TrainingError(
            f"a run of {variant!r} has no {key}: no episode ended in it",
            where=", ".join(missing),
            remedy="Train for more steps.",
        )
    return np.array([[result[key] for result in results[variant, task]] for task in tasks], dtype=np.float64).T


def curves(results: Results, variant: str, task: str, *, key: str = "returns") -> list[tuple[list[Any], list[Any]]]:
    """Runs of (environment steps, values): the returns, or a recorded metric."""
    runs = results[variant, task]
    return [(run["env_steps"], run["returns"] if key == "returns" else run["recorded"][key]) for run in runs]


def diverged(results: Mapping[Any, list[dict[str, Any]]]) -> list[str]:
    """Sentences about the runs that ended early because something was not finite."""
    return [
        f"{' on '.join(key)}, run {index}: {result['diverged']}"
        for key, runs in results.items()
        for index, result in enumerate(runs)
        if "diverged" in result
    ]
