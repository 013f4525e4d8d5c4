"""Configs of real models take two steps with a small stand-in model and a small file of the hub set's columns."""

import json

import pytest
import torch
import yaml

from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.data.loading import load_demonstrations, load_prompts
from rlhf.errors import ModelError
from rlhf.lm.loading import ModelConfig, load_causal_lm, load_tokenizer
from tests.reward_models.test_recipe import byte_tokenizer

CONFIGS = [
    ("grpo", "gsm8k_qwen"),
    ("grpo", "gsm8k_qwen_1.5b"),
    ("grpo", "countdown_qwen"),
    ("ppo_rlhf", "gsm8k_qwen"),
    ("ppo_rlhf", "gsm8k_qwen_1.5b"),
    ("ppo_rlhf", "tldr_qwen"),
    ("ppo_rlhf", "hh_qwen"),
    ("grpo", "reasoning_gym"),
    ("sft", "ultrachat_llama"),
    ("sft", "tldr_qwen"),
    ("reward_model", "tldr_qwen"),
    ("reward_model", "hh_qwen"),
    ("reward_model", "ultrafeedback"),
    ("reward_model", "nectar"),
]
SMALL_RL = ["iterations=2", "mixed_precision=no", "collector.prompts_per_iteration=2", "prompts.held_out=2"]
SMALL_RL += ["collector.generation_prompts=2", "collector.sampling.max_completion_length=4", "update.warmup_fraction=0"]
SMALL_SFT = [
    "training.max_steps=2",
    "training.batch_size=2",
    "training.microbatch_size=1",
    "training.precision=float32",
]
# The doctor refuses a model that cannot reach a reward; the stand-in is one.
SMALL_RL += ["doctor.enabled=false"]

GSM8K = {"question": "Tom has 2 apples and eats 1. How many are left?", "answer": "2 - 1 = <<2-1=1>>1\n#### 1"}
COUNTDOWN = {"target": 98, "nums": [44, 19, 35]}
TLDR = {"prompt": "SUBREDDIT: r/x\n\nPOST: I lost my cat.\n\nTL;DR:", "completion": " I lost my cat."}
PREFERENCE = {"prompt": TLDR["prompt"], "chosen": TLDR["completion"], "rejected": " cat."}
HH = {"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: Why is the sky blue?\n\nAssistant: Because of the air."}
HH["rejected"] = HH["chosen"].replace("Because of the air.", "Who knows.")
MESSAGES = [
    {"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(["Hi", "Hello!", "?", "Ok."])
]
ULTRACHAT = {"prompt": "Hi", "prompt_id": "x", "messages": MESSAGES}


def read(recipe: str, name: str, *overrides: str):
    found = find_recipe(recipe)
    module = import_recipe(found)
    return module, load_config(module.CONFIG, found.configs[name], list(overrides))


def rows(folder, row: dict, *, count: int = 8):
    """Rows that differ, so that some can be held out."""
    file = folder / f"{'-'.join(row)}.jsonl"
    key = next((key for key in ("question", "prompt", "target") if key in row and key != "messages"), "prompt")
    lines = []
    for index in range(count):
        changed = dict(row)
        changed[key] = row[key] + index if isinstance(row[key], int) else f"{index} {row[key]}"
        if "messages" in row:
            changed["messages"] = [{"role": "user", "content": f"Hi {index}"}, *row["messages"][1:]]
        lines.append(json.dumps(changed) + "\n")
    file.write_text("".join(lines))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), byte_tokenizer()
    config = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config |= {"num_attention_heads": 2, "max_position_embeddings": 2048}
    load_causal_lm(ModelConfig(config=config), tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(recipe: str, name: str, folder, *overrides: str) -> dict:
    module, config = read(recipe, name, f"run.directory={folder}", "run.progress_bar=false", *overrides)
    module.main(config)
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(("recipe", "name"), CONFIGS)
def test_it_loads_and_says_how_to_run_it_and_that_it_was_not_measured(recipe, name):
    read(recipe, name)
    first, second, *_ = find_recipe(recipe).configs[name].read_text().splitlines()
    assert first.startswith("# Not yet measured.")
    assert first.endswith("GPU.")
    command = f"rlhf run {recipe} --config {name}"
    assert second.startswith(f"# On 1 GPU: {command}. On 8: {command} --processes 8")


@pytest.mark.parametrize(("recipe", "name"), CONFIGS)
def test_eight_processes_share_its_batches_evenly(recipe, name):
    values = yaml.safe_load(find_recipe(recipe).configs[name].read_text())
    if recipe == "sft":
        batch, most = values["training"]["batch_size"], values["training"]["microbatch_size"]
        assert (batch // 8) % min(most, batch // 8) == 0
    elif recipe != "reward_model":
        batch = values["collector"]["prompts_per_iteration"]
    else:
        batch = values["training"]["batch_prompts"]
    assert batch % 8 == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "name", "row"),
    [
        ("grpo", "gsm8k_qwen", GSM8K),
        ("grpo", "gsm8k_qwen_1.5b", GSM8K),
        ("grpo", "countdown_qwen", COUNTDOWN),
        ("ppo_rlhf", "gsm8k_qwen", GSM8K),
        ("ppo_rlhf", "gsm8k_qwen_1.5b", GSM8K),
    ],
)
def test_verifiable_rewards_take_two_steps(recipe, name, row, model, tmp_path):
    file = rows(tmp_path, row)
    overrides = [f"prompts.data.path={file}", f"model.path={model}", "collector.group_size=2"]
    if row is GSM8K:
        overrides += ["prompts.data.name=null", "prompts.held_out_data=null"]
    if recipe == "ppo_rlhf":
        overrides += ["critic.warmup_iterations=1"]
    summary = run(recipe, name, tmp_path / "run", *SMALL_RL, *overrides)
    assert summary["iterations"] == 2


