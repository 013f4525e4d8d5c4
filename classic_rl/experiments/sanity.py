"""Every policy-optimization preset on CartPole: the check to run after touching the core."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from classic_rl.experiments.figures import draw_curves
from classic_rl.experiments.grid import Results, curves
from classic_rl.statistics import format_estimate
from rlhf.config import read_yaml
from rlhf.core.presets import ALGORITHMS
from rlhf.training.experiment import markdown_table, mean_and_interval

TASK = "CartPole-v1"
SOLVED = 475.0
"""gymnasium's registered threshold of CartPole-v1."""


def variants(configs: Path) -> dict[str, dict[str, Any]]:
    """Return the settings of every method: its own YAML where it has one, a generic one otherwise.

    Args:
        configs: The folder with `on_policy/cartpole_<preset>.yaml` and `trpo/cartpole*.yaml`.

    Returns:
        {name: settings of a training}; presets that need a language model are left out.
    """
    methods: dict[str, dict[str, Any]] = {}
    for name, algorithm in ALGORITHMS.items():
        if algorithm.language_only is None:
            file = configs / "on_policy" / f"cartpole_{name.replace('+', '_plus')}.yaml"
            methods[name] = read_yaml(file) if file.is_file() else generic(name)
    for file in sorted((configs / "trpo").glob("cartpole*.yaml")):
        settings = read_yaml(file)
        methods[settings["algorithm"]["type"]] = settings | {"trust_region": settings["algorithm"], "algorithm": None}
    return {name: _training(settings) for name, settings in methods.items()}


def generic(preset: str) -> dict[str, Any]:
    """Settings for a preset that nobody has tuned: steps with a critic, groups of episodes without one."""
    with_critic = ALGORITHMS[preset].needs_critic
    return {
        "environment": {"id": TASK, "num_envs": 8 if with_critic else 32},
        "algorithm": {"preset": preset, "epochs": 4, "minibatches": 4 if with_critic else 2},
        "collect": {"type": "steps", "steps": 128} if with_critic else {"type": "episodes", "group_size": 8},
        "iterations": 100 if with_critic else 40,
        "update": {
            "learning_rate": 1e-3 if with_critic else 3e-3,
            "learning_rate_schedule": "linear",
            "max_grad_norm": 0.5,
            "flatten_parameters": True,
        },
    }


def _training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings as those of a cell: it has no run directory and no threads of its own."""
    kept = {key: value for key, value in settings.items() if key not in ("run", "threads") and value is not None}
    if "collect" in kept:
        kept["collect"] = {"type": "steps"} | kept["collect"]
    return kept


def report(results: Results, *, directory: Path) -> tuple[str, dict[str, Any]]:
    """Write figure.png (a panel per method, a line per seed); return the table and the numbers.

    Returns:
        Markdown, and {"solved/<method>": share of seeds whose greedy policy reaches 475, "presets",
        "presets_solved": those that reach it on every seed}.
    """
    names = [name for name, _ in results]
    panels = {name: {f"seed {index}": [run] for index, run in enumerate(curves(results, name, TASK))} for name in names}
    draw_curves(
        directory / "figure.png",
        panels,
        columns=6,
        size=(3.2, 2.2),
        levels=dict.fromkeys(names, SOLVED),
        title="CartPole-v1: mean return of the training episodes",
    )
    header = ["method", "seeds solved", "greedy return [95 % CI]", "per seed", "steps to 475 (median)", "seconds a run"]
    rows, numbers = [], {}
    for name in names:
        runs = results[name, TASK]
        greedy = [run["greedy"] for run in runs]
        solved = np.mean([value >= SOLVED for value in greedy])
        reached = [run["reached_at"] for run in runs if run["reached_at"] is not None]
        rows.append(
            [
                name,
                f"{sum(value >= SOLVED for value in greedy)} of {len(runs)}",
                format_estimate(mean_and_interval(greedy), digits=0),
                ", ".join(f"{value:.0f}" for value in greedy),
                f"{int(np.median(reached)):,} ({len(reached)} runs)" if reached else "not reached",
                f"{np.mean([run['seconds'] for run in runs]):.1f}",
            ]
        )
        numbers[f"solved/{name}"] = float(solved)
    numbers |= {"presets": float(len(names)), "presets_solved": float(sum(v == 1 for v in list(numbers.values())))}
    note = (
        "A run ends once its last 100 training episodes return 475 on average, or after the budget of its YAML; then "
        "20 greedy episodes are played. Solved: they return 475 or more on average."
    )
    return markdown_table(header, rows) + "\n\n" + note + "\n", numbers
