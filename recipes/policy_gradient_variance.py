"""Measure what baselines, rewards to go and gamma^t do to the variance of the policy gradient, and to learning."""

from __future__ import annotations

import json

import numpy as np
from pydantic import Field

from classic_rl.experiments.policy_gradient_variance import VARIANTS
from classic_rl.experiments.policy_gradient_variance_report import draw, make_table
from classic_rl.threads import limit_threads
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.experiment import Cell, run_cells
from rlhf.training.run import Run, RunConfig


class VarianceConfig(Config):
    """How much is trained and measured."""

    environment: str = "CartPole-v1"
    """A gymnasium id whose episodes end."""
    max_steps: int = Field(200, ge=1)
    """Longer episodes are cut."""
    seeds: int = Field(3, ge=1)
    """Seeds per form."""
    updates: int = Field(40, ge=1)
    """Rollouts, each followed by one step of Adam."""
    episodes: int = Field(16, ge=2)
    """Episodes per rollout."""
    learning_rate: float = Field(0.01, gt=0)
    """Of Adam, for every form."""
    measure_every: int = Field(5, ge=1)
    """Updates between measurements along training; at the common policies every second one is measured."""
    measured_episodes: int = Field(64, ge=2)
    """Fresh episodes per measurement."""
    jobs: int = Field(2, ge=1)
    """Processes."""
    run: RunConfig = RunConfig()


def main(config: VarianceConfig) -> dict[str, float]:
    """Run the cells that have no result yet; write table.md, figure.png, results.json."""
    limit_threads(1)
    run = Run(config.run, resolved=config, iterations=1, recipe="policy_gradient_variance")
    common = config.model_dump(include={"environment", "max_steps", "updates", "episodes", "learning_rate"})
    common["measured_episodes"] = config.measured_episodes
    cells = []
    for seed in range(config.run.seed, config.run.seed + config.seeds):
        every = {"measure_every": 2 * config.measure_every, "measure_all": True}
        # The policies at which all forms are compared come from the form that learns most steadily.
        cells.append(Cell(f"fixed-seed_{seed}", {**common, **every, "form": "reward to go - baseline", "seed": seed}))
        every = {"measure_every": config.measure_every, "measure_all": False}
        for number, form in enumerate(VARIANTS):
            cells.append(Cell(f"train-{number}-seed_{seed}", {**common, **every, "form": form, "seed": seed}))
    function = "classic_rl.experiments.policy_gradient_variance:learn_and_measure"
    results = run_cells(cells, function, directory=run.directory, jobs=config.jobs, name="policy_gradient_variance")
    fixed = [result for cell, result in zip(cells, results, strict=True) if cell.name.startswith("fixed")]
    trained = {
        form: [
            r for c, r in zip(cells, results, strict=True) if c.name.startswith("train") and c.settings["form"] == form
        ]
        for form in VARIANTS
    }
    table = make_table(fixed, trained)
    (run.directory / "table.md").write_text(table, encoding="utf-8")
    (run.directory / "results.json").write_text(json.dumps({"fixed": fixed, "trained": trained}, indent=1))
    draw(fixed, trained, run.directory / "figure.png")
    run.say(table)
    means = {f"return/{form}": float(np.mean([r["returns"] for r in rows])) for form, rows in trained.items()}
    return run.finish(**means)


CONFIG = VarianceConfig

if __name__ == "__main__":
    launch(__file__)
