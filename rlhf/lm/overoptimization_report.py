"""What an over-optimization experiment shows at its end: tables, and gold score and proxy over sqrt(KL)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.errors import DataError
from rlhf.lm.overoptimization import Curve, Fit, Form
from rlhf.markdown import markdown_table

Group = Mapping[str, Sequence[Curve]]
"""Name -> one curve per seed."""


@dataclass(frozen=True)
class Panel:
    """One column of the figure.

    Attributes:
        title: Above it.
        form: What is fitted to its gold scores.
        curves: Its lines.
        beside: Lines of other panels to compare with, drawn in grey and without a fit.
    """

    title: str
    form: Form
    curves: Group
    beside: Group = field(default_factory=dict)


def seed_fits(curves: Sequence[Curve], form: Form) -> list[Fit | None]:
    """A fit per seed, for each seed has reward models of its own; None where a run has too few points."""
    fits: list[Fit | None] = []
    for curve in curves:
        try:
            fits.append(curve.fit(form))
        except DataError:
            fits.append(None)
    return fits


def run_table(panels: Sequence[Panel]) -> str:
    """A row per line of the figure: means over seeds, those of the seeds' fits included."""
    header = ["optimized by", "gold: start", "peak", "end", "sqrt(KL): peak", "end", "proxy: peak", "end"]
    header += ["gain lost", "over-optimized", "alpha", "beta", "R²", "residual"]
    rows = []
    for panel in panels:
        for name, curves in panel.curves.items():
            fits = [fit for fit in seed_fits(curves, panel.form) if fit is not None]
            at_peak = [curve.peak for curve in curves]
            fallen = sum(curve.overoptimized for curve in curves)
            rows.append(
                [
                    name,
                    _spread([curve.gold[0] for curve in curves]),
                    _spread([curve.gold[i] for curve, i in zip(curves, at_peak, strict=True)]),
                    _spread([curve.gold[-1] for curve in curves]),
                    _spread([curve.distances[i] for curve, i in zip(curves, at_peak, strict=True)]),
                    _spread([curve.distances[-1] for curve in curves]),
                    _spread([curve.proxy[i] for curve, i in zip(curves, at_peak, strict=True)]),
                    _spread([curve.proxy[-1] for curve in curves]),
                    f"{np.mean([curve.lost for curve in curves]):.0%}",
                    f"{fallen} of {len(curves)}",
                    _spread([fit.alpha for fit in fits]),
                    _spread([fit.beta for fit in fits]),
                    _mean([fit.r_squared for fit in fits], digits=2),
                    _mean([fit.residual for fit in fits], digits=3),
                ]
            )
    return markdown_table(header, rows)


def seed_table(panels: Sequence[Panel], seeds: Sequence[int]) -> str:
    """Gold at the start, at its peak (and at which KL) and at the end (and at which KL), by seed."""
    rows = []
    for panel in panels:
        for name, curves in panel.curves.items():
            cells = []
            for curve in curves:
                peak, values = curve.peak, (curve.gold[0], curve.gold[curve.peak], curve.gold[-1])
                start, best, end = (f"{value:.3f}" for value in values)
                cells.append(f"{start}, {best} ({max(curve.kl[peak], 0):.1f}), {end} ({max(curve.kl[-1], 0):.1f})")
            rows.append([name, *cells])
    return markdown_table(["optimized by", *(f"seed {seed}" for seed in seeds)], rows)


def best_of_n_table(ns: Sequence[int], curves: Group) -> str:
    """Gold of the best of n, a column per way of choosing; the proxy of the first one besides."""
    first = next(iter(curves))
    header = ["n", "KL", "sqrt(KL)", *(f"gold: {name}" for name in curves), f"proxy: {first}"]
    rows = []
    for index, n in enumerate(ns):
        one = curves[first][0]
        gold = [_spread([curve.gold[index] for curve in group]) for group in curves.values()]
        proxy = _spread([curve.proxy[index] for curve in curves[first]])
        rows.append([str(n), f"{one.kl[index]:.2f}", f"{one.distances[index]:.2f}", *gold, proxy])
    return markdown_table(header, rows)


