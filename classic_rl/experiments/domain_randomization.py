"""Policies trained in one world and in many, each tried in worlds it was not told about."""

from __future__ import annotations

from pathlib import Path

from classic_rl.experiments.figures import draw_bars
from classic_rl.experiments.grid import Grid, Results, diverged
from classic_rl.statistics import format_estimate
from rlhf.training.experiment import markdown_table, mean_and_interval


def report(grid: Grid, results: Results, *, directory: Path) -> tuple[str, dict[str, float]]:
    """Write figure.png; return the table and the numbers.

    Returns:
        Markdown with a row per variant and a column per world, and {"<task>/<variant>/<world>": mean greedy return}.
    """
    rows, numbers, bars = [], {}, []
    worlds = list(next(iter(results.values()))[0]["worlds"])
    for task in grid.tasks:
        for variant in grid.variants:
            runs = results[variant, task]
            returns = {"as trained": [run["greedy"] for run in runs]}
            returns |= {world: [run["worlds"][world] for run in runs] for world in worlds}
            estimates = {world: mean_and_interval(values) for world, values in returns.items()}
            rows.append([task, variant, *(format_estimate(estimate, digits=0) for estimate in estimates.values())])
            numbers |= {f"{task}/{variant}/{world}": estimate[0] for world, estimate in estimates.items()}
            bars += [(f"{variant}: {world}", estimates[world], returns[world]) for world in worlds]
    bars.sort(key=lambda bar: worlds.index(bar[0].split(": ", 1)[1]))  # variants side by side in each world
    draw_bars(
        directory / "figure.png",
        [name for name, _, _ in bars],
        measured=[estimate for _, estimate, _ in bars],
        label=f"greedy return; mean, 95 % interval and runs of {len(grid.seeds)} seeds",
        points=[points for _, _, points in bars],
        title="what a policy earns in worlds it was not trained in",
    )
    note = f"{len(grid.seeds)} seeds; greedy return, mean [95 % interval over seeds]."
    header = ["task", "variant", "as trained", *worlds]
    return markdown_table(header, rows) + "\n\n" + "\n".join([note, *diverged(results)]) + "\n", numbers
