"""The tables of `benchmarks/reward_model.py`, written anew from all numbers kept so far."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "reward_model.json"


def kept_results() -> dict[str, dict[str, Any]]:
    """All parts of all cases measured so far."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def write_results(name: str, part: str, measured: dict[str, Any], *, threads: int) -> None:
    """Keep one part of one case, and write the tables."""
    kept = kept_results()
    kept.setdefault(name, {})[part] = measured | {"conditions": f"{threads} thread(s), {versions()}"}
    RESULTS.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(kept, indent=2) + "\n")
    text = "\n".join(tables(kept)) + "\n"
    (RESULTS / "reward_model.md").write_text(text)
    print(text, flush=True)


def versions() -> str:
    """What a number depends on."""
    import transformers
    import trl

    return f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"


def tables(kept: dict[str, dict[str, Any]]) -> list[str]:
    """The whole page."""
    lines = [
        "# A reward model from K-way rankings: ours against TRL's RewardTrainer on their pairs",
        "",
        "One pass over the same rankings, equally many steps of as many pairs (those of 4 prompts; of 1 in `alpaca_k9` "
        "and `words_k9`), but ours makes two passes in `*_twice`; CPU float32. Written by "
        "`python benchmarks/reward_model.py`, which says how.",
    ]
    sections = [("speed", speed_table), ("accuracy", accuracy_table), ("memory", memory_table)]
    for part, write in sections:
        rows = {name: parts[part] for name, parts in kept.items() if part in parts}
        if rows:
            lines += ["", *write(rows), "", *sorted({f"{row['conditions']}." for row in rows.values()})]
    tuned = {name: parts["tuning"] for name, parts in kept.items() if "tuning" in parts}
    if tuned:
        lines += ["", *tuning_table(tuned)]
    return lines


def speed_table(rows: dict[str, Any]) -> list[str]:
    """Medians over rounds; a ratio is the median over rounds of TRL's / ours."""
    lines = [
        "## Time of `train()`: medians over rounds; ratios are medians of TRL's / ours",
        "",
        "| case | prompts | TRL s | ours s | ratio | processor ratio | TRL tokens | ours tokens | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        lines.append(
            f"| {name} | {r['prompts']} | {r['trl_wall']:.1f} | {r['ours_wall']:.1f} | **{r['wall_ratio']:.2f}** "
            f"| {r['cpu_ratio']:.2f} | {r['trl_tokens']:,.0f} | {r['ours_tokens']:,.0f} | {r['tokens_ratio']:.2f} |"
        )
    return lines


def accuracy_table(rows: dict[str, Any]) -> list[str]:
    """Means over seeds with intervals over prompts."""
    lines = [
        "## Held-out pairwise accuracy: mean over seeds [95 % interval over prompts] (each seed)",
        "",
        "| case | prompts, steps | held out | TRL's rate | TRL | our rate | ours | ours - TRL, paired |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        cells = [name, f"{r['prompts']}, {r['steps']['trl']:.0f} / {r['steps']['ours']:.0f}", str(r["held_out"])]
        for side in ("trl", "ours"):
            mine, each = r[side], " ".join(f"{value:.3f}" for value in r["each_seed"][side])
            cells.append(f"{r['rates'][side]:g}")
            cells.append(f"{mine['accuracy']:.3f} [{mine['low']:.3f}, {mine['high']:.3f}] ({each})")
        gap = r["difference"]
        cells.append(f"{gap['mean']:+.3f} [{gap['low']:+.3f}, {gap['high']:+.3f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tuning_table(rows: dict[str, Any]) -> list[str]:
    """Every learning rate tried."""
    rates = sorted({rate for r in rows.values() for rate in r["trl"]}, key=float)
    lines = [
        "## Validation accuracy at the learning rates tried, mean over seeds",
        "",
        "| case | side | " + " | ".join(rates) + " |",
        "|---|---|" + "---|" * len(rates),
    ]
    for name, r in rows.items():
        for side in ("trl", "ours"):
            lines.append(f"| {name} | {side} | " + " | ".join(shown(r[side].get(rate)) for rate in rates) + " |")
    return lines


def shown(accuracy: float | None) -> str:
    """Empty where that rate was not tried."""
    return "" if accuracy is None else f"{accuracy:.3f}"


def memory_table(rows: dict[str, Any]) -> list[str]:
    """Peak resident size of a process for each side."""
    lines = [
        "## Peak memory of two steps, vocabulary 151,665",
        "",
        "| case | TRL GiB | ours GiB | ours / TRL |",
        "|---|---|---|---|",
    ]
    for name, r in rows.items():
        lines.append(f"| {name} | {r['trl_gib']:.2f} | {r['ours_gib']:.2f} | {r['ours_gib'] / r['trl_gib']:.2f} |")
    return lines
