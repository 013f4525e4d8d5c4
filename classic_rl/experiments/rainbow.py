"""Table and figure of the `rainbow` recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from classic_rl.experiments.figures import draw_curves
from classic_rl.experiments.grid import Results
from rlhf.training.experiment import markdown_table, mean_and_interval


def report(results: Results, *, directory: Path) -> tuple[str, dict[str, Any]]:
    """Draw `figure.png`; return the table and all numbers.

    Two numbers per run: the mean greedy return over all evaluations (how fast it learns) and over the last quarter of
    them (how well it ends).
    """
    panels: dict[str, dict[str, list[tuple[list[Any], list[Any]]]]] = {}
    rows: list[list[str]] = []
    numbers: dict[str, Any] = {}
    for (variant, task), runs in sorted(results.items(), key=lambda item: item[0][1]):
        panels.setdefault(task, {})[variant] = [(run["env_steps"], run["greedy"]) for run in runs]
        whole = [sum(run["greedy"]) / len(run["greedy"]) for run in runs]
        late = [sum(last) / len(last) for last in (run["greedy"][-max(1, len(run["greedy"]) // 4) :] for run in runs)]
        seconds = sum(run["seconds"] for run in runs) / len(runs)
        rows.append([task, variant, _interval(whole), _interval(late), str(len(runs)), f"{seconds:.0f}"])
        numbers[f"{variant}-{task}"] = {"mean": whole, "late": late, "seconds": seconds}
    steps = {task: max(run["env_steps"][-1] for run in runs) for (_, task), runs in results.items()}
    told = ", ".join(f"{task} {count:,} steps" for task, count in steps.items())
    header = ["task", "agent", "mean over the run", "last quarter", "seeds", "seconds per run"]
    draw_curves(directory / "figure.png", panels, title="Greedy return")
    text = f"# Pieces of Rainbow\n\nGreedy returns, mean [95 % over seeds]; {told}.\n\n{markdown_table(header, rows)}\n"
    return text, numbers


def _interval(values: list[float]) -> str:
    mean, low, high = mean_and_interval(values)
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"
