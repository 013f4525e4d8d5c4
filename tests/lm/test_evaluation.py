"""Held-out evaluation: means with their errors, pass@k, perplexity."""

import math

import pytest
import torch

from rlhf.data.records import Demonstration, Prompt
from rlhf.errors import DataError
from rlhf.lm.actors import make_generator
from rlhf.lm.evaluation import (
    EvaluationConfig,
    answer_prompts,
    compare_rows,
    evaluate_policy,
    mean_and_standard_error,
    summarize_rows,
    summarize_votes,
)
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm
from rlhf.lm.perplexity import perplexity
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


# --- pass@k, votes, win rates -----------------------------------------------------------------------------------------

ROWS = [
    {"score": [1.0, 0.0, 0.0, 0.0], "/answer": ["4", "5", "5", None], "/length": [1.0] * 4, "/ended": [1.0] * 4},
    {"score": [1.0, 1.0, 0.0, 0.0], "/answer": ["4", "4", "5", "6"], "/length": [1.0] * 4, "/ended": [1.0] * 4},
]


def test_pass_and_votes_are_means_over_prompts_with_their_intervals():
    config = EvaluationConfig(
        samples_per_prompt=4, pass_at=[2], majority_at=[4], answers="rlhf.rewards.extraction:last_number"
    )
    metrics = summarize_votes(ROWS, "sampled", config)
    # pass@2: 1 - 3/6 = 1/2 and 1 - 1/6 = 5/6. Votes of four: "5" wins and is wrong; "4" wins and is right.
    assert metrics["sampled_score_pass_at_2"] == pytest.approx((1 / 2 + 5 / 6) / 2)
    assert metrics["sampled_score_majority_at_4"] == 0.5
    # A bootstrap over two prompts draws each mean of two with replacement: its ends are the two values.
    assert metrics["sampled_score_pass_at_2_low"] == pytest.approx(1 / 2)
    assert metrics["sampled_score_pass_at_2_high"] == pytest.approx(5 / 6)
    assert (metrics["sampled_score_majority_at_4_low"], metrics["sampled_score_majority_at_4_high"]) == (0.0, 1.0)


def test_pass_at_k_of_a_graded_reward_is_refused():
    with pytest.raises(DataError, match=r"reward 'score'.*neither 0 nor 1; got 0\.5"):
        summarize_votes([{"score": [0.5, 1.0]}], "sampled", EvaluationConfig(samples_per_prompt=2, pass_at=[1]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples_per_prompt": 2, "pass_at": [4]}, "raise it"),
        ({"samples_per_prompt": 2, "majority_at": [2]}, "needs `answers`"),
    ],
)
def test_votes_that_cannot_be_held_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**settings)


def test_votes_and_pass_reach_the_metrics_of_an_evaluation():
    config = EvaluationConfig(
        greedy=False, samples_per_prompt=4, pass_at=[1, 4], majority_at=[1], answers=f"{__file__}:first_letter"
    )
    rewards = {"has_a": lambda completions, **columns: [float("a" in text) for text in completions]}
    metrics = evaluate(make_model(), config=config, rewards=rewards)
    assert metrics["sampled_has_a_pass_at_1"] == pytest.approx(metrics["sampled_has_a_mean"])
    assert metrics["sampled_has_a_pass_at_4"] == pytest.approx(metrics["sampled_has_a_best"])
    assert 0.0 <= metrics["sampled_has_a_majority_at_1"] <= 1.0


def first_letter(text):
    return text[:1] or None


def test_win_rates_pair_all_answers_of_a_prompt_and_ties_count_half():
    # Prompt 1: 2 > 1, 2 = 2: 1.5 of 2. Prompt 2: 0 < 3 twice: 0.
    ours = {"sampled": [{"score": [2.0]}, {"score": [0.0]}]}
    theirs = {"sampled": [{"score": [1.0, 2.0]}, {"score": [3.0, 3.0]}]}
    metrics = compare_rows(ours, theirs)
    assert metrics["sampled_score_win_rate"] == pytest.approx(0.375)
    assert (metrics["sampled_score_win_rate_low"], metrics["sampled_score_win_rate_high"]) == (0.0, 0.75)
    assert compare_rows(theirs, ours)["sampled_score_win_rate"] == pytest.approx(0.625)


def test_a_model_against_itself_wins_half():
    model = make_model()
    arguments = {
        "prompts": PROMPTS,
        "rewards": {"length": lambda completions, **columns: [float(len(text)) for text in completions]},
        "sampling": SamplingConfig(max_completion_length=5),
        "config": EvaluationConfig(samples_per_prompt=2),
    }
    rows, _ = answer_prompts(make_generator(model, TOKENIZER), TOKENIZER, **arguments)
    again, _ = answer_prompts(make_generator(model, TOKENIZER), TOKENIZER, **arguments)
    metrics = compare_rows(rows, again)
    assert metrics["greedy_length_win_rate"] == metrics["sampled_length_win_rate"] == 0.5


def test_what_a_reward_reports_is_not_lost():
    def watched(completions, log_metric, **columns):
        log_metric("timeouts", 0.25)
        return [0.0] * len(completions)

    metrics = evaluate(make_model(), rewards={"score": watched})
    assert metrics["greedy_reward/timeouts"] == 0.25
    assert metrics["sampled_reward/timeouts"] == 0.25
