"""`rlhf explain`: batch arithmetic by hand, memory against real models, optimizers and caches."""

import pytest
import torch
from accelerate import Accelerator
from transformers import DynamicCache

from rlhf.commands.explaining import explain_plan
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import Config, validate
from rlhf.errors import ModelError
from rlhf.lm.actors import make_actors
from rlhf.lm.footprint import cache_bytes_per_token, measure_model
from rlhf.lm.loading import LoraSettings, ModelConfig, character_tokenizer, load_causal_lm
from rlhf.lm.plan import plan
from rlhf.lm.plan_memory import critic_bytes, imitation_memory, ranking_memory, rollout_memory
from tests.lm.fresh_models import fresh_model

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TASK = {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 10, "held_out": 4}
TOKENIZER = character_tokenizer("abcde>")


def config(recipe="ppo_rlhf", **changes):
    values = {
        "model": {"config": MODEL},
        "prompts": {"task": TASK},
        "reward": {"function": "x.py:f"},
        "collector": {
            "prompts_per_iteration": 12,
            "group_size": 4,
            "generation_prompts": 3,
            "max_prompt_length": 6,
            "sampling": {"max_completion_length": 10},
        },
        "iterations": 5,
        **changes,
    }
    return validate(import_recipe(find_recipe(recipe)).CONFIG, values)


def bytes_of(parameters) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "gpt2", "mixtral", "gemma3", "deepseek_v3"])
def test_parameters_and_bytes_are_those_of_the_model_that_is_loaded(name, tmp_path):
    """Only config.json lies in the folder; the other model is real."""
    real = fresh_model(name)
    real.config.save_pretrained(tmp_path)
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        size = measure_model(ModelConfig(path=str(tmp_path), dtype=dtype))
        assert size.parameters == size.trainable == sum(parameter.numel() for parameter in real.parameters())
        assert size.weight_bytes == size.trainable_bytes == size.parameters * width
    assert size.vocabulary == real.config.vocab_size


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma", "deepseek_v3"])
def test_cache_bytes_are_those_of_a_real_cache(name):
    model = fresh_model(name)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 8)[None], past_key_values=cache, use_cache=True)
    real = sum(bytes_of([layer.keys, layer.values]) for layer in cache.layers)
    assert 5 * cache_bytes_per_token(model.config, torch.float32) == real


def test_adapters_are_what_is_trained():
    settings = ModelConfig(config=MODEL, lora=LoraSettings(rank=2))
    size, real = measure_model(settings, TOKENIZER), load_causal_lm(settings, TOKENIZER)
    assert size.trainable_bytes == bytes_of(parameter for parameter in real.parameters() if parameter.requires_grad)
    assert size.weight_bytes == bytes_of(real.parameters())
    assert 0 < size.trainable < size.parameters


def test_quantized_weights_take_four_bits_each(tmp_path):
    fresh_model("llama").config.save_pretrained(tmp_path)
    settings = {"path": str(tmp_path), "lora": LoraSettings(rank=2)}
    whole = measure_model(ModelConfig(**settings)).weight_bytes
    # Of each of 2 layers q, o: 32 x 32, k, v: 32 x 16, three of 32 x 48, at 4 bytes against 4.127 bits.
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    quantized = measure_model(ModelConfig(**settings, quantization="nf4")).weight_bytes
    assert whole - quantized == pytest.approx(weights * (4 - 4.127 / 8), abs=8)


def test_nothing_is_allocated():
    """Eight billion parameters in a moment, on any machine."""
    large = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    large |= {"num_attention_heads": 32, "num_key_value_heads": 8}
    size = measure_model(ModelConfig(config=large, dtype="bfloat16"), TOKENIZER)
    # A layer: q and o 2 x 4096^2, k and v 2 x 4096 x 1024, three of 4096 x 14336, two norms; then one norm, and
    # embedding and head for 9 tokens.
    layer = 2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
    assert size.parameters == 32 * layer + 4096 + 2 * 9 * 4096
    assert size.cache_bytes == 2 * 32 * 8 * 128 * 2


@pytest.mark.parametrize("start", ["head", "copy"])
def test_critic_and_policy_weigh_what_the_real_ones_do(start):
    settings = config(critic=start)
    actors = make_actors(
        settings.model,
        settings.algorithm,
        temperature=1.0,
        critic=start,
        tokenizer=TOKENIZER,
        accelerator=Accelerator(cpu=True),
    )
    size = measure_model(settings.model, TOKENIZER)
    assert size.weight_bytes + critic_bytes(settings, size)[0] == bytes_of(actors.policy.parameters())


