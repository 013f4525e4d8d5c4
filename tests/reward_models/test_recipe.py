"""The recipe: its configs load, its sources work, its folder opens."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from reward_models.scorer import RewardModelScorer
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.data.loading import load_rankings
from rlhf.errors import ConfigError
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm

RECIPE = find_recipe("reward_model")
SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
SMALL = ["task.train=24", "task.held_out=8", "training.batch_prompts=12", "model.config.hidden_size=16"]


def load(config="default", *overrides):
    return load_config(import_recipe(RECIPE).CONFIG, RECIPE.configs[config], overrides)


def run(config):
    return import_recipe(RECIPE).main(config)


@pytest.mark.parametrize("name", sorted(RECIPE.configs))
def test_every_config_loads_and_survives_being_written(name):
    config = load(name)
    assert type(config).model_validate(config.model_dump(mode="json")) == config


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


# --- recipes for real models: two steps with a small stand-in and a small file of the same columns ------------------


def stand_in(folder, tmp_path):
    """A tiny language model with a tokenizer that knows bytes, saved as a hub model would be."""
    tokenizer = byte_tokenizer()
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "max_position_embeddings": 2048}
    load_causal_lm(ModelConfig(config=config), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    small = ["training.precision=float32", "training.batch_prompts=4", "training.microbatch_prompts=2"]
    return [f"model.path={folder}", "held_out=0.25", *small, f"run.directory={tmp_path}/run"]


def byte_tokenizer():
    backend = Tokenizer(models.BPE(byte_letters(), []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return tokenizer


def byte_letters():
    return {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def ultrafeedback_row(index):
    """All columns of openbmb/UltraFeedback; "a<|im_end|>b" as models do write it. The last rows are bad."""
    scores = [4.25, 2.0, 4.0, 1.5] if index else [3.0, 3.0, 3.25, 3.0]
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    annotations = {aspect: {"Rating": "3", "Rationale": "So so."} for aspect in aspects}
    if index == 11:
        scores = [4.25, float("nan"), 4.0, 1.5]
    return {
        "source": "evol_instruct",
        "instruction": f"Question {index}?",
        "models": ["a", "b", "c", "d"],
        "completions": [
            {
                "annotations": annotations,
                "custom_system_prompt": "Be helpful.",
                "model": "a",
                "principle": "helpfulness",
                "response": f"Answer {score} <|im_end|>.",
                "critique": "Good.",
                "overall_score": 9.0,
                "fine-grained_score": score,
            }
            for score in (scores if index < 12 else [])
        ],
        "correct_answers": ["None"],
        "incorrect_answers": ["None"],
    }


def nectar_row(index):
    """All columns of berkeley-nest/Nectar."""
    return {
        "prompt": f"\n\nHuman: Hello {index}\n\nAssistant: Hi!\n\nHuman: Go on\n\nAssistant: ",
        "answers": [{"answer": f"Answer {rank}", "model": "m", "rank": float(rank)} for rank in (3, 1, 2, 7, 5, 4, 6)],
        "turns": 2,
        "num_responses": 7,
        "source": ["x"],
        "good_natured": True,
    }


@pytest.mark.filterwarnings("ignore:.*tie and were dropped", "ignore:dropped")
@pytest.mark.parametrize(("name", "make_row"), [("ultrafeedback", ultrafeedback_row), ("nectar", nectar_row)])
def test_real_model_recipe_takes_two_steps(tmp_path, name, make_row):
    file = tmp_path / "rows.jsonl"
    count = 13 if name == "ultrafeedback" else 11
    file.write_text("".join(json.dumps(make_row(index)) + "\n" for index in range(count)))
    config = load(name, f"data.path={file}", *stand_in(tmp_path / "model", tmp_path))
    rankings = load_rankings(config.data)
    if name == "ultrafeedback":
        # Row 0 is one tie within the gap of 0.5, row 11 has no number, row 12 no answer. 4.25 and 4.0 tie, 2.0
        # and 1.5 do not.
        assert len(rankings) == 10
        assert rankings[0].ranks == (0, 1, 0, 2)
        assert rankings[0].prompt == [{"role": "user", "content": "Question 1?"}]
    else:
        assert len(rankings) == 11
        assert rankings[0].ranks == (2, 0, 1, 6, 4, 3, 5)
        assert rankings[0].prompt == "Human: Hello 0\n\nAssistant: Hi!\n\nHuman: Go on\n\nAssistant:"
    run(config)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["iterations"] >= 2
    assert len(RewardModelScorer.from_pretrained(tmp_path / "run/reward_model")(["a"], ["b"])) == 1


def test_normalisation_on_references_without_scaling(tmp_path):
    file = tmp_path / "references.jsonl"
    file.write_text("".join(json.dumps({"prompt": "kt>", "completion": text}) + "\n" for text in ("ktaeio", "ktzzzz")))
    references = [f"normalization.references.path={file}", "normalization.unit_variance=false"]
    run(load("default", *SMALL, *references, f"run.directory={tmp_path}/run"))
    scorer = RewardModelScorer.from_pretrained(tmp_path / "run/reward_model")
    assert scorer.std == 1.0
    assert sum(scorer(["kt>"] * 2, ["ktaeio", "ktzzzz"])) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        "training.loss={type: all_pairs, label_smoothing: 0.1, margin: {per: rank, size: 0.5}}",
        "training.loss={type: plackett_luce, top_m: 2, divide_by: choices}",
        "training.loss={type: best_of}",
        "training.centering={coefficient: 0.01, form: pair_sums}",
    ],
)
def test_every_loss_is_set_from_yaml(tmp_path, loss):
    metrics = run(load("default", *SMALL, loss, f"run.directory={tmp_path}/run"))
    assert 0 <= metrics["evaluation/kendall_tau"] + 1 <= 2
