"""What a pipeline shows at its end: one table, one figure, a few completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from rlhf.commands.stages import StageResult
from rlhf.config import Config
from rlhf.errors import ConfigError
from rlhf.markdown import markdown_table


class Panel(Config):
    """One panel of the figure: how some metrics of a stage developed."""

    title: str
    """Above the panel."""
    stage: str
    """Name of the stage whose metrics.jsonl is drawn."""
    ylabel: str = ""
    """Beside the vertical axis."""
    metrics: dict[str, str] = Field(min_length=1)
    """Label -> name in metrics.jsonl."""


def report_table(results: Sequence[StageResult], columns: dict[str, list[str]]) -> list[list[str]]:
    """Header and one row per stage; a dash where a stage does not report a column.

    Args:
        results: Finished stages, in order.
        columns: Column title -> metrics, the first reported of which is shown.
    """
    rows = [["stage", *columns]]
    for result in results:
        values = [result.first(names) for names in columns.values()]
        rows.append([result.stage.title, *("-" if value is None else _number(value) for value in values)])
    return rows


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Show the table on the terminal."""
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)


def sample_pages(results: Sequence[StageResult], *, each: int = 3) -> str:
    """Markdown of the first and last iteration's samples of every stage that kept some."""
    pages = []
    for result in results:
        records = _read_lines(result.directory / "samples.jsonl")
        if not records:
            continue
        first, last = records[0]["iteration"], records[-1]["iteration"]
        pages.append(f"## {result.stage.title}")
        for iteration in (first, last):
            chosen = [record for record in records if record["iteration"] == iteration][:each]
            lines = [[_cell(r["prompt"]), _cell(r["completion"]), _number(r["score"])] for r in chosen]
            table = markdown_table(["prompt", "completion", "score"], lines)
            pages.append(f"Iteration {iteration}\n\n{table}")
    return "\n\n".join(pages) + "\n"


def draw_panels(results: Sequence[StageResult], panels: Sequence[Panel], file: Path) -> None:
    """Write the figure.

    Args:
        results: Finished stages.
        panels: What to draw, side by side.
        file: A .png file.

    Raises:
        ConfigError: A panel names a stage or metric that does not exist.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.4), squeeze=False, layout="constrained")
    by_name = {result.stage.name: result for result in results}
    for axis, panel in zip(axes[0], panels, strict=True):
        if panel.stage not in by_name:
            raise ConfigError(f"no stage named {panel.stage!r}", where="figure", expected=", ".join(by_name))
        records = _read_lines(by_name[panel.stage].directory / "metrics.jsonl")
        for label, name in panel.metrics.items():
            points = [(record["iteration"], record[name]) for record in records if record.get(name) is not None]
            if not points:
                raise ConfigError(f"stage {panel.stage!r} reports no {name!r}", where=f"figure, panel {panel.title!r}")
            sparse = len(points) < len(records) / 2  # an evaluation now and then: show where
            axis.plot(*zip(*points, strict=True), label=label, marker="o" if sparse else None, linewidth=1.6)
        axis.set(title=panel.title, xlabel="iteration", ylabel=panel.ylabel)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=140)
    plt.close(figure)


def _read_lines(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _cell(text: Any) -> str:
    """Text on one line."""
    words = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return words.replace("\n", " ")


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3f}"
