"""Table and figure of the experiment `policy_gradient_variance`."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from classic_rl.experiments.policy_gradient_variance import VARIANTS
from rlhf.training.experiment import markdown_table, mean_and_interval

LAST = 5
"""Rollouts whose mean is the final return."""


def make_table(fixed: list[dict[str, Any]], trained: dict[str, list[dict[str, Any]]]) -> str:
    """Two markdown tables: variance at fixed policies, and what training by each form came to.

    Args:
        fixed: Per seed, results that measured every form at the same policies.
        trained: Per form and seed, results that measured the form itself.
    """
    updates = [record["update"] for record in fixed[0]["statistics"]]
    levels = [np.mean([result["statistics"][index]["return"] for result in fixed]) for index in range(len(updates))]
    header = [
        "form",
        *(f"after {update} updates (return {level:.0f})" for update, level in zip(updates, levels, strict=True)),
    ]
    rows = [[name, *(_variance_cell(fixed, index, name) for index in range(len(updates)))] for name in VARIANTS]
    outcome = [
        [
            name,
            _interval([np.mean(result["returns"]) for result in results]),
            _interval([np.mean(result["returns"][-LAST:]) for result in results]),
        ]
        for name, results in trained.items()
    ]
    outcome_header = ["form", "mean return over all training", f"mean return of the last {LAST} rollouts"]
    return "\n".join(
        [
            "Variance of one episode's gradient (trace of the covariance, median over seeds), and in brackets the",
            "episodes needed until the mean's standard error is as long as the gradient:",
            "",
            markdown_table(header, rows),
            "",
            "Learning, mean over seeds and 95 % bootstrap interval:",
            "",
            markdown_table(outcome_header, outcome),
            "",
        ]
    )


def _variance_cell(fixed: list[dict[str, Any]], index: int, name: str) -> str:
    records = [result["statistics"][index]["forms"][name] for result in fixed]
    needed = median(_number(record["episodes_needed"]) for record in records)
    told = f"{needed:.3g}" if math.isfinite(needed) else "not resolved"
    return f"{median(record['variance'] for record in records):.3g} ({told})"


def _number(value: Any) -> float:
    """Infinity, which JSON lacks, comes back as None or as text."""
    return float("inf") if value is None else float(value)


def _interval(values: list[float]) -> str:
    mean, low, high = mean_and_interval(values)
    return f"{mean:.0f} [{low:.0f}, {high:.0f}]"


def draw(fixed: list[dict[str, Any]], trained: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Draw variance at fixed policies, variance along training, and learning curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bars, along, curves) = pyplot.subplots(1, 3, figsize=(17, 5))
    colours = dict(zip(VARIANTS, pyplot.get_cmap("tab10").colors, strict=False))
    updates = [record["update"] for record in fixed[0]["statistics"]]
    for place, (name, colour) in enumerate(colours.items()):
        heights = [
            median(result["statistics"][index]["forms"][name]["variance"] for result in fixed)
            for index in range(len(updates))
        ]
        bars.bar(np.arange(len(updates)) + 0.13 * (place - 2.5), heights, 0.12, color=colour, label=name)
    bars.set_xticks(range(len(updates)), [f"{update} updates" for update in updates])
    bars.set(yscale="log", title="variance of one episode's gradient, same policies", ylabel="trace of the covariance")
    for name, results in trained.items():
        records = [result["statistics"] for result in results]
        times = [record["update"] for record in records[0]]
        middle = [median(seed[index]["forms"][name]["variance"] for seed in records) for index in range(len(times))]
        along.plot(times, middle, color=colours[name], label=name, marker="o", markersize=3)
        _curve(curves, np.array([result["returns"] for result in results]), colours[name])
    along.set(yscale="log", title="the same along each form's own training", xlabel="updates")
    curves.set(title="learning (mean over seeds, 95 % interval)", xlabel="updates", ylabel="return of a rollout")
    curves.legend(*bars.get_legend_handles_labels(), fontsize=8, loc="lower right")
    for axes in (bars, along, curves):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _curve(axes: Any, returns: np.ndarray, colour: Any) -> None:
    """Plot [seeds, updates]."""
    intervals = np.array([mean_and_interval(column) for column in returns.T])
    axes.plot(intervals[:, 0], color=colour)
    axes.fill_between(range(len(intervals)), intervals[:, 1], intervals[:, 2], color=colour, alpha=0.15, linewidth=0)
