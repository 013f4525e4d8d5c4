"""`rlhf eval`: what it writes, two models against each other, and the best checkpoint by the same evaluation."""

import json

import pytest
import torch
import yaml
from typer.testing import CliRunner

from rlhf.cli import app
from rlhf.commands.evaluating import directory_name, make_request
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import validate
from rlhf.errors import ConfigError
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
TASK = {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 40, "held_out": 6}


def starts_with_a(completions, **columns) -> list[float]:
    return [float(text.startswith("a")) for text in completions]


def first_letter(text):
    return text[:1] or None


@pytest.fixture
def folder(tmp_path):
    def save(name, seed):
        torch.manual_seed(seed)
        tokenizer = character_tokenizer("abcde>")
        load_causal_lm(ModelConfig(config=MODEL), tokenizer).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def config(tmp_path):
    settings = {
        "model": {"path": "nowhere"},
        "prompts": {"task": TASK},
        "rewards": {"a": {"function": f"{__file__}:starts_with_a"}},
        "sampling": {"max_completion_length": 5},
        "evaluation": {
            "samples_per_prompt": 4,
            "pass_at": [1, 4],
            "majority_at": [4],
            "answers": f"{__file__}:first_letter",
        },
        "run": {"progress_bar": False},
    }
    file = tmp_path / "mine.yaml"
    file.write_text("# A test.\n" + yaml.safe_dump(settings))
    return str(file)


def test_eval_names_the_model_and_writes_every_metric(folder, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = folder("one", 0), folder("two", 1)
    result = CliRunner().invoke(app, ["eval", one, "--config", config, f"against={{path: {two}}}"])
    assert result.exit_code == 0, result.output
    summary = tmp_path / "runs/evaluate/mine" / directory_name(one) / "summary.json"
    metrics = json.loads(summary.read_text())["metrics"]
    for name in (
        "greedy_a_mean",
        "sampled_a_mean",
        "sampled_a_pass_at_4_low",
        "sampled_a_majority_at_4",
        "greedy_a_win_rate",
    ):
        assert 0.0 <= metrics[f"evaluation/{name}"] <= 1.0
    # pass@1 is the accuracy, and a set of four has one subset of four: its best answer.
    assert metrics["evaluation/sampled_a_pass_at_1"] == pytest.approx(metrics["evaluation/sampled_a_mean"])
    assert metrics["evaluation/sampled_a_pass_at_4"] == pytest.approx(metrics["evaluation/sampled_a_best"])
    # A vote for the first letter is right exactly where "a" wins; ties share. So it cannot beat pass@4.
    assert metrics["evaluation/sampled_a_majority_at_4"] <= metrics["evaluation/sampled_a_pass_at_4"]
    mirrored = CliRunner().invoke(app, ["eval", two, "--config", config, f"against={{path: {one}}}"])
    assert mirrored.exit_code == 0, mirrored.output
    file = tmp_path / "runs/evaluate/mine" / directory_name(two) / "summary.json"
    other = json.loads(file.read_text())["metrics"]
    for name in ("greedy_a_win_rate", "sampled_a_win_rate"):
        assert other[f"evaluation/{name}"] == pytest.approx(1 - metrics[f"evaluation/{name}"])


def test_eval_leaves_a_directory_that_is_named():
    request = make_request("a/b", config="gsm8k", overrides=["run.directory=here", "evaluation.greedy=false"])
    assert request.overrides == ('model.path="a/b"', "run.directory=here", "evaluation.greedy=false")
    default = make_request("a/b", config="gsm8k", overrides=[])
    assert default.overrides[-1] == 'run.directory="runs/evaluate/gsm8k/a-b"'


def test_two_sources_of_prompts_are_refused(folder):
    module = import_recipe(find_recipe("evaluate"))
    with pytest.raises(ConfigError, match="not both"):
        validate(module.CONFIG, {"model": {"path": "x"}, "prompts": {"task": TASK}, "data": {"path": "x.jsonl"}})


def test_what_would_evaluate_nothing_is_refused():
    module = import_recipe(find_recipe("evaluate"))
    texts, rewards = {"texts": {"path": "x.jsonl"}}, {"rewards": {"a": {"function": f"{__file__}:starts_with_a"}}}
    against = {"against": {"path": "y"}}
    for settings, told in (
        ({}, "nothing to evaluate"),
        (texts | rewards, "no prompt is answered"),
        (texts | against, "no prompt is answered"),
        ({"data": {"path": "x.jsonl"}} | against, "against needs rewards"),
    ):
        with pytest.raises(ConfigError, match=told):
            validate(module.CONFIG, {"model": {"path": "x"}, **settings})


def test_a_run_directory_in_place_of_a_model_names_the_models_in_it(folder, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder("my_run/model", 0)
    result = CliRunner().invoke(app, ["eval", str(tmp_path / "my_run"), "--config", config])
    assert result.exit_code == 2
    assert f"expected {tmp_path / 'my_run' / 'model'}" in " ".join(result.output.split())


def test_the_best_checkpoint_is_kept_by_the_held_out_score(tmp_path):
    """The score rises; with the lowest one as the best, the best checkpoint is an early one and stays."""
    module = import_recipe(find_recipe("grpo"))
    settings = {
        "model": {"config": MODEL},
        "prompts": {"task": TASK},
        "reward": {"function": f"{__file__}:starts_with_a"},
        "collector": {"prompts_per_iteration": 4, "group_size": 4, "sampling": {"max_completion_length": 5}},
        "update": {"learning_rate": 0.05},
        "iterations": 6,
        "evaluation": {"greedy": False, "samples_per_prompt": 8, "pass_at": [8]},
        "run": {
            "directory": str(tmp_path),
            "progress_bar": False,
            "evaluate_every": 1,
            "checkpoint_every": 1,
            "keep_checkpoints": 1,
            "best_metric": "sampled_score_mean",
            "best_is": "lowest",
        },
    }
    module.main(validate(module.CONFIG, settings))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    scores = {line["iteration"]: line["evaluation/sampled_score_mean"] for line in lines if line["iteration"] > 0}
    kept = {int(path.name.removeprefix("iteration_")) for path in (tmp_path / "checkpoints").glob("iteration_*")}
    best = min(scores, key=lambda iteration: (scores[iteration], iteration))
    assert best < 6
    assert kept == {best, 6}
    assert all("evaluation/sampled_score_pass_at_8" in line for line in lines if line["iteration"] > 0)
