"""Human-normalized Atari scores: the published tables with their protocols, recomputed, beside your own runs."""

from __future__ import annotations

import json
from pathlib import Path

from classic_rl.experiments.normalized_scores import (
    game_name,
    human_normalized,
    read_medians,
    read_references,
    read_scores,
    summarize,
)
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.training.experiment import markdown_table, write_report
from rlhf.training.run import Run, RunConfig


class NormalizedScoresConfig(Config):
    """Which runs stand beside the published numbers."""

    runs: dict[str, str] = {}
    """Atari environment id -> directory of a finished `off_policy` or `on_policy` run, whose evaluation is taken."""
    run: RunConfig = RunConfig()


def main(config: NormalizedScoresConfig) -> dict[str, float]:
    """Write `table.md` and `results.json` into the run directory."""
    run = Run(config.run, resolved=config, iterations=0, recipe="normalized_scores")
    references = read_references()
    published = [
        [row.agent, row.starts, str(row.games), f"{row.median:.1%}", "" if row.mean is None else f"{row.mean:.1%}",
         row.source] for row in read_medians()
    ]  # fmt: skip
    dqn = summarize(read_scores("nature_noop", "dqn"), read_references("nature_noop"))
    rainbow = summarize(read_scores("rainbow_noop", "rainbow"), references)
    recomputed = [
        ["DQN, 49 games, no-op", f"{dqn[0]:.1%}", f"{dqn[1]:.1%}", "93.5 %, 241.1 %"],
        ["Rainbow, the 54 games of its table, no-op", f"{rainbow[0]:.1%}", f"{rainbow[1]:.1%}", "223 % (57 games)"],
    ]
    own, numbers = [], {"dqn_median": dqn[0], "rainbow_median": rainbow[0]}
    for environment, directory in config.runs.items():
        summary = json.loads((Path(directory) / "summary.json").read_text(encoding="utf-8"))
        score, game = summary["metrics"]["evaluation/return_mean"], game_name(environment)
        value = human_normalized(score, random=references.random[game], human=references.human[game])
        numbers[game] = value
        steps = f"{summary['metrics']['rollout/total_env_steps']:,.0f}"
        own.append([game, f"{score:.1f}", f"{value:.1%}", steps, summary["config_name"], str(summary["seed"])])
    parts = [
        "# Human-normalized Atari scores",
        "## As published",
        markdown_table(["agent", "starts", "games", "median", "mean", "source"], published),
        "## Recomputed from the per-game tables",
        markdown_table(["table", "median", "mean", "published"], recomputed),
        "## Own runs (no-op starts)",
        markdown_table(["game", "score", "normalized", "steps", "config", "seed"], own) if own else "none given",
    ]
    table = "\n\n".join(parts) + "\n"
    write_report(run, table, numbers)
    return run.finish(**numbers)


CONFIG = NormalizedScoresConfig

if __name__ == "__main__":
    launch(__file__)
