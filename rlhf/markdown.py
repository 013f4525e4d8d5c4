"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table; bars inside cells are escaped.

    >>> print(markdown_table(["form", "variance"], [["trajectory", "12.5"]]))
    | form | variance |
    | --- | --- |
    | trajectory | 12.5 |
    """
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [header, *rows]]
    lines.insert(1, "|" + " --- |" * len(header))
    return "\n".join(lines)
