"""Normalized scores: published aggregates come out of the shipped per-game tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from classic_rl.experiments.normalized_scores import (
    game_name,
    human_normalized,
    improvement,
    read_medians,
    read_references,
    read_scores,
    summarize,
)
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "recipes/configs/normalized_scores"


def test_dqns_median_and_mean_are_the_printed_ones():
    """93.5 % and 241.1 %: table 1 of the Double DQN paper, from Mnih et al.'s 49 games."""
    scores = read_scores("nature_noop", "dqn")
    median, mean = summarize(scores, read_references("nature_noop"))
    assert len(scores) == 49
    assert (round(median, 3), round(mean, 3)) == (0.935, 2.411)


def test_the_same_scores_have_another_median_under_other_references():
    """The protocol matters: with the later human scores DQN's 49 games have another median."""
    median, _ = summarize(read_scores("nature_noop", "dqn"), read_references())
    assert round(median, 3) != 0.935


def test_rainbows_median_fits_whatever_its_three_missing_games_are():
    """54 of 57 games are in its table: the 29th of 57 lies between the 26th and the 29th of these; 223 % is printed."""
    references, scores = read_references(), read_scores("rainbow_noop", "rainbow")
    assert len(references.random) == 57
    assert set(references.random) - set(scores) == {"jamesbond", "riverraid", "up_n_down"}
    values = sorted(
        human_normalized(score, random=references.random[game], human=references.human[game])
        for game, score in scores.items()
    )
    assert values[25] <= 2.235
    assert values[28] >= 2.225


def test_breakout_by_hand():
    """(401.2 - 1.7) / (31.8 - 1.7) = 399.5 / 30.1: 1,327 %, as Mnih et al. print."""
    references = read_references("nature_noop")
    score = read_scores("nature_noop", "dqn")["breakout"]
    value = human_normalized(score, random=references.random["breakout"], human=references.human["breakout"])
    assert round(value, 2) == 13.27


@pytest.mark.parametrize(
    ("score", "baseline", "expected"),
    [(30.0, 20.0, 0.5), (8.0, 4.0, 0.4), (4.0, 8.0, -0.4), (5.0, 5.0, 0.0)],
)
def test_improvement_over_a_baseline(score, baseline, expected):
    """Human 10, random 0: the divisor is the larger of baseline and human."""
    assert improvement(score, baseline=baseline, random=0.0, human=10.0) == pytest.approx(expected)


def test_every_aggregate_has_its_protocol():
    rows = read_medians()
    assert {row.starts for row in rows} == {"no-op", "human"}
    assert {row.games for row in rows} == {49, 57}
    assert all("arXiv" in row.source for row in rows)
    keys = [(row.agent, row.starts, row.games, row.source) for row in rows]
    assert len(set(keys)) == len(keys)
    rainbow = [row.median for row in rows if row.agent == "Rainbow"]
    assert rainbow == [2.23, 1.53]


def test_games_are_found_by_environment():
    from_ids = [game_name(name) for name in ("ALE/Pong-v5", "ale_py:ALE/MsPacman-v5", "ALE/YarsRevenge-v5")]
    assert from_ids == ["pong", "ms_pacman", "yars_revenge"]
    with pytest.raises(ConfigError, match="no such Atari game"):
        game_name("CartPole-v1")
    with pytest.raises(ConfigError, match="no reference"):
        summarize({"tetris": 1.0}, read_references())


def test_the_tables_share_their_random_scores():
    nature, later = read_references("nature_noop"), read_references()
    assert all(later.random[game] == score for game, score in nature.random.items())
    assert np.isfinite(list(later.human.values())).all()


def test_own_runs_stand_beside_the_published_ones(tmp_path):
    """Breakout: random 1.7, human 30.5 (Wang et al. 2016), so that 16.1 is half of a human's way."""
    summary = {
        "metrics": {"evaluation/return_mean": 16.1, "rollout/total_env_steps": 601_937.0},
        "config_name": "atari_breakout_ppo",
        "seed": 3,
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run/summary.json").write_text(json.dumps(summary))
    recipe = import_recipe(find_recipe("normalized_scores"))
    overrides = [f"runs={{ale_py:ALE/Breakout-v5: {tmp_path / 'run'}}}", f"run.directory={tmp_path / 'table'}"]
    metrics = recipe.main(load_config(recipe.CONFIG, CONFIGS / "default.yaml", overrides))
    assert metrics["breakout"] == pytest.approx(0.5)
    last = (tmp_path / "table/table.md").read_text().strip().splitlines()[-1]
    assert [cell.strip() for cell in last.strip("|").split("|")] == [
        "breakout", "16.1", "50.0%", "601,937", "atari_breakout_ppo", "3",
    ]  # fmt: skip
