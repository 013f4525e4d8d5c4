"""How far updates move a policy, and what it earns by it: natural gradient, TRPO, TRPO with a dual variable, PPO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from classic_rl.experiments.figures import draw_curves
from classic_rl.experiments.grid import Grid, Results, curves, diverged
from classic_rl.statistics import format_estimate
from rlhf.training.experiment import markdown_table, mean_and_interval


def report(grid: Grid, results: Results, *, directory: Path) -> tuple[str, dict[str, Any]]:
    """Write figure.png (return and KL per update); return the table and the numbers.

    Returns:
        Markdown, and {"<task>/<method>/return", "<task>/<method>/kl_largest"}.
    """
    panels: dict[str, Any] = {}
    for task in grid.tasks:
        panels[f"{task}: return"] = {name: curves(results, name, task) for name in grid.variants}
        panels[f"{task}: KL(old || new) of each update, nats"] = {
            name: curves(results, name, task, key="distance/kl") for name in grid.variants
        }
    draw_curves(
        directory / "figure.png",
        panels,
        logarithmic=[name for name in panels if "KL" in name],
        levels={name: _bound(grid) for name in panels if "KL" in name},
        title=f"mean and range over {len(grid.seeds)} seeds; dashed: the bound on the KL",
    )
    header = ["task", "method", "greedy return [95 % CI]", "last 100 episodes [95 % CI]", "KL, median", "KL, largest"]
    header += ["updates beyond the bound", "largest ratio", "actions whose ratio left [0.8, 1.2]"]
    rows, numbers = [], {}
    for task in grid.tasks:
        for name in grid.variants:
            row, largest = _row(results[name, task], bound=_bound(grid))
            rows.append([task, name, *row])
            numbers[f"{task}/{name}/return"] = float(np.mean([run["last_100"] for run in results[name, task]]))
            numbers[f"{task}/{name}/kl_largest"] = largest
    note = f"{len(grid.seeds)} seeds; KL: exact, mean over the rollout's states; bound {_bound(grid)} nats."
    return markdown_table(header, rows) + "\n\n" + "\n".join([note, *diverged(results)]) + "\n", numbers


def _row(runs: list[dict[str, Any]], *, bound: float) -> tuple[list[str], float]:
    kl, ratio, outside = (
        np.array([value for run in runs for value in run["recorded"][f"distance/{name}"]], dtype=np.float64)
        for name in ("kl", "ratio_max", "ratio_outside")
    )
    cells = [
        format_estimate(mean_and_interval([run["greedy"] for run in runs]), digits=1),
        format_estimate(mean_and_interval([run["last_100"] for run in runs]), digits=1),
        f"{np.median(kl):.4f}",
        f"{kl.max():.4f}",
        # Two forward passes of float32 differ in the last digits; TRPO's own test saw the step inside.
        f"{(kl > bound * 1.001).mean():.1%}",
        f"{ratio.max():.2f}",
        f"{outside.mean():.1%}",
    ]
    return cells, float(kl.max())


def _bound(grid: Grid) -> float:
    """The KL that the trust-region methods are set to."""
    return next(
        (
            float(changes["trust_region"]["max_kl"])
            for changes in grid.variants.values()
            if "max_kl" in changes.get("trust_region", {})
        ),
        0.01,
    )
