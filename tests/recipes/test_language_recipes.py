"""Every preset trains a language model through its recipe; what a run writes; what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config, validate
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError, RewardError

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def share_of_a(completions, **columns) -> list[float]:
    """A reward that an untrained model gets some of, so that there is something to learn at once."""
    return [text.count("a") / (len(text) + 1) for text in completions]


def shortness(completions, **columns) -> list[float]:
    return [1 / (len(text) + 1) for text in completions]


def settings(folder: Path, **changes) -> dict:
    """Sixteen completions an iteration, so that dapo's sixteen minibatches have a row each."""
    return {
        "model": {"config": MODEL},
        "prompts": {"task": {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 40, "held_out": 6}},
        "reward": {"function": f"{__file__}:share_of_a"},
        "collector": {"prompts_per_iteration": 4, "group_size": 4, "sampling": {"max_completion_length": 5}},
        "update": {"learning_rate": 1e-3},
        "iterations": 2,
        "evaluation": {"samples_per_prompt": 2},
        "run": {"directory": str(folder), "progress_bar": False},
        **changes,
    }


def run(recipe: str, values: dict) -> dict[str, float]:
    module = import_recipe(find_recipe(recipe))
    return module.main(validate(module.CONFIG, values))


@pytest.mark.parametrize("preset", ALGORITHMS)
def test_every_preset_trains_a_language_model(preset, tmp_path):
    recipe = "grpo" if ALGORITHMS[preset].needs_groups else "ppo_rlhf"
    changes = {"reward": [{"function": f"{__file__}:share_of_a"}, {"function": f"{__file__}:shortness"}]}
    metrics = run(recipe, settings(tmp_path, algorithm=preset, **changes if preset == "gdpo" else {}))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2]
    numbers = {name: value for name, value in lines[0].items() if isinstance(value, float)}
    assert all(math.isfinite(value) for value in numbers.values()), numbers
    # Before the first update policy, sampler and reference are one and the same.
    assert lines[0].get("rollout/kl_to_ref", 0.0) == 0.0
    assert lines[0]["rollout/sampling_mismatch_max"] < 1e-4
    assert ("rollout/kl_to_ref" in lines[0]) == ALGORITHMS[preset].needs_reference
    assert ("explained_variance" in lines[0]) == ALGORITHMS[preset].needs_critic
    assert 0.0 <= metrics["evaluation/greedy_score_mean"] <= 1.0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metrics"]["evaluation/sampled_score_mean"] == metrics["evaluation/sampled_score_mean"]


def test_the_first_step_has_ratio_one(tmp_path):
    run("grpo", settings(tmp_path, algorithm="grpo"))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert first["approx_kl"] == pytest.approx(0.0, abs=1e-9)


def test_the_saved_folder_opens_with_transformers(tmp_path):
    run("ppo_rlhf", settings(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = torch.tensor([tokenizer("abc>")["input_ids"]])
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= 6
    assert not list((tmp_path / "model").glob("*.bin"))


def test_sft_comes_first_where_it_is_asked_for(tmp_path):
    sft = {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    metrics = run("ppo_rlhf", settings(tmp_path, sft=sft, critic="copy", iterations=1))
    assert (tmp_path / "sft" / "model.safetensors").is_file()
    assert metrics["rollout/kl_to_ref"] == 0.0
    # The reference is the fine-tuned folder, and the policy has left it after one update.
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "sft").state_dict()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert any(not torch.equal(tuned[name], trained[name]) for name in tuned)


def test_reference_kl_is_not_zero_after_an_update(tmp_path):
    """TRL's trap: after SFT in the same process a deep-copied reference follows the live weights, and KL stays 0."""
    sft = {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3}
    metrics = run("ppo_rlhf", settings(tmp_path, sft=sft, update={"learning_rate": 1e-2}))
    assert metrics["rollout/kl_to_ref"] > 0.0


def test_resume_goes_on_exactly(tmp_path):
    whole = run("ppo_rlhf", settings(tmp_path / "whole", iterations=3))
    run("ppo_rlhf", settings(tmp_path / "parts", iterations=1))
    resumed = settings(tmp_path / "parts", iterations=3)
    resumed["run"]["resume"] = True
    parts = run("ppo_rlhf", resumed)
    timeless = {name for name in whole if not name.startswith("time/")}
    assert {name: parts[name] for name in timeless} == {name: whole[name] for name in timeless}


def test_lora_learns_adapters_only(tmp_path):
    lora = {"config": MODEL, "lora": {"rank": 2}}
    metrics = run("grpo", settings(tmp_path, model=lora, update={"learning_rate": 1e-2}))
    assert metrics["rollout/kl_to_ref"] != 0.0
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()


def test_a_model_that_comes_with_dropout_is_trained_without(tmp_path):
    model = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    run("ppo_rlhf", settings(tmp_path, model={"config": model}, iterations=1))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert first["rollout/kl_to_ref"] == 0.0
    assert first["rollout/sampling_mismatch_max"] < 1e-4


def test_groups_of_one_are_refused(tmp_path):
    values = settings(tmp_path)
    values["collector"]["group_size"] = 1
    with pytest.raises(ConfigError, match="group_size"):
        run("grpo", values)


def test_two_sources_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="exactly one of task"):
        run("grpo", settings(tmp_path, prompts={}))


def test_a_reward_that_fails_is_named(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def reward(completions, **columns):\n    return ['good'] * len(completions)\n")
    with pytest.raises(RewardError, match="is no number"):
        run("grpo", settings(tmp_path / "run", reward={"function": f"{file}:reward"}))


def test_the_judge_of_a_procedural_task_is_refused_for_other_records(tmp_path):
    """`rlhf run sft demonstrations.data.path=...` keeps the judge of the default config, which gives 0 to them all."""
    data, judge = {"data": {"path": "mine.jsonl"}}, {"function": "rlhf.lm.tasks:sorted_letters"}
    with pytest.raises(ConfigError, match="set reward to null"):
        run("sft", {"model": {"config": MODEL}, "demonstrations": data, "reward": judge})
    for given in ({"reward": judge}, {"reward": [judge, judge]}, {"gold": judge}):
        with pytest.raises(ConfigError, match="sorted_letters judges answers of a procedural task only"):
            run("grpo", settings(tmp_path, prompts=data) | {"reward": {"function": "mine.py:reward"}} | given)


def test_sft_recipe_learns_and_judges(tmp_path):
    values = {
        "model": {"config": MODEL},
        "demonstrations": {
            "task": {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 64, "held_out": 6}
        },
        "training": {"max_steps": 30, "batch_size": 32, "learning_rate": 1e-2},
        "reward": {"function": "rlhf.lm.tasks:sorted_letters"},
        "sampling": {"max_completion_length": 5},
        "run": {"directory": str(tmp_path), "progress_bar": False},
    }
    metrics = run("sft", values)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 30
    # From log(8 tokens) = 2.1 nats for a fresh model to well below.
    assert lines[0]["loss"] > 1.8
    assert metrics["evaluation/loss"] < 1.2
    assert metrics["evaluation/perplexity"] == pytest.approx(math.exp(metrics["evaluation/loss"]))
    assert "evaluation/greedy_score_mean" in metrics


@pytest.mark.parametrize("recipe", ["sft", "ppo_rlhf", "grpo"])
def test_every_config_loads(recipe):
    found = find_recipe(recipe)
    assert "default" in found.configs
    for path in found.configs.values():
        load_config(import_recipe(found).CONFIG, path)
