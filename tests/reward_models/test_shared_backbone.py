"""Policy, critic, reward model and reference on one backbone: the same numbers as with a body for each."""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from torch import nn

from reward_models.loading import make_reward_model, prepare_tokenizer
from reward_models.scorer import RewardModelScorer
from reward_models.shared_backbone import AdapterScorer
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import validate
from rlhf.errors import ModelError, RewardError
from rlhf.lm.adapters import REWARD
from rlhf.lm.critic import make_critic
from rlhf.lm.loading import LoraSettings, ModelConfig, character_tokenizer, load_causal_lm, load_tokenizer
from rlhf.lm.policy import LanguageModelPolicy

MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 2, "max_position_embeddings": 32}
PROMPTS, COMPLETIONS = ["ab>", "c>", "abca>"], ["abc", "", "bbbbb"]


def save_base(folder):
    torch.manual_seed(0)
    tokenizer = character_tokenizer("abc>")
    tokenizer.add_special_tokens({"unk_token": "<unk>"})  # the reward model's pad token
    model = load_causal_lm(ModelConfig(config=MODEL), tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_reward_adapter(base, folder, *, rank=2):
    """A reward model with LoRA whose adapters and head are far from their start."""
    tokenizer = prepare_tokenizer(load_tokenizer(base))
    model = make_reward_model(ModelConfig(path=str(base), lora=LoraSettings(rank=rank)), tokenizer)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "score" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    scorer = RewardModelScorer(model, tokenizer, mean=0.7, std=2.0)
    scorer.save_pretrained(folder, adapters="keep")
    return scorer(PROMPTS, COMPLETIONS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    save_base(root / "base")
    expected = save_reward_adapter(root / "base", root / "reward")
    return root / "base", root / "reward", expected


def lora_policy(base, **settings):
    return load_causal_lm(ModelConfig(path=str(base), lora=LoraSettings(rank=3), **settings))


def test_scores_are_those_of_the_reward_model_with_a_body_of_its_own(folders):
    base, reward, expected = folders
    policy = LanguageModelPolicy(lora_policy(base))
    for name, parameter in policy.named_parameters():
        if "lora_" in name:  # the policy has learned something meanwhile
            nn.init.normal_(parameter, std=0.3)
    scorer = AdapterScorer(reward)
    scorer.attach(policy.model)
    assert scorer(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    opened = RewardModelScorer.from_pretrained(reward)
    assert opened(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)


def test_the_policy_does_not_notice(folders):
    base, reward, _ = folders
    policy = LanguageModelPolicy(lora_policy(base))
    inputs = {"prompt_ids": torch.tensor([[3, 4, 6]]), "prompt_mask": torch.ones(1, 3, dtype=torch.bool)}
    inputs["completion_mask"] = torch.ones(1, 2, dtype=torch.bool)
    actions = torch.tensor([[3, 2]])
    before = policy(inputs, actions).log_probs
    asked = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    scorer = AdapterScorer(reward)
    scorer.attach(policy.model)
    scorer(PROMPTS, COMPLETIONS)
    assert torch.equal(policy(inputs, actions).log_probs, before)
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == asked
    frozen = [parameter for name, parameter in policy.named_parameters() if f".{REWARD}." in name]
    assert frozen
    assert not any(parameter.requires_grad for parameter in frozen)


@pytest.mark.parametrize("shares", [True, False])
def test_a_critic_from_the_reward_model_starts_with_its_normalised_scores(folders, shares, tmp_path):
    base, reward, _ = folders
    settings = ModelConfig(path=str(base), lora=LoraSettings(rank=3))
    model = load_causal_lm(settings)
    start = reward
    if not shares:  # the same reward model, merged into weights of its own
        merged = RewardModelScorer.from_pretrained(reward)
        merged.save_pretrained(start := tmp_path / "merged")
    critic = make_critic(str(start), policy_model=model, model=settings, tokenizer=character_tokenizer("abc>"))
    policy = LanguageModelPolicy(model, critic=critic)
    scorer = RewardModelScorer.from_pretrained(reward)
    prompt, completion = torch.tensor([[3, 4, 6]]), torch.tensor([[5, 3, 4, 2]])
    inputs = {"prompt_ids": prompt, "prompt_mask": prompt > 0, "completion_mask": completion > 0}
    with torch.no_grad():
        values = policy(inputs, completion).values[0]
        for step in range(4):
            prefix = torch.cat([prompt, completion[:, :step]], dim=1)
            raw = scorer.model(prefix, torch.ones_like(prefix)).item()
            assert values[step].item() == pytest.approx((raw - 0.7) / 2.0, abs=1e-5)


def test_what_does_not_fit_is_refused(folders, tmp_path):
    base, reward, _ = folders
    scorer = AdapterScorer(reward)
    with pytest.raises(RewardError, match="no body of its own"):
        scorer(PROMPTS, COMPLETIONS)
    with pytest.raises(ModelError, match=r"Set model\.lora"):
        scorer.attach(load_causal_lm(ModelConfig(path=str(base))))
    with pytest.raises(ModelError, match="no adapter of a reward model"):
        AdapterScorer(base)
    # The same shapes, other weights: only the name of the base tells.
    torch.manual_seed(0)
    other = load_causal_lm(ModelConfig(config=MODEL), load_tokenizer(base))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="another backbone"):
        AdapterScorer(reward).attach(lora_policy(tmp_path / "other"))


@pytest.mark.slow
def test_recipes_train_policy_critic_and_reward_model_on_one_backbone(tmp_path):
    """SFT folder, then a reward model of adapters, then PPO with adapters for all, each from its recipe's settings."""
    task = {"name": "vowel_words", "word_length": 4, "letters": 8, "train": 60, "held_out": 8}
    quiet = {"progress_bar": False}
    sft = {"model": {"config": MODEL}, "demonstrations": {"task": task}, "training": {"max_steps": 3}}
    play("sft", {**sft, "run": {"directory": str(tmp_path / "sft"), **quiet}})
    base = {"path": str(tmp_path / "sft/model"), "lora": {"rank": 2}}
    judge = {"model": base, "task": task, "adapters": "keep", "training": {"learning_rate": 1e-2, "batch_prompts": 8}}
    play("reward_model", {**judge, "run": {"directory": str(tmp_path / "judge"), **quiet}})
    folder = str(tmp_path / "judge/reward_model")
    settings = {
        "model": base,
        "critic": {"start": folder, "warmup_iterations": 1},
        "prompts": {"task": task},
        "reward": {"function": "reward_models.shared_backbone:AdapterScorer", "arguments": {"folder": folder}},
        "collector": {"prompts_per_iteration": 8, "sampling": {"max_completion_length": 5}},
        "update": {"learning_rate": 1e-2},
        "iterations": 3,
        "evaluation": {"samples_per_prompt": 1},
        "run": {"directory": str(tmp_path / "ppo"), **quiet},
    }
    play("ppo_rlhf", settings)
    lines = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").read_text().splitlines()]
    # The critic learned alone at first; the generator's log-probs agree with the reference's up to rounding.
    assert [abs(line["kl_to_ref"]) < 1e-6 for line in lines] == [True, True, False]
    # What the policy was paid while its adapters moved is what the reward model says with a body of its own.
    samples = [json.loads(line) for line in (tmp_path / "ppo/samples.jsonl").read_text().splitlines()]
    alone = RewardModelScorer.from_pretrained(folder)
    assert len(samples) > 6
    for sample in samples:
        assert sample["score"] == pytest.approx(alone([sample["prompt"]], [sample["completion"]])[0], abs=1e-5)
    # Two sets of adapters are saved with the policy or not at all: the folder opens as the policy alone.
    opened = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "ppo/model"))
    assert set(opened.peft_config) == {"default"}


def play(name, values):
    recipe = import_recipe(find_recipe(name))
    return recipe.main(validate(recipe.CONFIG, values))
