"""Weighted sums, gates, penalties, and what is kept for the log; expected values by hand."""

import math

import pytest

from rlhf.errors import RewardError
from rlhf.rewards.combination import CombinedReward, RewardPart
from rlhf.rewards.protocol import RewardLog, score_completions


def fixed(values, name="fixed"):
    def reward(completions, **columns):
        return values

    reward.__name__ = name
    return reward


def score(combined, number=3, **settings):
    return score_completions(combined, prompts=[""] * number, completions=[""] * number, **settings).tolist()


def test_weighted_sum():
    combined = CombinedReward([(fixed([1, 0, 1], "a"), 2.0), (fixed([1, 1, 0], "b"), 0.5)])
    assert score(combined) == [2.5, 0.5, 2.0]
    assert combined.last_scores["a"].tolist() == [1, 0, 1]


def test_gates_multiply_and_penalties_stand_outside():
    combined = CombinedReward(
        [
            RewardPart(fixed([1, 1, 0], "right"), weight=2.0),
            RewardPart(fixed([1, 0, 1], "format"), role="gate"),
            RewardPart(fixed([0, -1, -0.5], "length"), weight=0.5, role="penalty"),
        ]
    )
    # 2*1*1 + 0;  2*1*0 - 0.5;  2*0*1 - 0.25: a closed gate takes the reward away but not the penalty.
    assert score(combined) == [2.0, -0.5, -0.25]


def test_none_leaves_a_part_out():
    # As in TRL, whose sum over functions skips None.
    combined = CombinedReward([(fixed([1, None, None], "a"), 1.0), (fixed([1, 1, 3], "b"), 2.0)])
    assert score(combined) == [3, 2, 6]
    metrics = combined.metrics()
    assert metrics["reward/a_mean"] == 1
    assert metrics["reward/a_missing"] == pytest.approx(2 / 3)
    assert metrics["reward/b_mean"] == pytest.approx(5 / 3)
    # Population standard deviation of 1, 1, 3 is sqrt(8/9).
    assert metrics["reward/b_std"] == pytest.approx(math.sqrt(8 / 9))


def test_a_completion_without_any_score_is_an_error():
    combined = CombinedReward([(fixed([1, None, 1]), 1.0), (fixed([None, None, 1]), 1.0)])
    with pytest.raises(RewardError, match="combined_reward: no score for completion 1"):
        score(combined)
    gated = CombinedReward([RewardPart(fixed([None] * 3)), RewardPart(fixed([1, 1, 1]), role="gate")])
    with pytest.raises(RewardError, match="no score for every completion"):
        score(gated)


def test_names_are_told_apart():
    combined = CombinedReward([(fixed([1]), 1.0), (fixed([2]), 1.0), RewardPart(fixed([3]), name="mine")])
    score(combined, 1)
    assert list(combined.last_scores) == ["fixed", "fixed_2", "mine"]


def test_a_failing_part_is_named():
    combined = CombinedReward([(fixed([1.0, 2.0, 3.0], "good"), 1.0), (fixed([1.0], "bad"), 1.0)])
    with pytest.raises(RewardError, match="bad: wrong number of scores; got 1; expected 3"):
        score(combined)


def test_columns_ids_and_logs_reach_the_parts():
    def reward(completions, completion_ids, answer, log_metric, trainer_state, **columns):
        log_metric(
            "seen", trainer_state + len(columns["completion_ids"]) if "completion_ids" in columns else trainer_state
        )
        return [float(len(ids) == length) for ids, length in zip(completion_ids, answer, strict=True)]

    combined, log = CombinedReward([(reward, 1.0)]), RewardLog()
    ids = [[1], [1, 2], []]
    scores = score(combined, columns={"answer": [1, 2, 3]}, completion_ids=ids, log=log, extras={"trainer_state": 5})
    assert scores == [1, 1, 0]
    assert log.metrics == {"seen": [5.0]}
    assert combined.metrics()["reward/seen"] == 5


def test_a_combination_may_be_part_of_another():
    inner = CombinedReward([(fixed([1, 2, 3]), 2.0)])
    assert score(CombinedReward([(inner, 0.5), (fixed([1, 1, 1]), 1.0)])) == [2, 3, 4]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "at least one reward"),
        ([RewardPart(fixed([1]), role="gate")], "gates alone give no score"),
        ([("not a function", 1.0)], "a part is no function"),
        ([(fixed([1]), math.nan)], "fixed: a weight is not finite"),
        (
            [(fixed([1]), 1.0), RewardPart(fixed([1], "format"), weight=2.0, role="gate")],
            "format: a gate has no weight",
        ),
    ],
)
def test_unsound_combinations_are_refused(parts, reason):
    with pytest.raises(RewardError, match=reason):
        CombinedReward(parts)