@pytest.mark.slow
def test_llama_learns_every_turn_of_ultrachat(model, tmp_path):
    file = rows(tmp_path, ULTRACHAT)
    overrides = [f"demonstrations.data.path={file}", "demonstrations.held_out=2", f"model.path={model}"]
    overrides += ["model.tokenizer=null", "model.pad_token=null", *SMALL_SFT]
    _, config = read("sft", "ultrachat_llama", *overrides)
    demonstration = load_demonstrations(config.demonstrations.data)[0]
    assert (len(demonstration.prompt), demonstration.completion) == (3, MESSAGES[-1:])
    assert run("sft", "ultrachat_llama", tmp_path / "run", *overrides)["iterations"] == 2
    assert (tmp_path / "run" / "model_best" / "model.safetensors").is_file()


@pytest.mark.slow
def test_tldr_goes_from_sft_over_the_reward_model_to_ppo(model, tmp_path):
    texts, pairs = rows(tmp_path, TLDR), rows(tmp_path, PREFERENCE)
    sft = [f"demonstrations.data.path={texts}", "demonstrations.held_out_data=null", "demonstrations.held_out=2"]
    assert run("sft", "tldr_qwen", tmp_path / "sft", *sft, f"model.path={model}", *SMALL_SFT)["iterations"] == 2
    start = f"model.path={tmp_path / 'sft' / 'model'}"
    judge = [f"data.path={pairs}", "held_out=0.25", "training.precision=float32", "training.batch_prompts=3"]
    judge += ["training.microbatch_prompts=3"]
    assert run("reward_model", "tldr_qwen", tmp_path / "judge", *judge, start)["iterations"] == 2
    reward = tmp_path / "judge" / "reward_model"
    ppo = [f"prompts.data.path={texts}", "prompts.held_out_data=null", f"reward.arguments.folder={reward}"]
    ppo += [start, f"critic.start={reward}", "algorithm.minibatches=2"]
    assert run("ppo_rlhf", "tldr_qwen", tmp_path / "ppo", *ppo, *SMALL_RL)["iterations"] == 2


@pytest.mark.slow
def test_hh_goes_from_the_reward_model_to_ppo(model, tmp_path):
    pairs = tmp_path / "hh.jsonl"
    lines = [{name: text.replace("Hi?", f"Hi {index}?") for name, text in HH.items()} for index in range(8)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    judge = [f"data.path={pairs}", "held_out=0.25", "training.precision=float32", "training.batch_prompts=3"]
    judge += ["training.microbatch_prompts=3", f"model.path={model}"]
    assert run("reward_model", "hh_qwen", tmp_path / "judge", *judge)["iterations"] == 2
    reward = tmp_path / "judge" / "reward_model"
    ppo = [f"prompts.data.path={pairs}", "prompts.held_out_data=null", f"reward.arguments.folder={reward}"]
    ppo += [f"model.path={model}", f"critic.start={reward}", "algorithm.minibatches=2"]
    _, config = read("ppo_rlhf", "hh_qwen", *ppo)
    prompt = load_prompts(config.prompts.data)[0].prompt
    assert [message["role"] for message in prompt] == ["user", "assistant", "user"]
    assert run("ppo_rlhf", "hh_qwen", tmp_path / "ppo", *ppo, *SMALL_RL)["iterations"] == 2


def test_a_pad_token_is_taken_from_the_vocabulary(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(ModelConfig(path=str(tmp_path), pad_token="<|im_end|>"))
    assert loaded.pad_token_id == loaded.eos_token_id
    with pytest.raises(ModelError, match=r"no such token.*nowhere"):
        load_tokenizer(ModelConfig(path=str(tmp_path), pad_token="nowhere"))
