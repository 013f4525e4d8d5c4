"""The lab's cells: a start per seed, and every variant from each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reward_models.overoptimization.settings import OptimizationConfig, StartConfig, Variant
from rlhf.training.experiment import Cell, run_cells

PREPARE = "reward_models.overoptimization.start:prepare"
OPTIMIZE = "reward_models.overoptimization.policy:optimize"


def start_cells(start: StartConfig, seeds: Sequence[int], directory: Path) -> list[Cell]:
    """One cell of `prepare` per seed."""
    return [Cell(f"start-seed_{seed}", _begin(start, seed, directory)) for seed in seeds]


def policy_cells(
    start: StartConfig,
    optimization: OptimizationConfig,
    variants: Mapping[str, Variant],
    *,
    seeds: Sequence[int],
    directory: Path,
) -> list[Cell]:
    """One cell of `optimize` per seed and variant, seed by seed.

    Each holds the settings of its start, too: where those change, the cell is run again.
    """
    shared = optimization.model_dump(mode="json")
    return [
        Cell(
            f"{name}-seed_{seed}",
            _begin(start, seed, directory)
            | {"optimization": shared, "variant": variant.model_dump(mode="json"), "name": name},
        )
        for seed in seeds
        for name, variant in variants.items()
    ]


def run_lab(
    start: StartConfig,
    optimization: OptimizationConfig,
    variants: Mapping[str, Variant],
    *,
    seeds: Sequence[int],
    directory: Path,
    jobs: int,
) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """Run every cell that has no result in `directory` yet; see `run_cells`.

    Returns:
        What `prepare` returned, by seed; and variant -> what `optimize` returned, by seed.
    """
    cells = policy_cells(start, optimization, variants, seeds=seeds, directory=directory)
    starts = run_cells(start_cells(start, seeds, directory), PREPARE, directory=directory, jobs=jobs, name="starts")
    done = run_cells(cells, OPTIMIZE, directory=directory, jobs=jobs, name="policies")
    return starts, {name: done[index :: len(variants)] for index, name in enumerate(variants)}


def _begin(start: StartConfig, seed: int, directory: Path) -> dict[str, Any]:
    return {"start": start.model_dump(mode="json"), "seed": seed, "folder": str(directory / f"seed_{seed}")}