def test_optimizer_states_are_those_of_torch():
    size = measure_model(ModelConfig(config=MODEL), TOKENIZER)
    model = load_causal_lm(ModelConfig(config=MODEL), TOKENIZER)
    for name, optimizer in (
        ("adamw", torch.optim.AdamW(model.parameters())),
        ("rmsprop", torch.optim.RMSprop(model.parameters())),
    ):
        model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()
        optimizer.step()
        real = sum(
            bytes_of([tensor for tensor in state.values() if tensor.ndim > 0]) for state in optimizer.state.values()
        )
        settings = config("grpo", update={"optimizer": name})
        assert rollout_memory(settings, size, tokenizer=TOKENIZER)["optimizer"] == real
    values = {"model": {"config": MODEL}, "demonstrations": {"task": TASK}}
    imitation = validate(import_recipe(find_recipe("sft")).CONFIG, values)
    assert imitation_memory(imitation, size, tokenizer=TOKENIZER)["optimizer"] == 2 * size.weight_bytes


def test_memory_of_the_rest_by_hand():
    size = measure_model(ModelConfig(config=MODEL), TOKENIZER)
    memory = rollout_memory(config(), size, processes=2, prompt_length=6, tokenizer=TOKENIZER)
    # An evaluation writes more at once than a rollout's 3 prompts x 4: 4 held-out prompts x 4 samples.
    # 6 + 10 tokens each; 2 layers x 2 heads x (4 + 4) numbers of 4 bytes a token.
    assert memory["KV cache"] == 16 * 16 * 2 * 2 * 8 * 4
    few = rollout_memory(config(evaluation={"samples_per_prompt": 1}), size, processes=2, tokenizer=TOKENIZER)
    assert few["KV cache"] == 12 * 10 * 2 * 2 * 8 * 4
    # 6 of the 12 prompts x 4 completions x 10 tokens; old, sampling and reference log-probs, values, next values.
    assert memory["log-probs and values"] == 24 * 10 * 5 * 4
    assert memory["reference"] == size.weight_bytes
    # 240 positions x 9 tokens in float32, twice: less than a chunk.
    assert memory["logits of a chunk, forward and backward"] == 2 * 240 * 9 * 4
    lora = config(model={"config": MODEL, "lora": {"rank": 2}})
    assert rollout_memory(lora, measure_model(lora.model, TOKENIZER), tokenizer=TOKENIZER)["reference"] == 0


@pytest.mark.parametrize(("critic", "bodies"), [("copy", 2), ("head", 1)])
def test_a_kept_forward_takes_its_activations_over_the_rollout(critic, bodies):
    size = measure_model(ModelConfig(config=MODEL), TOKENIZER)
    changes = {"critic": critic, "update": {"microbatch_tokens": 64}}
    collector = config().collector.model_dump()
    plain, kept = (
        rollout_memory(
            config(**changes, collector=collector | {"keep_forward": keep}),
            size,
            prompt_length=6,
            tokenizer=TOKENIZER,
        )
        for keep in (False, True)
    )
    of_a_token = plain["activations of a microbatch, about"] / (bodies * 64)
    assert kept["activations of a microbatch, about"] == round((bodies - 1) * 64 * of_a_token)
    # 12 prompts x 4 completions x (6 + 10) tokens
    assert kept["activations of a forward over a rollout, about"] == round(48 * 16 * of_a_token)
    assert "activations of a forward over a rollout, about" not in plain


def test_batches_by_hand():
    algorithm = {"preset": "ppo_rlhf", "epochs": 2, "minibatches": 3}
    text = "\n".join(plan(config(algorithm=algorithm), processes=2))
    assert "Batches, over 2 processes" in text
    assert "12 prompts x 4 = 48 completions of at most 10 tokens, 480 in all; a process has 6 prompts" in text
    assert "2 x 3 = 6 optimizer steps of 16 completions" in text
    assert "5 iterations = 60 prompts, 240 completions, at most 2,400 tokens, 30 optimizer steps" in text
    assert "CPU cores" in text


