"""Reward functions written for TRL run unchanged: its own are asked through `score_completions`."""

import importlib.util

import pytest

from rlhf.rewards.combination import CombinedReward
from rlhf.rewards.protocol import RewardLog, score_completions

rewards = pytest.importorskip("trl.rewards")
needs_math_verify = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="needs math-verify (the extra `reasoning`)"
)


def chat(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def ask(reward, completions, **settings):
    prompts = [[{"role": "user", "content": "?"}]] * len(completions)
    return score_completions(reward, prompts=prompts, completions=completions, **settings).tolist()


def test_think_format_reward():
    # The example of TRL's docstring.
    completions = chat(
        "<think>\nThis is my reasoning.\n</think>\nThis is my answer.",
        "<think>\nThis is my reasoning.\nThis is my answer.",
    )
    assert ask(rewards.think_format_reward, completions, columns={"unused": [1, 2]}) == [1, 0]


def test_rewards_of_token_ids():
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert ask(overlong, chat("a"), completion_ids=[[1] * 90]) == [-0.5]
    repetition = rewards.get_repetition_penalty_reward(ngram_size=2, max_penalty=-1.0)
    assert ask(repetition, chat("a", "b"), completion_ids=[[1, 2, 3, 4], [5, 5, 5, 5, 5]]) == [0.0, -0.75]


def test_combined_with_ours():
    overlong = rewards.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    combined = CombinedReward([(rewards.think_format_reward, 1.0), (overlong, 2.0)])
    assert ask(combined, chat("<think>a</think>b"), completion_ids=[[1] * 90]) == [0.0]
    assert list(combined.last_scores) == ["think_format_reward", "soft_overlong_punishment_reward"]


@needs_math_verify
def test_accuracy_rewards():
    gold = [r"\frac{1}{3}", r"\frac{1}{3}"]
    completions, log = chat(r"My answer is \boxed{\frac{1}{3}}", r"My answer is \boxed{\frac{1}{2}}"), RewardLog()
    assert ask(rewards.accuracy_reward, completions, columns={"solution": gold}, log=log) == [1, 0]
    assert log.columns["solution"] == gold
    cosine = rewards.get_cosine_scaled_reward(max_len=100)
    ids = [[1] * 50, [1] * 50]
    assert ask(cosine, completions, columns={"solution": gold}, completion_ids=ids) == [0.75, -0.75]
    reasoned = chat(r"<think> a </think> \boxed{\frac{1}{3}}", r"<think> \boxed{\frac{1}{3}}")
    assert ask(rewards.reasoning_accuracy_reward, reasoned, columns={"solution": gold}) == [1, 0]


@needs_math_verify
def test_a_gold_answer_that_trl_cannot_parse_is_missing():
    scores = score_completions(
        rewards.accuracy_reward,
        prompts=["?"],
        completions=chat(r"\boxed{1}"),
        columns={"solution": ["no mathematics"]},
        allow_missing=True,
    )
    assert scores.isnan().all()
