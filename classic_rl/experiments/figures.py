"""The figures of experiments: horizontal bars with intervals, and curves over environment steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def draw_bars(
    file: Path, names: Sequence[str], *, measured: Sequence[tuple[float, float, float]], label: str, **settings: Any
) -> None:
    """Draw a bar per name with its interval, the first on top.

    Args:
        file: The image.
        names: Of the bars.
        measured: (value, low, high) per bar.
        label: Of the axis.
        settings: "title"; "published", a number per bar or None, drawn as diamonds; "points", the runs behind each bar.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.34 * len(names)), layout="constrained")
    places = np.arange(len(names))[::-1]
    values = np.array([value for value, _, _ in measured])
    spread = np.array([[value - low, high - value] for value, low, high in measured]).T.clip(min=0)
    axes.barh(places, values, xerr=spread, height=0.6, color="#8fb3d9", ecolor="#1f3b5c", capsize=3, label="measured")
    for place, points in zip(places, settings.get("points") or [], strict=False):
        axes.plot(points, np.full(len(points), place), "o", color="#1f3b5c", markersize=3, alpha=0.6)
    published = [(v, p) for v, p in zip(settings.get("published") or [], places, strict=False) if v is not None]
    if published:
        axes.plot(*zip(*published, strict=True), "D", color="#c0392b", markersize=6, label="published")
        axes.legend(loc="lower left")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(places, names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel(label)
    axes.set_title(settings.get("title", ""))
    axes.grid(axis="x", alpha=0.3)
    _save(figure, file)


def draw_curves(
    file: Path, panels: Mapping[str, Mapping[str, Sequence[tuple[Sequence[float], Sequence[float]]]]], **settings: Any
) -> None:
    """Draw one panel per name: for each line the mean over its runs, and a band from the lowest to the highest run.

    Args:
        file: The image.
        panels: Panel -> line -> runs of (x, y); runs are interpolated onto common x.
        settings: "title"; "columns" of the grid; "size" of a panel in inches; "logarithmic", panels with a logarithmic
            y axis; "levels", panel -> a horizontal line; "xlabel".
    """
    plt = _pyplot()
    columns = settings.get("columns", min(2, len(panels)))
    rows = -(-len(panels) // columns)
    width, height = settings.get("size", (5.6, 3.6))
    figure, grid = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    for axes, (name, lines) in zip(grid.flat, panels.items(), strict=False):
        for index, (line, runs) in enumerate(lines.items()):
            x, runs_y = _common(runs)
            if not len(x):
                continue
            axes.plot(x, runs_y.mean(axis=0), label=line, color=f"C{index % 10}", linewidth=1.5)
            axes.fill_between(x, runs_y.min(axis=0), runs_y.max(axis=0), color=f"C{index % 10}", alpha=0.15)
        if name in settings.get("logarithmic", ()):
            axes.set_yscale("log")
        if name in settings.get("levels", {}):
            axes.axhline(settings["levels"][name], color="black", linestyle="--", linewidth=0.8)
        axes.set_title(name)
        axes.set_xlabel(settings.get("xlabel", "environment steps"))
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(settings.get("title", ""))
    _save(figure, file)


def _common(runs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[np.ndarray, np.ndarray]:
    """Runs on the x where all of them are: (x [K], y [runs, K])."""
    kept = []
    for x, y in runs:
        pairs = [(a, b) for a, b in zip(x, y, strict=True) if b is not None and np.isfinite(b)]
        if pairs:
            kept.append(np.array(pairs, dtype=np.float64).T)
    if not kept:
        return np.empty(0), np.empty((0, 0))
    start, stop = max(run[0, 0] for run in kept), min(run[0, -1] for run in kept)
    x = np.linspace(start, stop, 100)
    return x, np.stack([np.interp(x, run[0], run[1]) for run in kept])


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    _pyplot().close(figure)