def answer_table(curve: Curve, answers: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """The same prompts' answers at the start, at the gold score's peak and at the end: what was found in between.

    Args:
        curve: Of one run.
        answers: Per measurement, records of prompt, completion, gold and proxy.
    """
    moments = {"start": 0, "gold's peak": curve.peak, "end": len(curve.gold) - 1}
    header = ["prompt", *(f"{name}: answer (gold, proxy)" for name in moments)]
    rows = []
    for row, record in enumerate(answers[0]):
        told = [answers[moment][row] for moment in moments.values()]
        rows.append([record["prompt"], *(f"{a['completion']} ({a['gold']:.2f}, {a['proxy']:.2f})" for a in told)])
    return markdown_table(header, rows)


def fit_numbers(panels: Sequence[Panel]) -> dict[str, Any]:
    """The fits as JSON: {line: [one per seed, null where a run has too few points]}."""
    return {
        name: [None if fit is None else {**asdict(fit), "peak": fit.peak} for fit in seed_fits(curves, panel.form)]
        for panel in panels
        for name, curves in panel.curves.items()
    }


def draw(panels: Sequence[Panel], file: Path, *, gold_label: str, proxy_label: str) -> None:
    """Write the figure: gold above, proxy below, a column per panel; seeds as thin lines, their fits' mean dashed.

    Args:
        panels: Left to right.
        file: A .png file.
        gold_label: Of the upper row.
        proxy_label: Of the lower row.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(
        2,
        len(panels),
        figsize=(4.9 * len(panels), 7.2),
        squeeze=False,
        sharex=True,
        sharey="row",
        layout="constrained",
    )
    for column, panel in enumerate(panels):
        gold, proxy = grid[:, column]
        greys = {name: (curves, str(0.3 + 0.3 * index)) for index, (name, curves) in enumerate(panel.beside.items())}
        colored = {name: (curves, f"C{index}") for index, (name, curves) in enumerate(panel.curves.items())}
        for name, (curves, color) in (greys | colored).items():
            for curve in curves:
                for axes, values in ((gold, curve.gold), (proxy, curve.proxy)):
                    axes.plot(curve.distances, values, ".-", color=color, alpha=0.45, linewidth=0.8, markersize=4)
            gold.plot([], [], ".-", color=color, label=name)
            if name in colored:
                _draw_fit(gold, curves, panel.form, color=color)
        shape = r"$d\,(\alpha - \beta d)$" if panel.form == "best_of_n" else r"$d\,(\alpha - \beta \log d)$"
        gold.plot([], [], "--", color="black", linewidth=1.8, label=f"fit: {shape}")
        gold.set_title(panel.title)
        gold.legend(fontsize=8)
        proxy.set_xlabel("d = sqrt(KL to the start), KL in nats per answer")
        for axes in (gold, proxy):
            axes.grid(alpha=0.3)
    grid[0, 0].set_xlim(left=0)
    grid[0, 0].set_ylim(bottom=0)
    grid[0, 0].set_ylabel(gold_label)
    grid[1, 0].set_ylabel(proxy_label)
    seeds = max(len(curves) for panel in panels for curves in panel.curves.values())
    figure.suptitle(f"{seeds} seed{'s' * (seeds > 1)}, a thin line each; dashed: the mean of their fits")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def _draw_fit(axes: Any, curves: Sequence[Curve], form: Form, *, color: str) -> None:
    """The mean of the seeds' fits, over the distances that were measured."""
    fits = [fit for fit in seed_fits(curves, form) if fit is not None]
    if not fits:
        return
    start = float(np.mean([curve.gold[0] for curve in curves]))
    distances = np.linspace(0, max(max(curve.distances) for curve in curves), 200)
    axes.plot(distances, start + np.mean([fit(distances) for fit in fits], axis=0), "--", color=color, linewidth=1.8)


def _spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation over seeds."""
    mean = _mean(values, digits=3)
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean


def _mean(values: Sequence[float], *, digits: int) -> str:
    return f"{np.mean(values):.{digits}f}" if values else "-"
