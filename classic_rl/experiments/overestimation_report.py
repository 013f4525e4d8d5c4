"""Table and figures of the `overestimation` recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from classic_rl.experiments.figures import draw_curves
from classic_rl.experiments.grid import Results
from classic_rl.experiments.overestimation import CASES, PRINTED, STATES, expected_maximum, fit_errors, simulate_maxima
from rlhf.training.experiment import markdown_table, mean_and_interval

ACTION_COUNTS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def number_of_actions(*, draws: int) -> list[dict[str, float]]:
    """Figure 1: the bias of max and of the double estimate per number of actions."""
    rows = []
    for count in ACTION_COUNTS:
        single, double = simulate_maxima(count, draws=draws)
        rows.append({"actions": count, "exact": expected_maximum(count), "single": single, "double": double})
    return rows


def polynomial_fits() -> dict[str, dict[str, float]]:
    """Figure 2: the mean errors of both estimates, beside the printed ones."""
    rows = {}
    for name, (truth, degree) in CASES.items():
        errors = fit_errors(truth, degree)
        printed = PRINTED[name]
        rows[name] = {
            "single": float(errors.single.mean()),
            "double": float(errors.double.mean()),
            "printed_single": printed[0],
            "printed_double": printed[1],
        }
    return rows


def report(results: Results, *, directory: Path, draws: int) -> tuple[str, dict[str, Any]]:
    """Write the figures; return the table and all numbers.

    Args:
        results: Of the learning part: `train`'s with `measure_values`.
        directory: Where `figure_1.png`, `figure_2.png` and `figure.png` go.
        draws: Repetitions behind each bar of figure 1.
    """
    bars, fits = number_of_actions(draws=draws), polynomial_fits()
    draw_number_of_actions(directory / "figure_1.png", bars)
    draw_fits(directory / "figure_2.png")
    draw_curves(directory / "figure.png", _panels(results), title="Predicted and realised values of greedy play")
    first = [[f"{r['actions']}", *(f"{r[k]:.3f}" for k in ("exact", "single", "double"))] for r in bars]
    second = [
        [name, *(f"{row[key]:+.2f}" for key in ("single", "printed_single", "double", "printed_double"))]
        for name, row in fits.items()
    ]
    third, learnt = _value_rows(results)
    table = "\n\n".join(
        [
            "# Overestimation",
            f"## Independent N(0, 1) errors, all true values 0 ({draws} draws per row)\n\n"
            "The paper's figure 1 shows bars half as high (1/2 E max).",
            markdown_table(["actions", "E max, exact", "max Q, mean", "double estimate, mean"], first),
            "## Polynomial fits, no noise: mean error over [-6, 6], beside the numbers printed in figure 2",
            markdown_table(["true values", "max Q", "printed", "double estimate", "printed"], second),
            "## Learning: predicted and realised values, mean over the last quarter of each run's evaluations",
            markdown_table(["task", "agent", "predicted", "realised", "difference (95 % over seeds)", "seeds"], third),
        ]
    )
    return table + "\n", {"number_of_actions": bars, "polynomial_fits": fits, "learning": learnt}


def _panels(results: Results) -> dict[str, dict[str, list[tuple[list[Any], list[Any]]]]]:
    panels: dict[str, dict[str, list[tuple[list[Any], list[Any]]]]] = {}
    for (variant, task), runs in results.items():
        for kind in ("predicted", "realised"):
            panels.setdefault(task, {})[f"{variant}, {kind}"] = [(run["env_steps"], run[kind]) for run in runs]
    return panels


def _value_rows(results: Results) -> tuple[list[list[str]], dict[str, Any]]:
    rows, numbers = [], {}
    for (variant, task), runs in sorted(results.items(), key=lambda item: (item[0][1], item[0][0])):
        predicted, realised = (np.array([_late(run[kind]) for run in runs]) for kind in ("predicted", "realised"))
        mean, low, high = mean_and_interval((predicted - realised).tolist())
        difference = f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        rows.append([task, variant, f"{predicted.mean():.2f}", f"{realised.mean():.2f}", difference, str(len(runs))])
        numbers[f"{variant}-{task}"] = {"predicted": predicted.tolist(), "realised": realised.tolist()}
    return rows, numbers


def _late(curve: list[float | None]) -> float:
    """Mean over the last quarter, of the evaluations that could be measured."""
    late = np.array(curve[-max(1, len(curve) // 4) :], dtype=np.float64)
    known = late[np.isfinite(late)]
    return float(known.mean()) if len(known) else float("nan")


def draw_number_of_actions(file: Path, bars: list[dict[str, float]]) -> None:
    """Draw figure 1: bars of both estimates, and the exact expectation."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    places = np.arange(len(bars))
    axes.bar(places - 0.2, [row["single"] for row in bars], 0.4, label="max Q(s, a) - V*(s)", color="#e08214")
    axes.bar(places + 0.2, [row["double"] for row in bars], 0.4, label="Q'(s, argmax Q(s, a)) - V*(s)", color="#2166ac")
    axes.plot(places - 0.2, [row["exact"] for row in bars], "k_", markersize=14, label="E max of normals, exact")
    axes.plot(places - 0.2, [row["exact"] / 2 for row in bars], "k.", markersize=4, label="1/2 E max: the paper's bars")
    axes.set_xticks(places, [str(int(row["actions"])) for row in bars])
    axes.set_xlabel("number of actions")
    axes.set_ylabel("error")
    axes.legend()
    figure.savefig(file, dpi=130)
    plt.close(figure)


def draw_fits(file: Path) -> None:
    """Draw figure 2: per true function the fits, their maximum, and both errors."""
    plt = _pyplot()
    figure, grid = plt.subplots(len(CASES), 3, figsize=(12, 8), layout="constrained")
    for row, (name, (truth, degree)) in zip(grid, CASES.items(), strict=True):
        errors = fit_errors(truth, degree)
        row[0].plot(STATES, errors.truth, color="purple", label="V*")
        row[0].plot(STATES, errors.estimates[4], color="green", label="one action's fit")
        row[1].plot(STATES, errors.estimates.T, color="green", alpha=0.4, linewidth=0.8)
        row[1].plot(STATES, errors.truth + errors.single, "k--", label="max Q")
        row[2].plot(STATES, errors.single, color="#e08214", label=f"max: {errors.single.mean():+.2f}")
        row[2].plot(STATES, errors.double, color="#2166ac", label=f"double: {errors.double.mean():+.2f}")
        row[2].set_ylim(-2, 5)
        row[0].set_title(name)
        for axes in row:
            axes.legend(fontsize=7)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt
