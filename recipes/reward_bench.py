"""Hold a reward against rankings: accuracy by subset (RewardBench), Kendall's tau, calibration, length bias."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from reward_models.judging import draw_reliability, judge, score_with, table_rows
from reward_models.procedural import rank_random_answers
from reward_models.reward_bench import Layout, benchmark_table
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.data.loading import load_rankings
from rlhf.data.records import Ranking
from rlhf.data.settings import DataConfig
from rlhf.lm.sources import RewardConfig, make_reward
from rlhf.lm.tasks import TaskConfig, make_task
from rlhf.markdown import markdown_table
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig


class RewardBenchConfig(Config):
    """Which reward, and what it is held against."""

    reward: RewardConfig | list[RewardConfig]
    """A reward model, an ensemble, an HTTP service, any function, or a mix."""
    data: DataConfig | None = None
    """Rankings or pairs; with a column `subset`, a table by subset."""
    task: TaskConfig | None = None
    """A procedural task instead: its held-out prompts with random answers, ranked by its gold scorer."""
    num_candidates: int = Field(4, ge=2)
    """Answers ranked per prompt of `task`."""
    layout: Layout | None = None
    """reward_bench and reward_bench_2 are the benchmark's versions; subsets is any file with subsets; null has none."""
    subset_column: str = "subset"
    """Which column of the data holds a row's subset."""
    bins: int = Field(10, ge=2)
    """Of the reliability plot."""
    completions_per_call: int = Field(256, ge=1)
    """Completions the reward is asked for at once."""
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.data is None) == (self.task is None):
            raise ValueError("set exactly one of `data` (rankings) and `task` (a procedural one)")
        return self


def load(config: RewardBenchConfig) -> list[Ranking]:
    """Return the rankings to judge by."""
    if config.data is not None:
        return load_rankings(config.data)
    task = make_task(config.task or TaskConfig(name="vowel_words"))
    return rank_random_answers(task, task.held_out_prompts, num_candidates=config.num_candidates, seed=1)


def main(config: RewardBenchConfig) -> dict[str, float]:
    """Write `table.md`, `reliability.png` and `summary.json` to the run directory."""
    rankings, reward = load(config), make_reward(config.reward)
    run = Run(config.run, resolved=config, iterations=0, recipe="reward_bench")
    scores = score_with(reward, rankings, completions_per_call=config.completions_per_call)
    metrics, binned = judge(scores, rankings, bins=config.bins)
    rows = [[name, "", f"{value:.3f}", ""] for name, value in metrics.items()]
    if config.layout is not None:
        results, above = benchmark_table(scores, rankings, layout=config.layout, column=config.subset_column)
        rows = [*table_rows(results), *([name, "", f"{value:.3f}", ""] for name, value in above.items()), *rows]
        metrics |= {f"subset/{one.name}": one.score for one in results} | {f"bench/{n}": v for n, v in above.items()}
    table = markdown_table(["subset or metric", "rows", "score", "95 % interval"], rows)
    run.say(table)
    (run.directory / "table.md").write_text(table + "\n", encoding="utf-8")
    draw_reliability(binned, run.directory / "reliability.png")
    return run.finish(**{f"evaluation/{name}": value for name, value in metrics.items()})


CONFIG = RewardBenchConfig

if __name__ == "__main__":
    launch(__file__)
