"""Rewards per token and per step: what is accepted, and what is refused with its place."""

import pytest
import torch

from rlhf.errors import RewardError
from rlhf.rewards.protocol import RewardLog, score_completions
from rlhf.rewards.token_scores import is_per_token, read_token_scores

IDS = [[5, 6], [5, 6, 7]]


def ask(returned, ids=IDS):
    log = RewardLog()
    scores = score_completions(
        lambda completions: returned, prompts=["", ""], completions=["a", "b"], completion_ids=ids, name="f", log=log
    )
    return scores.tolist(), log.token_scores


def test_sums_are_the_scores_and_tokens_are_kept():
    assert ask([[1, 2.5], [0.0, 0.0, -1.0]]) == ([3.5, -1.0], [[1.0, 2.5], [0.0, 0.0, -1.0]])
    assert ask([{}, {2: 4.0, 0: 1.0}]) == ([0.0, 5.0], [[0.0, 0.0], [1.0, 0.0, 4.0]])
    assert ask([torch.tensor([1.0, 2.0]), [1, 1, 1]])[0] == [3.0, 3.0]


def test_a_number_per_completion_leaves_no_tokens():
    assert ask([1.0, 2.0]) == ([1.0, 2.0], None)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([[1.0], [1.0, 1.0, 1.0]], r"f, completion 0: wrong number of rewards per token; got 1; expected 2"),
        ([{2: 1.0}, {}], r"f, completion 0: a step's reward stands at a token that is not there; got 2"),
        ([{}, {-1: 1.0}], r"f, completion 1: a step's reward"),
        ([[1.0, float("nan")], {}], r"f, completion 0: a token's reward is no finite number"),
        ([[1.0, None], {}], r"f, completion 0: a token's reward is no finite number"),
        ([[1.0, 1.0], 2.0], r"f, completion 0 .*a score is no number"),
    ],
)
def test_what_does_not_fit_the_tokens_is_refused(returned, message):
    with pytest.raises(RewardError, match=message):
        ask(returned)


def test_without_token_ids_there_is_nothing_to_put_them_on():
    with pytest.raises(RewardError, match="need token ids"):
        ask([[1.0], [2.0]], ids=None)


def test_nothing_is_not_per_token():
    assert not is_per_token([])
    assert read_token_scores([], [], name="f") == []
