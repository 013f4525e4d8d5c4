"""A reward model as a reward function: the score of training, whatever surrounds a text."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

from reward_models.evaluation import score_rankings
from reward_models.loading import make_reward_model, prepare_tokenizer
from reward_models.scorer import RewardModelScorer
from reward_models.settings import RewardModelConfig
from reward_models.trainer import make_trainer
from rlhf.data.records import Ranking
from rlhf.data.tokenization import decode_completion, encode_completion
from rlhf.errors import DataError, ModelError, RewardError
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_tokenizer
from rlhf.rewards import score_completions

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}a>{% endif %}"
)
PROMPTS = ["ab>", "x>", "abcabc>", "z>"]
COMPLETIONS = ["cd", "q", "", "cdefghijk"]
RANKINGS = [Ranking("ab>", ("cd", "efgh", "q"), (0, 1, 2)), Ranking("x>", ("qqqqqq", "r"), (1, 0))]


def chat(text, role):
    return [{"role": role, "content": text}]


@pytest.fixture
def scorer(reward_model, tokenizer):
    return RewardModelScorer(reward_model, tokenizer, max_length=32)


def test_score_is_transformers_own_logit_of_prompt_completion_end(scorer, tokenizer):
    expected = []
    with torch.no_grad():
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            ids = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
            expected.append(scorer.model.classifier(torch.tensor([ids])).logits.item())
    assert scorer(prompts=PROMPTS, completions=COMPLETIONS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 12, 16_384])
def test_batch_composition_and_order_change_no_score(scorer, batch_tokens):
    alone = [scorer([prompt], [completion])[0] for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    scorer.batch_tokens = batch_tokens
    together = scorer(PROMPTS * 2, COMPLETIONS * 2)
    assert together == pytest.approx(alone * 2, abs=1e-5)
    assert scorer(PROMPTS[::-1], COMPLETIONS[::-1]) == pytest.approx(alone[::-1], abs=1e-5)


@pytest.mark.parametrize("as_chat", [False, True])
def test_score_in_training_is_the_score_in_rl(tmp_path, reward_model, tokenizer, as_chat):
    """PEERS trap 2: trained with the end token, scored without."""
    rankings = RANKINGS
    if as_chat:
        prepare_tokenizer(tokenizer, chat_template=TEMPLATE)
        rankings = [
            Ranking(chat(one.prompt, "user"), tuple(chat(c, "assistant") for c in one.completions), one.ranks)
            for one in RANKINGS
        ]
    settings = RewardModelConfig(learning_rate=1e-3, batch_prompts=2)
    trainer = make_trainer(reward_model, tokenizer, rankings, held_out=rankings, settings=settings)
    trainer.train()
    seen = score_rankings(reward_model, trainer.rankings, pad_id=trainer.pad_id)
    RewardModelScorer.from_trainer(trainer, normalization=None).save_pretrained(tmp_path)
    scorer = RewardModelScorer.from_pretrained(tmp_path)
    for row, ranking in enumerate(rankings):
        number = len(ranking.completions)
        scores = scorer(prompts=[ranking.prompt] * number, completions=list(ranking.completions))
        assert scores == pytest.approx(seen[row, :number].tolist(), abs=1e-6)


def test_pipeline_gives_the_raw_score_of_a_chat(tmp_path, reward_model, tokenizer):
    prepare_tokenizer(tokenizer, chat_template=TEMPLATE)
    scorer = RewardModelScorer(reward_model, tokenizer)
    scorer.save_pretrained(tmp_path)
    expected = scorer([chat("ab", "user")], [chat("cd", "assistant")])[0]
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    shown = classify("u>ab a>cd" + tokenizer.eos_token, function_to_apply="none")[0]["score"]
    assert shown == pytest.approx(expected, abs=1e-6)


def test_it_is_a_reward_function(scorer):
    scores = score_completions(
        scorer, prompts=PROMPTS, completions=COMPLETIONS, columns={"answer": ["1", "2", "3", "4"]}, name="reward_model"
    )
    assert scores.tolist() == pytest.approx(scorer(PROMPTS, COMPLETIONS), abs=1e-6)


def test_normalisation_has_mean_0_and_std_1_and_is_saved(tmp_path, scorer):
    raw = scorer(PROMPTS, COMPLETIONS)
    mean, std = scorer.normalize_on(PROMPTS, COMPLETIONS)
    assert mean == pytest.approx(sum(raw) / 4, abs=1e-6)
    assert std == pytest.approx((sum((x - mean) ** 2 for x in raw) / 4) ** 0.5, abs=1e-6)
    scores = torch.tensor(scorer(PROMPTS, COMPLETIONS))
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std(correction=0).item() == pytest.approx(1, abs=1e-5)
    scorer.save_pretrained(tmp_path)
    opened = RewardModelScorer.from_pretrained(tmp_path)
    assert opened(PROMPTS, COMPLETIONS) == pytest.approx(scores.tolist(), abs=1e-5)
    assert opened.max_length == 32
    # A model that is trained further keeps the head and learns on the raw score.
    again = make_reward_model(ModelConfig(path=str(tmp_path)), scorer.tokenizer)
    assert RewardModelScorer(again, scorer.tokenizer)(PROMPTS, COMPLETIONS) == pytest.approx(raw, abs=1e-5)


def test_shift_alone(scorer):
    scorer.normalize_on(PROMPTS, COMPLETIONS, unit_variance=False)
    assert scorer.std == 1.0
    assert sum(scorer(PROMPTS, COMPLETIONS)) == pytest.approx(0, abs=1e-5)


def test_equal_references_have_no_scale(scorer):
    with pytest.raises(RewardError, match="score the same"):
        scorer.normalize_on(["ab>", "ab>"], ["c", "c"])


def test_policy_may_have_another_tokenizer(tmp_path, reward_model, tokenizer):
    """A reward model reads text: its folder alone decides the tokens (trl issue 1979)."""
    own = prepare_tokenizer(character_tokenizer("".join(reversed("abcdefghijklmnopqrstuvwxyz> "))))
    scorer = RewardModelScorer(make_reward_model(ModelConfig(config=reward_model.config.to_dict()), own), own)
    scorer.save_pretrained(tmp_path)
    opened = RewardModelScorer.from_pretrained(tmp_path)
    assert opened(PROMPTS, COMPLETIONS) == pytest.approx(scorer(PROMPTS, COMPLETIONS), abs=1e-6)


def test_bad_input_is_refused(tmp_path, scorer, reward_model, tokenizer):
    with pytest.raises(RewardError, match="as many prompts as completions"):
        scorer(PROMPTS, COMPLETIONS[:2])
    with pytest.raises(RewardError, match="completion 1 with its prompt is longer than the reward model's 32 tokens"):
        scorer(["a>", "a>"], ["b", "b" * 40])
    scorer.truncate = True
    assert len(scorer(["a>"], ["b" * 40])) == 1
    assert scorer([], []) == []
    with pytest.raises(ModelError, match="no such model folder"):
        RewardModelScorer.from_pretrained(tmp_path / "nothing")
    AutoModelForCausalLM.from_config(reward_model.config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no trained reward model"):
        RewardModelScorer.from_pretrained(tmp_path)


def test_an_end_token_spelt_inside_a_completion_is_text(reward_model):
    """A policy may spell the end token: the score must not stop there, nor may RL stop."""
    tokenizer = prepare_tokenizer(character_tokenizer("abcdefghijklmnopqrstuvwxyz> <"))
    settings = {**reward_model.config.to_dict(), "vocab_size": len(tokenizer)}
    scorer = RewardModelScorer(make_reward_model(ModelConfig(config=settings), tokenizer), tokenizer)
    spelt, ids = "ab<eos>cd", [tokenizer.convert_tokens_to_ids(letter) for letter in "x>ab<eos>cd"]
    with torch.no_grad():
        expected = scorer.model.classifier(torch.tensor([[*ids, tokenizer.eos_token_id]])).logits.item()
    assert scorer(["x>"], [spelt])[0] == pytest.approx(expected, abs=1e-5)
    # Training refuses it, or sees the same tokens.
    rankings = [Ranking("x>", (spelt, "q"), (0, 1))]
    with pytest.raises(DataError, match="end token in its midst"):
        make_trainer(scorer.model, tokenizer, rankings, held_out=rankings, settings=RewardModelConfig())
    settings = RewardModelConfig(inner_end="text")
    trainer = make_trainer(scorer.model, tokenizer, rankings, held_out=rankings, settings=settings)
    assert trainer.rankings[0].sequences[0] == [*ids, tokenizer.eos_token_id]


REAL = Path(__file__).resolve().parents[2] / ".." / "shared/data/tokenizers"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="real tokenizers are not here")
@pytest.mark.parametrize(("policy", "own"), [("qwen2.5", "minueza-32m-chat"), ("smollm2", "qwen2.5")])
def test_a_real_tokenizer_and_template_of_its_own(tmp_path, policy, own, reward_model):
    """trl issue 1979: policy and reward model share neither vocabulary nor template; text stands between them."""
    policy_tokenizer = load_tokenizer(str(REAL / policy))
    tokenizer = prepare_tokenizer(load_tokenizer(str(REAL / own)))
    settings = {**reward_model.config.to_dict(), "max_position_embeddings": 256}
    del settings["vocab_size"]
    model = make_reward_model(ModelConfig(config={**settings, "hidden_size": 16}), tokenizer)
    prompts = [chat("What is 2 + 2?", "user"), chat("Say hello in French,\nplease.", "user")]
    texts = ["It is 4.", " Bonjour! \u00e9t\u00e9"]
    RewardModelScorer(model, tokenizer).save_pretrained(tmp_path)
    scorer = RewardModelScorer.from_pretrained(tmp_path)
    # What RL does: the policy's tokens are decoded with the policy's tokenizer, and the text is scored.
    assert prepare_tokenizer(load_tokenizer(str(REAL / own))).chat_template != policy_tokenizer.chat_template
    completions = []
    for prompt, text in zip(prompts, texts, strict=True):
        ids = encode_completion(policy_tokenizer, prompt, text, add_end=False)
        completions.append(chat(decode_completion(policy_tokenizer, ids), "assistant"))
    # What the reward model must see: its own template's rendering up to the end of the assistant's turn.
    expected = []
    for prompt, text in zip(prompts, texts, strict=True):
        whole = tokenizer.apply_chat_template([*prompt, *chat(text, "assistant")], tokenize=False)
        end = whole.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
        ids = tokenizer(whole[:end], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            expected.append(scorer.model.classifier(torch.tensor([ids])).logits.item())
    assert scorer(prompts, completions) == pytest.approx(expected, abs=1e-5)
