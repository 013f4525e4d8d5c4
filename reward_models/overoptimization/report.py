"""The lab's report, from what its cells returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reward_models.overoptimization.settings import Variant
from rlhf.lm.overoptimization import Curve
from rlhf.lm.overoptimization_report import (
    Group,
    Panel,
    answer_table,
    best_of_n_table,
    draw,
    fit_numbers,
    run_table,
    seed_table,
)

WAYS = {
    "single": "best of n",
    "mean": "best of n, ensemble's mean",
    "worst_case": "best of n, worst case",
    "mean_minus_variance": "best of n, mean less variance",
}
FIELDS = ("kl", "gold", "proxy", "gold_error")


def report(
    starts: Sequence[Mapping[str, Any]],
    policies: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    variants: Mapping[str, Variant],
    seeds: Sequence[int],
    directory: Path,
) -> tuple[str, dict[str, Any]]:
    """Write figure.png; return the tables and the numbers.

    Args:
        starts: What `prepare` returned, by seed.
        policies: Variant -> what `optimize` returned, by seed.
        variants: Their settings.
        seeds: The seeds.
        directory: Where the figure goes.

    Returns:
        Markdown; and {"fits", "curves", "starts", "summary": {"<variant>/<number>": mean over seeds}}.
    """
    best = {WAYS[way]: _best_of_n_curves(starts, way) for way in WAYS}
    curves = {name: [_curve(result) for result in results] for name, results in policies.items()}
    panels = _panels(best, curves, variants)
    draw(
        panels,
        directory / "figure.png",
        gold_label="gold score (held-out prompts)",
        proxy_label="proxy: what is optimized, in standard\ndeviations of the start's answers",
    )
    name = next(iter(policies))
    parts = [
        _start_line(starts),
        run_table(panels),
        "Gold by seed: at the start, at its peak (KL), at the end (KL):\n\n" + seed_table(panels, seeds),
        "Best of n:\n\n" + best_of_n_table(starts[0]["best_of_n"]["n"], best),
        f"Answers of {name}, seed {seeds[0]}:\n\n" + answer_table(curves[name][0], policies[name][0]["answers"]),
        *_endings(policies, seeds),
    ]
    numbers = {
        "fits": fit_numbers(panels),
        "curves": policies,
        "starts": list(starts),
        "summary": _summary(curves),
    }
    return "\n\n".join(parts) + "\n", numbers


def _panels(best: Group, curves: Group, variants: Mapping[str, Variant]) -> list[Panel]:
    """Best-of-n; policies that differ in the KL coefficient; the remedies, beside what they are to help."""
    leashed = {name: runs for name, runs in curves.items() if not variants[name].is_remedy}
    remedies = {name: runs for name, runs in curves.items() if variants[name].is_remedy}
    single = {name: runs for name, runs in best.items() if name == WAYS["single"]}
    panels = [Panel("best of n answers of the start", "best_of_n", best)]
    if leashed:
        panels.append(Panel("RL against one reward model, by KL coefficient", "rl", leashed, beside=single))
    if remedies:
        loosest = dict(sorted(leashed.items(), key=lambda item: variants[item[0]].kl_coefficient)[:1])
        panels.append(Panel("RL with remedies", "rl", remedies, beside=loosest))
    return panels


def _curve(result: Mapping[str, Any]) -> Curve:
    kl, gold, proxy, errors = (list(result[field]) for field in FIELDS)
    return Curve(kl=kl, gold=gold, proxy=proxy, gold_errors=errors)


def _best_of_n_curves(starts: Sequence[Mapping[str, Any]], way: str) -> list[Curve]:
    return [_curve(start["best_of_n"][way] | {"kl": start["best_of_n"]["kl"]}) for start in starts]


def _start_line(starts: Sequence[Mapping[str, Any]]) -> str:
    accuracies = [accuracy for start in starts for accuracy in start["accuracy"]]
    rankings = ", ".join(str(start["rankings"]) for start in starts)
    return (
        f"Reward models: {len(starts[0]['accuracy'])} for each of {len(starts)} seeds, from {rankings} rankings; "
        f"accuracy on held-out pairs {np.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f}). "
        "Mean ± standard deviation over seeds; a peak is the best of a run's measurements. Gain lost: how much of the "
        "gain at the peak is gone at the end. Over-optimized: more than half of it, while the proxy rises further. "
        "Alpha, beta, R², residual: of a fit of the gold score's gain per seed."
    )


def _endings(policies: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> list[str]:
    """Sentences about runs that ended early."""
    lines = [
        f"{name}, seed {seed}: {result['ended_because']}."
        for name, results in policies.items()
        for seed, result in zip(seeds, results, strict=True)
        if result["ended_because"] is not None
    ]
    return ["\n".join(lines)] if lines else []


def _summary(curves: Group) -> dict[str, float]:
    return {
        f"{name}/{label}": float(np.mean([pick(curve) for curve in runs]))
        for name, runs in curves.items()
        for label, pick in {
            "gold_start": lambda curve: curve.gold[0],
            "gold_peak": lambda curve: curve.gold[curve.peak],
            "gold_end": lambda curve: curve.gold[-1],
            "proxy_end": lambda curve: curve.proxy[-1],
            "kl_end": lambda curve: curve.kl[-1],
            "gain_lost": lambda curve: curve.lost,
            "overoptimized": lambda curve: curve.overoptimized,
        }.items()
    }
