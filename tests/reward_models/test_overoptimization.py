"""The lab's measurement on held-out prompts, against transformers; what a variant optimizes."""

from types import SimpleNamespace

import pytest
import torch

from reward_models.ensemble import EnsembleScorer
from reward_models.loading import make_reward_model, prepare_tokenizer
from reward_models.overoptimization.policy import HeldOut, PolicyCell
from reward_models.overoptimization.settings import Variant
from reward_models.overoptimization.start import member_folder, open_reward
from reward_models.scorer import RewardModelScorer
from rlhf.config import validate
from rlhf.core.presets import ALGORITHMS
from rlhf.data.records import Prompt
from rlhf.lm.actors import make_actors
from rlhf.lm.loading import ModelConfig, character_tokenizer
from rlhf.lm.prompt_stream import mix_seed
from rlhf.lm.samples import sample_completions
from rlhf.training.distributed import make_accelerator

MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
MODEL |= {"num_attention_heads": 2, "max_position_embeddings": 32}
PROMPTS = [Prompt("ab>"), Prompt("c>"), Prompt("bca>")]


def cell_of(folder, **variant) -> PolicyCell:
    start = {
        "model": {"config": MODEL},
        "source": {"task": {"name": "sort_letters", "word_length": 3, "letters": 3, "train": 4, "held_out": 2}},
        "gold": {"function": "rlhf.lm.tasks:sorted_letters"},
        "sampling": {"max_completion_length": 4, "temperature": 1.3},
        "members": 2,
        "variance_coefficient": 0.7,
    }
    values = {"start": start, "optimization": {"samples_per_prompt": 5}, "variant": variant, "name": "x", "seed": 3}
    return validate(PolicyCell, {**values, "folder": str(folder)})


def total_log_probs(model, samples, temperature):
    """[R] log-probability of each completion by transformers' own forward, without any of our policies."""
    ids = torch.cat([samples.prompt_ids, samples.completion_ids], dim=1)
    mask = torch.cat([samples.prompt_mask, samples.completion_mask], dim=1).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits / temperature
    width = samples.completion_ids.shape[1]
    each = logits[:, -width - 1 : -1].log_softmax(-1).gather(-1, samples.completion_ids[..., None]).squeeze(-1)
    return (each * samples.completion_mask).sum(dim=1)


@torch.no_grad()
def test_the_kl_is_that_of_the_answers_to_the_start_at_the_temperature_of_sampling(tmp_path):
    torch.manual_seed(0)
    tokenizer = character_tokenizer("abc>")
    actors = make_actors(
        ModelConfig(config=MODEL),
        ALGORITHMS["ppo_rlhf"],
        temperature=1.3,
        tokenizer=tokenizer,
        keep_reference=True,
        accelerator=make_accelerator(),
    )
    start = {name: weight.clone() for name, weight in actors.policy.model.state_dict().items()}
    for weight in actors.policy.model.parameters():
        weight.add_(torch.randn_like(weight) * 0.1)
    moved = {name: weight.clone() for name, weight in actors.policy.model.state_dict().items()}
    collector = SimpleNamespace(device="cpu", config=SimpleNamespace(measure_tokens=64))
    rewards = {
        "proxy": lambda completions, **columns: [float(len(text)) for text in completions],
        "gold": lambda completions, **columns: [float("a" in text) for text in completions],
    }
    measured = HeldOut(
        SimpleNamespace(completed=4), actors, collector, PROMPTS, rewards=rewards, cell=cell_of(tmp_path)
    )
    metrics = measured()
    samples = sample_completions(
        actors.generator, tokenizer, prompts=PROMPTS, sampling=cell_of(tmp_path).start.sampling, group_size=5,
        random=torch.Generator().manual_seed(mix_seed("evaluation", 3)),
    )  # fmt: skip
    policy = total_log_probs(actors.policy.model, samples, 1.3)
    actors.policy.model.load_state_dict(start)
    reference = total_log_probs(actors.policy.model, samples, 1.3)
    actors.policy.model.load_state_dict(moved)
    assert metrics["kl"] == pytest.approx((policy - reference).mean().item(), abs=1e-5)
    assert abs(metrics["kl"]) > 1e-3
    gold = torch.tensor([float("a" in text) for text in samples.completions]).view(3, 5).mean(dim=1)
    assert metrics["gold_mean"] == pytest.approx(gold.mean().item())
    assert metrics["gold_error"] == pytest.approx(gold.std().item() / 3**0.5)  # over prompts, not over answers
    assert metrics["proxy_mean"] == pytest.approx(sum(map(len, samples.completions)) / 15)
    assert measured.curve["iteration"] == [4]
    told = [(answer["prompt"], answer["completion"]) for answer in measured.curve["answers"][0]]
    assert told == [(prompt.prompt, samples.completions[5 * i]) for i, prompt in enumerate(PROMPTS)]


def test_a_variant_optimizes_the_first_reward_model_or_all_of_them(tmp_path):
    tokenizer = prepare_tokenizer(character_tokenizer("abc>"))
    for member in range(2):
        model = make_reward_model(ModelConfig(config=MODEL), tokenizer, seed=member)
        RewardModelScorer(model, tokenizer).save_pretrained(member_folder(tmp_path, member))
    config = cell_of(tmp_path).start
    texts = (["ab>", "c>"], ["ab", "ca"])
    each = [RewardModelScorer.from_pretrained(member_folder(tmp_path, member))(*texts) for member in range(2)]
    first, second = torch.tensor(each)
    assert open_reward(Variant(), config, tmp_path)(*texts) == pytest.approx(each[0])
    worst = open_reward(Variant(combine="worst_case"), config, tmp_path)
    assert worst(*texts) == pytest.approx(torch.minimum(first, second).tolist())
    careful = open_reward(Variant(combine="mean_minus_variance"), config, tmp_path)
    assert isinstance(careful, EnsembleScorer)
    mean, half = (first + second) / 2, (first - second) / 2  # variance of two numbers: the square of half their gap
    assert careful(*texts) == pytest.approx((mean - 0.7 * half**2).tolist())
