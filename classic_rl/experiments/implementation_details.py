"""Which implementation details carry PPO: nine of them, each left out in turn.

The nine: value clip, reward scaling, orthogonal start, learning-rate annealing, reward clip, observation normalization,
observation clip, tanh activations, gradient clip. (The reward clip acts on scaled rewards, the observation clip on
normalized observations.)
Source: Engstrom et al. 2020, "Implementation matters in deep policy gradients", https://arxiv.org/abs/2005.12729.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from classic_rl.experiments.figures import draw_bars
from classic_rl.experiments.grid import Grid, Results, diverged, matrix
from classic_rl.statistics import (
    format_estimate,
    mean,
    normalised,
    probability_of_improvement,
    stratified_interval,
)
from rlhf.training.experiment import markdown_table, mean_and_interval


def report(grid: Grid, results: Results, random: dict[str, float], *, directory: Path) -> tuple[str, dict[str, Any]]:
    """Write figure.png; return the table and the numbers. The first variant is the reference.

    Scores: per task, a random policy is 0 and the reference's mean return 1.

    Returns:
        Markdown, and {"score/<variant>"}.
    """
    tasks, reference = list(grid.tasks), next(iter(grid.variants))
    returns = {variant: matrix(results, variant, tasks) for variant in grid.variants}
    lowest, highest = np.array([random[task] for task in tasks]), returns[reference].mean(axis=0)
    by_variant = {name: normalised(values, lowest=lowest, highest=highest) for name, values in returns.items()}
    measured = {name: stratified_interval(mean, values) for name, values in by_variant.items()}
    rows = [
        [
            name,
            format_estimate(measured[name]),
            f"{probability_of_improvement(by_variant[reference], values):.2f}",
            *(format_estimate(mean_and_interval(column), digits=0) for column in returns[name].T),
        ]
        for name, values in by_variant.items()
    ]
    header = ["variant", "score [95 % CI]", f"P({reference} better)", *(f"{task} [95 % CI]" for task in tasks)]
    draw_bars(
        directory / "figure.png",
        list(by_variant),
        measured=list(measured.values()),
        points=[values.reshape(-1) for values in by_variant.values()],
        label=f"mean score (random 0, {reference!r} 1)",
        title=f"{len(tasks)} environments x {len(grid.seeds)} seeds",
    )
    notes = [
        f"Returns: mean of the last 100 training episodes, {len(grid.seeds)} seeds. Random policy: "
        + ", ".join(f"{task} {value:.1f}" for task, value in random.items()),
        *diverged(results),
    ]
    numbers = {f"score/{name}": estimate.value for name, estimate in measured.items()}
    return markdown_table(header, rows) + "\n\n" + "\n".join(notes) + "\n", numbers
