"""The table of `benchmarks/ppo.py`, written anew from all numbers kept so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, part: str, measured: dict[str, Any], *, threads: int, epochs: dict[str, int]) -> None:
    """Keep one part of one case, and write the table of all kept ones, in the order of `epochs`."""
    file = RESULTS / "ppo.json"
    kept: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    conditions = f"{threads} thread(s), torch {torch.__version__}"
    kept.setdefault(name, {})[part] = measured | {"conditions": conditions}
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(kept, indent=2) + "\n")
    lines = [
        "# One PPO step: ours against TRL 1.12's PPOTrainer",
        "",
        "64 prompts, one completion each, one optimizer step an epoch, separate critic, reward model, reference; CPU "
        "float32. Medians; the ratio is the median over turns of TRL's time / ours, by the clock and of the processor. "
        "Written by `python benchmarks/ppo.py --peer-python PYTHON`, which says what the cases are.",
        "",
        "| case | epochs | TRL s | ours s | ratio | processor ratio | our mean length | peak GiB TRL / ours "
        "| ours / TRL |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in (case for case in epochs if case in kept):
        lines.append(f"| {case} | {epochs[case]} " + _time_cells(kept[case]) + _memory_cells(kept[case]) + " |")
    lines += ["", *sorted({f"Measured with {part['conditions']}." for row in kept.values() for part in row.values()})]
    (RESULTS / "ppo.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def _time_cells(row: dict[str, Any]) -> str:
    if "time" not in row:
        return "| | | | | "
    r = row["time"]
    times = f"| {r['trl_seconds']:.2f} | {r['our_seconds']:.2f} | **{r['ratio']:.2f}** | {r['cpu_ratio']:.2f} "
    return times + f"| {r['our_length_mean']:.1f} "


def _memory_cells(row: dict[str, Any]) -> str:
    if "memory" not in row:
        return "| | "
    r = row["memory"]
    return f"| {r['trl_gib']:.2f} / {r['our_gib']:.2f} | {r['our_gib'] / r['trl_gib']:.2f}"
