"""The table of `grpo.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from grpo_cases import CASES

RESULTS = Path(__file__).parent / "results"


def environment(threads: int) -> str:
    """What every row of one table must have in common."""
    import transformers
    import trl

    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}"
    return f"{machine}, {threads} thread{'s' if threads > 1 else ''}, {versions}"


def kept_results(cases: Sequence[str], measured_with: str) -> dict[str, dict[str, Any]]:
    """Rows of an earlier table of the same environment whose cases are not run now."""
    path = RESULTS / f"{_table_name()}.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    if not isinstance(earlier, dict) or earlier.get("environment") != measured_with:
        return {}
    return {row["case"]: row for row in earlier["rows"] if row["case"] in CASES and row["case"] not in cases}


def _table_name() -> str:
    if torch.cuda.is_available():
        return "grpo_gpu"
    return "grpo" if torch.get_num_threads() > 1 else "grpo_one_thread"


def write_results(results: dict[str, dict[str, Any]], measured_with: str) -> None:
    """Write the table and the numbers behind it."""
    rows = [results[case] for case in CASES if case in results]
    lines = [
        "# One GRPO step: ours against TRL's GRPOTrainer",
        "",
        f"8 prompts x 8 completions, one optimizer step, no KL term, float32 weights, {measured_with}. "
        "Medians; the ratio is the median over turns of TRL's time / ours. Written by `python benchmarks/grpo.py`, "
        "which says what the cases are.",
        "",
        "| case | TRL s | ours s | ratio | ours with that forward s | ratio | generation share TRL / ours "
        "| mean length TRL / ours | peak GiB TRL / ours | ours / TRL |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['case']} | {r['trl_seconds']:.3f} | {r['auto_seconds']:.3f} | {r['auto_ratio']:.2f} "
            f"| {r['recompute_seconds']:.3f} | {r['recompute_ratio']:.2f} "
            f"| {r['trl_generation_share']:.0%} / {r['auto_generation_share']:.0%} "
            f"| {r['trl_length_mean']:.1f} / {r['our_length_mean']:.1f} "
            f"| {r['trl_gib']:.2f} / {r['auto_gib']:.2f} | {r['auto_gib'] / r['trl_gib']:.2f} |"
        )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{_table_name()}.md").write_text("\n".join(lines) + "\n")
    (RESULTS / f"{_table_name()}.json").write_text(
        json.dumps({"environment": measured_with, "rows": rows}, indent=2) + "\n"
    )
    print("\n".join(lines), flush=True)
