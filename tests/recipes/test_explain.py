"""`rlhf explain` of every language recipe: batches by hand, memory by hand, and what it says where it cannot know."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reward_models.loading import make_reward_model
from reward_models.scorer import RewardModelScorer
from rlhf.commands.explaining import explain_plan
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config, validate
from rlhf.lm.footprint import measure_model
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm
from rlhf.lm.plan_memory import judge_bytes, rollout_memory
from rlhf.lm.sources import RewardConfig
from tests.lm.test_plan import MODEL, TASK, TOKENIZER, bytes_of, config
from tests.reward_models.test_recipe import byte_tokenizer

LANGUAGE = ("sft", "rankings", "reward_model", "reward_bench", "ppo_rlhf", "grpo", "text_environment", "evaluate")
LANGUAGE += ("overoptimization", "pipeline")
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
}
"""Of Qwen2.5-0.5B's config.json."""


def explain(recipe, *overrides, name=None, **options):
    found = find_recipe(recipe)
    module = import_recipe(found)
    return explain_plan(load_config(module.CONFIG, found.configs[name] if name else None, list(overrides)), **options)


def explain_values(recipe, values, **options):
    return explain_plan(validate(import_recipe(find_recipe(recipe)).CONFIG, values), **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A language model and two reward models of it."""
    root = tmp_path_factory.mktemp("folders")
    settings = ModelConfig(config=MODEL)
    load_causal_lm(settings, TOKENIZER).save_pretrained(root / "model")
    TOKENIZER.save_pretrained(root / "model")
    for member in range(2):
        model = make_reward_model(settings, character_tokenizer("abcde>"))
        RewardModelScorer(model, character_tokenizer("abcde>")).save_pretrained(root / f"reward_{member}")
    return root


@pytest.mark.parametrize("recipe", LANGUAGE)
def test_every_shipped_config_is_explained_with_nothing_loaded(recipe, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
    monkeypatch.setattr("rlhf.data.loading.read_rows", refuse)
    for name in find_recipe(recipe).configs:
        told = explain(recipe, name=name)
        assert "Batches" in told
        assert "Memory" in told
        assert "This machine: " in told


def test_the_parameters_of_a_real_model_are_the_published_ones(tmp_path):
    """494,032,768, of the model's card: 0.49B; with bfloat16 as it is stored 0.92 GiB."""
    from transformers import AutoConfig

    AutoConfig.for_model(**QWEN).save_pretrained(tmp_path)
    told = explain("grpo", f"model.path={tmp_path}", name="gsm8k_qwen")
    assert "494,032,768 parameters" in told
    # 4 bytes a weight, a gradient, and two states of AdamW.
    assert f"weights: {494_032_768 * 4 / 2**30:.2f} GiB" in told
    assert f"optimizer: {494_032_768 * 8 / 2**30:.2f} GiB" in told
    # 32 prompts at once x 8, 512 + 512 tokens; an evaluation's 64 x 1 are fewer. 24 layers x 2 heads x (64 + 64) x 4.
    assert f"KV cache: {256 * 1024 * 24 * 2 * 128 * 4 / 2**30:.2f} GiB" in told
    assert "an evaluation: the held-out prompts, 1 answers each; 11 of them" in told
    eight = explain("grpo", f"model.path={tmp_path}", name="gsm8k_qwen", processes=8, sharded=True)
    assert f"optimizer: {494_032_768 * 8 / 8 / 2**30:.2f} GiB" in eight
    assert f"weights gathered for a rollout: {494_032_768 * 4 / 2**30:.2f} GiB" in eight


def test_average_and_reward_models_are_counted(folders):
    size = measure_model(ModelConfig(config=MODEL), TOKENIZER)
    scorer = RewardModelScorer.from_pretrained(folders / "reward_0")
    one = bytes_of(scorer.model.parameters())
    single = {"function": "reward_models:RewardModelScorer.from_pretrained"}
    single["arguments"] = {"folder": str(folders / "reward_0")}
    several = {"function": "reward_models:EnsembleScorer.from_pretrained"}
    several["arguments"] = {"folders": str(folders / "reward_*")}
    memory = rollout_memory(config(reward=single, gold=several, ema={}), size, tokenizer=TOKENIZER)
    assert memory["reward models"] == 3 * one
    assert memory["moving average"] == size.weight_bytes
    plain = rollout_memory(config(), size, tokenizer=TOKENIZER)
    assert (plain["reward models"], plain["moving average"]) == (0, 0)
    assert judge_bytes([RewardConfig(function="x:y", arguments={"folder": str(folders / "nowhere")})]) is None


def test_shards_are_divided_and_the_reference_is_not(folders):
    size = measure_model(ModelConfig(config=MODEL), TOKENIZER)
    whole = rollout_memory(config(critic="copy"), size, processes=2, tokenizer=TOKENIZER)
    shard = rollout_memory(config(critic="copy"), size, processes=2, sharded=True, tokenizer=TOKENIZER)
    for name in ("weights", "critic", "gradients", "optimizer"):
        assert 2 * (shard[name] or 0) == pytest.approx(whole[name], abs=2)
    assert shard["reference"] == whole["reference"] == size.weight_bytes
    assert shard["weights gathered for a rollout"] == whole["weights"] + whole["critic"]


def test_answers_by_hand(folders):
    values = {
        "model": {"path": str(folders / "model")},
        "prompts": {"task": TASK},
        "sampling": {"max_completion_length": 10},
        "evaluation": {"samples_per_prompt": 3, "prompts_per_batch": 2},
        "rewards": {
            "score": {
                "function": "reward_models:RewardModelScorer.from_pretrained",
                "arguments": {"folder": str(folders / "reward_0")},
            }
        },
    }
    told = explain_values("evaluate", values)
    # 4 held-out prompts x (1 greedy + 3 sampled).
    assert "4 prompts x 4 answers of at most 10 tokens = 16 completions, 160 tokens; 2 prompts at once" in told
    # 2 prompts x 3 samples x 10 tokens x 2 layers x 2 heads x (4 + 4) x 4 bytes.
    assert f"KV cache: {6 * 10 * 2 * 2 * 8 * 4 / 2**20:.2f} MiB" in told
    assert "reward models: 0.0" in told
    rankings = {"model": values["model"], "source": values["prompts"], "sampling": values["sampling"]}
    told = explain_values("rankings", rankings | {"num_candidates": 5})
    assert "14 prompts x 5 answers of at most 10 tokens = 70 completions, 700 tokens" in told
    assert "4 answers; the reward" in explain_values(
        "reward_bench", {"reward": values["rewards"]["score"], "task": {**TASK, "held_out": 1}, "num_candidates": 4}
    )


def test_the_lab_by_hand():
    told = explain("overoptimization", "seeds=[0, 1]", name="default")
    assert "2 starts, one per seed" in told
    assert "200 prompts x 4 = 800 completions of at most 8 tokens" in told
    assert "64 prompts x 1,024 = 65,536 completions" in told
    assert "18 policies" in told
    # 40 iterations x 128 prompts x 2; 40 x 4 epochs x 1 minibatch; (40 / 2 + 1) x 64 prompts x 8 samples.
    assert "40 iterations = 10,240 completions, 160 optimizer steps; measured on 10,752 completions" in told


def test_a_pipeline_is_told_stage_by_stage():
    told = explain("pipeline", name="default")
    assert told.count("# --- stage ") == told.count("# Batches") == 6
    assert "sft_words/model: config.json cannot be read" in told  # it is there once the first stage has run


def test_procedural_prompts_and_demonstrations_are_counted():
    told = explain("ppo_rlhf", name="default")
    assert "prompts are not counted" not in told
    sft = explain_values("sft", {"model": {"config": MODEL}, "demonstrations": {"task": TASK}})
    # 32 rows of "abc>" + "abc" + end, not of the 1,024 tokens that would be let in.
    from rlhf.lm.activations import activation_bytes

    row = activation_bytes(ModelConfig(config=MODEL), length=8, tokenizer=TOKENIZER)
    assert row is not None
    assert f"activations of a microbatch, about: {32 * row / 2**20:.2f} MiB" in sft


PEAK = """
import json, sys
from pathlib import Path
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import validate
module = import_recipe(find_recipe("ppo_rlhf"))
module.main(validate(module.CONFIG, json.loads(sys.argv[1])))
# Not getrusage: its maximum is inherited from the parent.
print("peak", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("changes", [{"ema": {}}, {"model": {"gradient_checkpointing": True}}])
def test_the_measured_peak_is_near_the_estimate(changes, tmp_path):
    """By how much a process grows over one that trains next to nothing; GPT-2, which goes through its own forward."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "a" * 99 + chr(98 + index)}) + "\n" for index in range(12)))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def settings(width, layers):
        model = {"model_type": "gpt2", "n_embd": width, "n_layer": layers, "n_head": 1, "n_positions": 256}
        return {
            "model": {"config": model, "tokenizer": str(tmp_path / "tokenizer")} | changes.get("model", {}),
            "prompts": {"data": {"path": str(prompts)}, "held_out": 4},
            "reward": {"function": "tests.recipes.test_language_recipes:shortness"},
            "collector": {"prompts_per_iteration": 4, "max_prompt_length": 100, "group_size": 4},
            "algorithm": {"preset": "ppo_rlhf", "epochs": 1},
            "evaluation": {"samples_per_prompt": 1},
            "doctor": {"enabled": False},
            "iterations": 2,
            "run": {"directory": str(tmp_path / f"run_{width}"), "progress_bar": False},
        } | {name: value for name, value in changes.items() if name != "model"}

    # Freed memory goes back at once; left to themselves, processes keep up to half a GiB (rlhf.training.allocation).
    tight = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"}

    def peak(values) -> float:
        values["collector"]["sampling"] = {"max_completion_length": 100}
        done = subprocess.run(
            [sys.executable, "-c", PEAK, json.dumps(values)], check=True, capture_output=True, text=True, env=tight
        )
        return float(done.stdout.split()[-1]) * 1024

    large, small = settings(384, 6), settings(2, 1)
    grown = peak(large) - peak(small)
    config = validate(import_recipe(find_recipe("ppo_rlhf")).CONFIG, large)
    tokenizer = byte_tokenizer()
    size = measure_model(config.model, tokenizer)
    estimate = sum(rollout_memory(config, size, prompt_length=100, tokenizer=tokenizer).values())
    print(f"grown by {grown / 2**20:.0f} MiB, estimated {estimate / 2**20:.0f} MiB")
    assert 0.6 * estimate < grown < 1.25 * estimate