@pytest.mark.parametrize(
    ("changes", "collector", "said"),
    [
        (
            {"algorithm": "ppo_rlhf"},
            {},
            "4 x over the completions, and backward; before it the reference and the policy",
        ),
        (
            {"algorithm": "ppo_rlhf", "critic": "copy"},
            {"keep_forward": True},
            "backward, the first with a forward that was kept; before it the reference and the critic and every 20th "
            "time the policy (always where",
        ),
        (
            {"algorithm": "dr_grpo"},
            {},
            "1 x over the completions, and backward; before it every 20th time the policy (the one",
        ),
        ({"algorithm": {"preset": "dr_grpo", "epochs": 2}}, {}, "before it every 20th time the policy (always where"),
        ({"algorithm": "dr_grpo"}, {"old_log_probs": "recompute"}, "before it the policy read"),
        ({"algorithm": "dr_grpo"}, {"old_log_probs": "sampling"}, "nothing reads them before it"),
        (
            {"algorithm": "grpo"},
            {"sampling": {"max_completion_length": 10, "top_p": 0.9}},
            "before it the reference and the policy read",
        ),
    ],
)
def test_forwards_are_told(changes, collector, said):
    values = config().collector.model_dump() | collector
    assert said in "\n".join(plan(config(**changes, collector=values)))


def test_batches_of_fine_tuning_by_hand():
    module = import_recipe(find_recipe("sft"))
    values = {"model": {"config": MODEL}, "demonstrations": {"task": TASK}}
    values |= {"training": {"batch_size": 32, "microbatch_size": 4, "max_length": 64, "max_steps": 10}}
    text = "\n".join(plan(validate(module.CONFIG, values), processes=2))
    assert "32 demonstrations of at most 64 tokens, 2,048 in all; a process takes 4 x 4" in text
    assert "10 optimizer steps = 320 demonstrations, at most 20,480 tokens" in text


def test_what_is_explained_stands_in_comments_and_what_is_unknown_is_said(tmp_path):
    missing = config(model={"path": str(tmp_path)})
    text = explain_plan(missing)
    assert all(line.startswith("# ") for line in text.splitlines())
    assert "Memory: not known." in text
    assert "config.json cannot be read" in text
    with pytest.raises(ModelError, match=r"config.json cannot be read"):
        measure_model(missing.model)


def test_other_recipes_have_no_plan():
    assert explain_plan(Config()) == ""


def test_episodes_by_hand():
    """6 start states x 2 = 12 episodes an iteration, 3 x 4 steps of 3 episodes, 5 iterations."""
    module = import_recipe(find_recipe("text_environment"))
    values = {
        "model": {"config": MODEL},
        "environment": {"function": "rlhf.lm.guessing:GuessingGame"},
        "algorithm": {"preset": "ppo_rlhf", "epochs": 3, "minibatches": 4},
        "collector": {
            "starts_per_iteration": 6,
            "group_size": 2,
            "max_episode_length": 50,
            "sampling": {"max_completion_length": 4},
        },
        "iterations": 5,
    }
    told = explain_plan(validate(module.CONFIG, values), processes=2)
    assert "6 start states x 2 = 12 episodes of at most 50 tokens" in told
    assert "a process has 3 start states" in told
    assert "3 x 4 = 12 optimizer steps of 3 episodes" in told
    assert "5 iterations = 60 episodes, at most 3,000 tokens, 60 optimizer steps" in told


def test_rankings_by_hand():
    """24 prompts a step over 2 processes: 12 each, 4 at once; 2 passes over 96 rankings."""
    module = import_recipe(find_recipe("reward_model"))
    values = {
        "model": {"config": MODEL},
        "task": {**TASK, "name": "vowel_words", "train": 96},
        "num_candidates": 4,
        "training": {"batch_prompts": 24, "microbatch_prompts": 4, "epochs": 2, "max_length": 10},
    }
    told = explain_plan(validate(module.CONFIG, values), processes=2)
    assert "24 prompts with 4 answers, each with its prompt at most 10 tokens; a process takes 12 prompts, 4" in told
    assert "2 x 96 rankings / 24 = 8 optimizer steps, 768 completions" in told
    assert "logits" not in told


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)])
def test_a_reward_models_bytes_are_those_of_the_model_that_is_trained(lora):
    from reward_models.loading import make_reward_model

    settings = ModelConfig(config=MODEL, lora=lora)
    real = make_reward_model(settings, TOKENIZER)
    memory = ranking_memory(measure_model(settings, TOKENIZER))
    assert memory["weights"] == bytes_of(real.parameters())
    learned = bytes_of(parameter for parameter in real.parameters() if parameter.requires_grad)
    assert memory["gradients"] == learned
    assert memory["optimizer"] == 2 * learned


def test_vllm_has_its_own_cache():
    told = explain_plan(config(generator={"type": "vllm", "memory_fraction": 0.4}))
    assert "vLLM besides: 40% of the GPU's memory" in told
    assert "KV cache" not in told
    assert "on its server" in explain_plan(config(generator={"type": "vllm", "server": "http://x:8000"}))
