"""Tables of results, generated from the `summary.json` and `config.yaml` that every run leaves in its directory."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import read_yaml
from rlhf.errors import DataError, UserError

RUN_SETTINGS = "run."
"""Settings that may differ between runs that are averaged: seed, directory, and how often a run looks at itself."""


@dataclass(frozen=True)
class FinishedRun:
    """One run's summary and settings.

    Args:
        folder: The run directory.
        recipe: The recipe's name.
        config_name: The config's name.
        seed: The run's seed.
        seconds: Wall-clock time.
        metrics: Final metrics by name.
        settings: The resolved config, flat: `a.b.c` to value, without those of `run`.
    """

    folder: Path
    recipe: str
    config_name: str
    seed: int | None
    seconds: float
    metrics: dict[str, float]
    settings: dict[str, Any]


def make_table(folders: Iterable[Path], *, metrics: Sequence[str] | None = None) -> str:
    """Write a markdown table: a row per recipe, config and settings; mean +- sample standard deviation (n).

    Args:
        folders: Folders that hold finished runs, at any depth.
        metrics: The columns; None shows every metric whose name starts with `evaluation/`, or every metric when
            there is none.

    Raises:
        UserError: A folder holds no finished run, or no run has a metric that was asked for.
    """
    runs = [run for folder in folders for run in read_runs(folder)]
    runs = list({run.folder: run for run in runs}.values())
    columns = _columns(runs, metrics)
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        key = json.dumps([run.recipe, run.config_name, run.settings], sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    rows = [["recipe", "config", *[column.removeprefix("evaluation/") for column in columns], "seconds", "seeds"]]
    labels = _labels([group[0] for group in groups.values()])
    for group, label in zip(groups.values(), labels, strict=True):
        cells = [_mean_and_spread([run.metrics[c] for run in group if c in run.metrics], len(group)) for c in columns]
        seeds = ", ".join(str(seed) for seed in sorted(run.seed for run in group if run.seed is not None))
        rows.append([group[0].recipe, label, *cells, _mean_and_spread([r.seconds for r in group], len(group)), seeds])
    return _markdown(rows)


def read_runs(folder: Path) -> list[FinishedRun]:
    """Every finished run in `folder`, at any depth, in the order of their paths."""
    if not folder.is_dir():
        raise UserError("no such folder", where=str(folder))
    summaries = sorted(folder.rglob("summary.json"))
    if not summaries:
        raise UserError("no finished run in this folder", where=str(folder), expected="a summary.json at any depth")
    return [_read_run(summary) for summary in summaries]


def _read_run(file: Path) -> FinishedRun:
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        config = file.parent / "config.yaml"
        settings = _flatten(read_yaml(config)) if config.is_file() else {}
        return FinishedRun(
            folder=file.parent.resolve(),
            recipe=summary["recipe"],
            config_name=summary["config_name"],
            seed=summary.get("seed"),
            seconds=float(summary["seconds"]),
            metrics={name: float(value) for name, value in summary["metrics"].items()},
            settings={key: value for key, value in settings.items() if not key.startswith(RUN_SETTINGS)},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not the summary of a run ({type(error).__name__}: {error})", where=str(file)) from error


def _columns(runs: Sequence[FinishedRun], metrics: Sequence[str] | None) -> list[str]:
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if metrics is None:
        return [name for name in known if name.startswith("evaluation/")] or known
    columns = [name if name in known else f"evaluation/{name}" for name in metrics]
    for name in columns:
        if name not in known:
            raise UserError("no run has this metric", got=name, expected=f"one of {', '.join(known)}")
    return columns


def _labels(groups: Sequence[FinishedRun]) -> list[str]:
    """Config names; where several groups share one, the settings in which they differ are added."""
    labels = []
    for group in groups:
        namesakes = [g for g in groups if (g.recipe, g.config_name) == (group.recipe, group.config_name)]
        keys = sorted({key for g in namesakes for key in g.settings})
        differing = [key for key in keys if len({str(g.settings.get(key)) for g in namesakes}) > 1]
        changes = ", ".join(f"{key}={group.settings[key]}" for key in differing if key in group.settings)
        labels.append(f"{group.config_name} ({changes})" if changes else group.config_name)
    return labels


def _mean_and_spread(values: Sequence[float], runs: int) -> str:
    """Mean +- sample standard deviation (n); n is written also where some runs lack the value."""
    if not values:
        return "-"
    mean = _short(statistics.fmean(values))
    if len(values) == 1:
        return mean if runs == 1 else f"{mean} (1)"
    if not all(math.isfinite(value) for value in values):
        return f"{mean} ({len(values)})"
    return f"{mean} ± {_short(statistics.stdev(values))} ({len(values)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines)
