"""The process in which math-verify runs: one JSON request a line on stdin, one verdict a line on stdout.

It is a process of its own because sympy can hang or eat all memory on a hostile expression, and because
math-verify's own timeout relies on `signal.alarm`, which works in a main thread only and cannot interrupt C code.
The parent kills it.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any, TextIO

_MEMORY_BYTES = 4 * 2**30
"""An expression that needs more is hostile; sympy then gets a MemoryError and the machine keeps its memory."""


def main() -> None:
    """Answer requests until stdin closes."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    # Libraries print; the channel to the parent must carry verdicts only.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    judge = _make_judge()
    _answer(channel, "ready")
    for line in sys.stdin:
        request = json.loads(line)
        try:
            _answer(channel, judge(request["gold"], request["completion"], request["extraction"]))
        except Exception:  # whatever sympy raises on it, the completion's answer could not be understood
            _answer(channel, "unparseable")


def _answer(channel: TextIO, verdict: str) -> None:
    channel.write(json.dumps({"verdict": verdict}) + "\n")
    channel.flush()


def _make_judge() -> Any:
    # Checked by the parent before it starts this process; an extra, so the type checker may not find it.
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify  # pyright: ignore

    latex = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    extractions = {"latex": [latex], "any": [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]}

    def judge(gold: str, completion: str, extraction: str) -> str:
        # A bare "\\frac{1}{2}" is no formula to the parser until it stands in a box or between dollar signs.
        bare = "$" not in gold.replace("\\$", "") and "\\boxed" not in gold
        gold_parsed = parse(f"\\boxed{{{gold}}}", parsing_timeout=None) if bare else []
        gold_parsed = gold_parsed or parse(gold, parsing_timeout=None)
        if not gold_parsed:
            return "gold_unparseable"
        parsed = parse(
            completion, extraction_config=extractions[extraction], extraction_mode="first_match", parsing_timeout=None
        )
        if not parsed:
            return "unparseable"
        return "correct" if verify(gold_parsed, parsed, timeout_seconds=None) else "wrong"

    return judge


if __name__ == "__main__":
    main()
