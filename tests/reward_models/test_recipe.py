"""The recipe: its configs load, its sources work, its folder opens."""

import json
from pathlib import Path

import pytest

from reward_models.scorer import RewardModelScorer
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.errors import ConfigError
from rlhf.lm.loading import character_tokenizer

RECIPE = find_recipe("reward_model")
SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
SMALL = ["task.train=24", "task.held_out=8", "training.batch_prompts=12", "model.config.hidden_size=16"]


def load(config="default", *overrides):
    return load_config(import_recipe(RECIPE).CONFIG, RECIPE.configs[config], overrides)


def run(config):
    return import_recipe(RECIPE).main(config)


@pytest.mark.parametrize("name", sorted(RECIPE.configs))
def test_every_config_loads(name):
    load(name)


def test_default_runs_and_its_folder_scores(tmp_path):
    metrics = run(load("default", *SMALL, f"run.directory={tmp_path}/run"))
    assert 0 <= metrics["evaluation/accuracy"] <= 1
    scores = RewardModelScorer.from_pretrained(tmp_path / "run/reward_model")(["kt>"] * 2, ["ktaeio", "ktzzzz"])
    assert len(scores) == 2


def test_data_with_held_out_data_of_its_own(tmp_path):
    rows = [{"prompt": f"{letter}>", "completions": ["a", "bb", "c"], "ranks": [0, 1, 2]} for letter in "abcdef"]
    for name, part in (("train", rows[:4]), ("held_out", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    character_tokenizer("abcdef>").save_pretrained(tmp_path / "tokenizer")
    sources = [f"data.path={tmp_path}/train.jsonl", f"held_out_data.path={tmp_path}/held_out.jsonl", "task=null"]
    model = [f"model.tokenizer={tmp_path}/tokenizer", "training.batch_prompts=2", f"run.directory={tmp_path}/run"]
    metrics = run(load("default", *sources, *model))
    assert metrics["evaluation/prompts"] == 2
    assert metrics["evaluation/pairs"] == 6


def test_data_and_task_are_alternatives():
    with pytest.raises(ConfigError, match="exactly one of `data`"):
        load("default", "data.path=x.jsonl")
    with pytest.raises(ConfigError, match="remove held_out_data"):
        load("default", "held_out_data.path=x.jsonl")


@pytest.mark.skipif(not SHARED.exists(), reason="real rankings and models are not here")
@pytest.mark.parametrize("name", ["alpaca_eval_k4", "oasst1"])
def test_real_rankings_run_two_steps(tmp_path, name, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    few = ["data.limit=8", "training.batch_prompts=3", "context_factor=1", "training.max_length=96", "held_out=0.25"]
    metrics = run(load(name, *few, f"run.directory={tmp_path}/run"))
    assert metrics["train/truncated_candidates"] > 0
    assert metrics["evaluation/length_accuracy"] > 0
    RewardModelScorer.from_pretrained(tmp_path / "run/reward_model")
