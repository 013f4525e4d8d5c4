"""The PPO paper's Table 1: eleven ways to hold an update back, on MuJoCo tasks.

Protocol of the paper: 7 environments x 3 seeds, a million steps each, mean return of the last 100 episodes; per
environment a random policy becomes 0 and the best run 1; a variant's score is the mean of its 21 runs.
Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, section 6.1 and Table 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from classic_rl.experiments.figures import draw_bars
from classic_rl.experiments.grid import Grid, Results, diverged, matrix
from classic_rl.statistics import (
    Estimate,
    format_estimate,
    interquartile_mean,
    mean,
    normalised,
    probability_of_improvement,
    stratified_interval,
)
from rlhf.training.experiment import Cell, markdown_table, run_cells

PUBLISHED = {
    "none": -0.39,
    "clip_0.1": 0.76,
    "clip_0.2": 0.82,
    "clip_0.3": 0.70,
    "adaptive_kl_0.003": 0.68,
    "adaptive_kl_0.01": 0.74,
    "adaptive_kl_0.03": 0.71,
    "fixed_kl_0.3": 0.62,
    "fixed_kl_1": 0.71,
    "fixed_kl_3": 0.72,
    "fixed_kl_10": 0.69,
}
"""Variant -> average normalised score in the paper's Table 1 (7 environments, a million steps)."""

BEST_PUBLISHED = "clip_0.2"


def random_returns(grid: Grid, *, directory: Path, jobs: int, episodes: int = 100) -> dict[str, float]:
    """Measure the mean return of a uniformly random policy on every task."""
    ids = {task: (grid.base | changes)["environment"]["id"] for task, changes in grid.tasks.items()}
    cells = [
        Cell(f"random-{task}", {"environment": identifier, "episodes": episodes, "seed": 0})
        for task, identifier in ids.items()
    ]
    played = run_cells(
        cells, "classic_rl.experiments.on_policy:play_randomly", directory=directory, jobs=jobs, name="random policy"
    )
    return {task: result["mean"] for task, result in zip(ids, played, strict=True)}


def scores(grid: Grid, results: Results, random: dict[str, float]) -> dict[str, np.ndarray]:
    """Return {variant: [seeds, tasks]} with 0 for the random policy and 1 for the best run of the task."""
    tasks = list(grid.tasks)
    raw = {variant: matrix(results, variant, tasks) for variant in grid.variants}
    best = np.max(np.stack(list(raw.values())), axis=(0, 1))
    lowest = np.array([random[task] for task in tasks])
    return {variant: normalised(values, lowest=lowest, highest=best) for variant, values in raw.items()}


def report(grid: Grid, results: Results, random: dict[str, float], *, directory: Path) -> tuple[str, dict[str, Any]]:
    """Write figure.png; return the table and the numbers.

    Returns:
        Markdown, and {"score/<variant>", "published_order" (Spearman's rank correlation of measured and published
        scores), "best", "worst"}.
    """
    by_variant = scores(grid, results, random)
    measured = {variant: stratified_interval(mean, values) for variant, values in by_variant.items()}
    reference = by_variant.get(BEST_PUBLISHED)
    rows = [_row(grid, results, name, by_variant[name], measured[name], reference) for name in by_variant]
    header = ["variant", "published", "score [95 % CI]", "IQM [95 % CI]", f"P({BEST_PUBLISHED} better)", *grid.tasks]
    order = [name for name in by_variant if name in PUBLISHED]
    ranks = [np.argsort(np.argsort([source[name] for name in order])) for source in (PUBLISHED, _values(measured))]
    numbers: dict[str, Any] = {f"score/{name}": estimate.value for name, estimate in measured.items()}
    numbers["published_order"] = float(np.corrcoef(*ranks)[0, 1]) if len(order) > 2 else float("nan")
    numbers["best"] = max(by_variant, key=lambda name: measured[name].value)
    numbers["worst"] = min(by_variant, key=lambda name: measured[name].value)
    draw_bars(
        directory / "figure.png",
        list(by_variant),
        measured=list(measured.values()),
        label="mean normalised score (random 0, best run 1)",
        published=[PUBLISHED.get(name) for name in by_variant],
        title=f"{len(grid.tasks)} environments x {len(grid.seeds)} seeds",
    )
    notes = [
        f"Best: {numbers['best']}, worst: {numbers['worst']}; rank correlation with the published scores "
        f"{numbers['published_order']:.2f}. Task columns: mean return of the last 100 episodes, mean +- standard "
        "deviation over seeds. Random policy: " + ", ".join(f"{task} {value:.1f}" for task, value in random.items()),
        *diverged(results),
    ]
    return markdown_table(header, rows) + "\n\n" + "\n".join(notes) + "\n", numbers


def _row(
    grid: Grid, results: Results, name: str, values: np.ndarray, estimate: Estimate, reference: np.ndarray | None
) -> list[str]:
    returns = matrix(results, name, list(grid.tasks))
    better = "-" if reference is None else f"{probability_of_improvement(reference, values):.2f}"
    spread = returns.std(axis=0, ddof=1) if len(returns) > 1 else np.zeros(returns.shape[1])
    return [
        name,
        f"{PUBLISHED[name]:.2f}" if name in PUBLISHED else "-",
        format_estimate(estimate),
        format_estimate(stratified_interval(interquartile_mean, values)),
        better,
        *(f"{value:.1f} +- {deviation:.1f}" for value, deviation in zip(returns.mean(axis=0), spread, strict=True)),
    ]


def _values(measured: dict[str, Estimate]) -> dict[str, float]:
    return {name: estimate.value for name, estimate in measured.items()}
