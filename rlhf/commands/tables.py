"""Tables of results, generated from the `summary.json` and `config.yaml` that every run leaves in its directory."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.config import read_yaml
from rlhf.errors import DataError, UserError
from rlhf.markdown import markdown_table

MOST_COLUMNS = 6
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

    def metrics_of(self, iteration: int | None) -> dict[str, float]:
        """Return the summary's metrics, or those of one iteration's line in metrics.jsonl; empty without one."""
        if iteration is None:
            return self.metrics
        file = self.folder / "metrics.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        records = [record for record in map(json.loads, lines) if record.get("iteration") == iteration]
        return {name: value for name, value in (records[-1] if records else {}).items() if value is not None}


@dataclass(frozen=True)
class Column:
    """One column: a metric of the summary, or of one iteration's line in metrics.jsonl.

    Args:
        title: Above the column.
        metric: Its name.
        iteration: Whose line is read; None takes the summary.
        each: True lists the seeds' values, False shows mean and deviation.
    """

    title: str
    metric: str
    iteration: int | None = None
    each: bool = False

    @classmethod
    def parse(cls, text: str) -> Column:
        """Read `[TITLE=]METRIC[@ITERATION][@each]`.

        >>> Column.parse("before=evaluation/accuracy@0")
        Column(title='before', metric='evaluation/accuracy', iteration=0, each=False)
        """
        title, equals, metric = text.rpartition("=")
        metric, *marks = metric.split("@")
        numbers = [mark for mark in marks if mark != "each"]
        if not metric or len(numbers) > 1 or not all(number.isdecimal() for number in numbers):
            raise UserError("not a column", where="--metric", got=text, expected="[TITLE=]METRIC[@ITERATION][@each]")
        iteration = int(numbers[0]) if numbers else None
        return cls(title if equals else metric.removeprefix("evaluation/"), metric, iteration, "each" in marks)

    def value(self, run: FinishedRun) -> float | None:
        """Return the run's value; None where it reports none."""
        return run.metrics_of(self.iteration).get(self.metric)

    def cell(self, runs: Sequence[FinishedRun]) -> str:
        """Return what stands in the table for these runs."""
        values = [(run, self.value(run)) for run in sorted(runs, key=lambda run: run.seed or 0)]
        known = [value for _, value in values if value is not None]
        return ", ".join(_short(value) for value in known) if self.each else _mean_and_spread(known, len(runs))


def make_table(folders: Iterable[Path], *, metrics: Sequence[str] | None = None, row: str | None = None) -> str:
    """Write a markdown table: a row per recipe, config and settings; mean +- sample standard deviation (n).

    Args:
        folders: Folders that hold finished runs, at any depth.
        metrics: The columns, each as `Column.parse` reads it; None shows the first `MOST_COLUMNS` metrics whose name
            starts with `evaluation/`, or of all where there is none, and names the others below the table.
        row: What names a row: a setting such as `update.learning_rate`; `config`, the config's name; `folder`, the name
            of the folder above the seeds'; `seed` makes a row per run. `TITLE=...` sets the title above. None takes
            recipe, config and what differs.

    Raises:
        UserError: A folder holds no finished run, no run has a metric that was asked for, or `row` is no setting.
    """
    title, _, row = (row or "").rpartition("=")
    runs = [run for folder in folders for run in read_runs(folder)]
    runs = list({run.folder: run for run in runs}.values())
    columns, unshown = _columns(runs, metrics)
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        key = json.dumps([run.recipe, run.config_name, run.settings], sort_keys=True, default=str)
        groups.setdefault(f"{key}{run.seed}" if row == "seed" else key, []).append(run)
    names = _row_names([group[0] for group in groups.values()], row)
    rows = []
    for group, name in zip(groups.values(), names, strict=True):
        seeds = ", ".join(str(seed) for seed in sorted(run.seed for run in group if run.seed is not None))
        seconds = _mean_and_spread([run.seconds for run in group], len(group))
        rows.append([*name, *[column.cell(group) for column in columns], seconds, *([] if row == "seed" else [seeds])])
    header = [title or row.rsplit(".", 1)[-1]] if row else ["recipe", "config"]
    header += [*[column.title for column in columns], "seconds", *([] if row == "seed" else ["seeds"])]
    note = f"\n\nNot shown: {', '.join(unshown)}; choose with --metric." if unshown else ""
    return markdown_table(header, rows) + note


def _row_names(groups: Sequence[FinishedRun], row: str) -> list[list[str]]:
    if not row:
        return [[run.recipe, label] for run, label in zip(groups, _labels(groups), strict=True)]
    if row == "seed":
        return [[str(run.seed)] for run in groups]
    if row == "config":
        return [[run.config_name] for run in groups]
    if row == "folder":
        return [[run.folder.parent.name] for run in groups]
    for run in groups:
        if row not in run.settings:
            raise UserError("a run has no such setting", where=str(run.folder), got=row)
    return [[str(run.settings[row])] for run in groups]


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
            metrics={name: _number(value) for name, value in summary["metrics"].items()},
            settings={key: value for key, value in settings.items() if not key.startswith(RUN_SETTINGS)},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not the summary of a run ({type(error).__name__}: {error})", where=str(file)) from error


def _columns(runs: Sequence[FinishedRun], metrics: Sequence[str] | None) -> tuple[list[Column], list[str]]:
    """Return the columns, and the names of the metrics that were left out for want of room."""
    known = list(dict.fromkeys(name for run in runs for name in run.metrics))
    if metrics is None:
        names = [name for name in known if name.startswith("evaluation/")] or known
        return [Column.parse(name) for name in names[:MOST_COLUMNS]], names[MOST_COLUMNS:]
    columns = []
    for text in metrics:
        column = Column.parse(text)
        available = list(dict.fromkeys(name for run in runs for name in run.metrics_of(column.iteration)))
        if column.metric not in available:
            column = replace(column, metric=f"evaluation/{column.metric}")
        if column.metric not in available:
            raise UserError("no run has this metric", got=column.metric, expected=f"one of {', '.join(available)}")
        columns.append(column)
    return columns, []


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


def _number(value: Any) -> float:
    """JSON has no NaN: summaries hold null for it, as for the explained variance of returns that are all alike."""
    return float("nan") if value is None else float(value)
