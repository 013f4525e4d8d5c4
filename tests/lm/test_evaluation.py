"""Held-out evaluation: means with their errors, pass@k, perplexity."""

import math

import pytest
import torch

from rlhf.data.records import Demonstration, Prompt
from rlhf.errors import DataError
from rlhf.lm.actors import make_generator
from rlhf.lm.evaluation import (
    EvaluationConfig,
    evaluate_policy,
    mean_and_standard_error,
    pass_at_k,
    perplexity,
    summarize_rows,
)
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm
from rlhf.lm.sampling import SamplingConfig

TOKENIZER = character_tokenizer("abc>")
MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
MODEL |= {"num_attention_heads": 2, "max_position_embeddings": 32}
PROMPTS = [Prompt("a>"), Prompt("bb>"), Prompt("c>")]


def make_model():
    torch.manual_seed(0)
    return load_causal_lm(ModelConfig(config=MODEL), TOKENIZER)


def evaluate(model, *, config=None, prompts=PROMPTS, rewards=None):
    return evaluate_policy(
        make_generator(model, TOKENIZER),
        TOKENIZER,
        prompts=prompts,
        rewards=rewards or {"score": lambda completions, **columns: [float(len(text)) for text in completions]},
        sampling=SamplingConfig(max_completion_length=5),
        config=config or EvaluationConfig(),
    )


def test_errors_are_over_prompts_because_answers_to_one_prompt_are_not_independent():
    # Means per prompt are 1 and 0: mean .5, sample std sqrt(.5), error sqrt(.5 / 2) = .5. Best answers: 1 and 0.
    rows = [{"gold": [1.0, 1.0], "/length": [2.0, 4.0]}, {"gold": [0.0, 0.0], "/length": [1.0, 1.0]}]
    metrics = summarize_rows(rows, "sampled")
    assert metrics["sampled_gold_mean"] == 0.5
    assert metrics["sampled_gold_standard_error"] == pytest.approx(0.5)
    assert metrics["sampled_gold_ci95"] == pytest.approx(0.98, abs=1e-3)
    assert metrics["sampled_gold_best"] == 0.5
    assert metrics["sampled_length_mean"] == 2.0


def test_the_error_of_one_prompt_is_unknown():
    assert math.isnan(mean_and_standard_error([1.0])[1])


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"), [(8, 1, 4, 0.5), (4, 0, 2, 0.0), (4, 3, 2, 1.0), (5, 2, 1, 0.4)]
)
def test_pass_at_k(answers, right, k, expected):
    """n=8, c=1, k=4 is 1 - C(7,4)/C(8,4) = 1 - 35/70; with c > n - k some right answer is always among the k."""
    assert pass_at_k(answers, right, k) == pytest.approx(expected)


def test_pass_at_k_needs_k_answers():
    with pytest.raises(DataError, match="at least k"):
        pass_at_k(3, 1, 4)


def test_greedy_answers_are_those_of_transformers():
    model = make_model()
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([TOKENIZER(prompt.prompt)["input_ids"]])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
        expected.append(float(len(TOKENIZER.decode(output[0, ids.shape[1] :], skip_special_tokens=True))))
    metrics = evaluate(model, config=EvaluationConfig(samples_per_prompt=0))
    assert metrics["greedy_score_mean"] == pytest.approx(sum(expected) / 3)
    assert not any(name.startswith("sampled") for name in metrics)


def test_evaluation_repeats_exactly_and_in_any_batches():
    model = make_model()
    once = evaluate(model, config=EvaluationConfig(samples_per_prompt=2))
    assert evaluate(model, config=EvaluationConfig(samples_per_prompt=2)) == once
    in_batches = evaluate(model, config=EvaluationConfig(samples_per_prompt=2, prompts_per_batch=1))
    assert in_batches["greedy_score_mean"] == once["greedy_score_mean"]


def test_several_rewards_have_names_of_their_own():
    rewards = {
        "proxy": lambda completions, **columns: [1.0] * len(completions),
        "gold": lambda completions, **columns: [0.0] * len(completions),
    }
    metrics = evaluate(make_model(), rewards=rewards)
    assert metrics["greedy_proxy_mean"] == 1.0
    assert metrics["sampled_gold_mean"] == 0.0


def test_no_prompts_are_refused():
    with pytest.raises(DataError, match="no held-out prompt"):
        evaluate(make_model(), prompts=[])


def test_perplexity_equals_the_models_own_loss():
    """transformers' loss over labels is the mean negative log-prob of the tokens after the first."""
    model = make_model()
    texts = ["abcab", "cab"]
    losses, counts = [], []
    for text in texts:
        ids = torch.tensor([TOKENIZER(text)["input_ids"]])
        losses.append(model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1))
        counts.append(ids.shape[1] - 1)
    result = perplexity(model, TOKENIZER, demonstrations=[Demonstration("", text) for text in texts])
    assert result["loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["tokens"] == 6.0


def test_perplexity_of_a_completion_counts_no_prompt_token():
    model = make_model()
    ids = torch.tensor([TOKENIZER("ab>ca")["input_ids"]])
    log_probs = model(ids).logits[0].log_softmax(-1)
    expected = -(log_probs[2, ids[0, 3]] + log_probs[3, ids[0, 4]]).item() / 2
    result = perplexity(model, TOKENIZER, demonstrations=[Demonstration("ab>", "ca")])
    assert result["loss"] == pytest.approx(expected, rel=1e-5)


def test_long_texts_are_cut_only_where_asked():
    model = make_model()
    texts = [Demonstration("", "abcabc")]
    assert perplexity(model, TOKENIZER, demonstrations=texts)["tokens"] == 5.0
    assert perplexity(model, TOKENIZER, demonstrations=texts, max_length=3)["tokens"] == 2.0
