"""pass@k, maj@k and win rates against the enumeration of all subsets and pairs."""

from collections import Counter
from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import DataError
from rlhf.lm.answer_statistics import majority_at_k, pass_at_k, win_rate


@pytest.mark.parametrize(
    ("answers", "right", "k", "expected"), [(8, 1, 4, 0.5), (4, 0, 2, 0.0), (4, 3, 2, 1.0), (5, 2, 1, 0.4)]
)
def test_pass_at_k(answers, right, k, expected):
    """n=8, c=1, k=4 is 1 - C(7,4)/C(8,4) = 1 - 35/70; with c > n - k some right answer is always among the k."""
    assert pass_at_k(answers, right, k) == pytest.approx(expected)


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(right, data):
    k = data.draw(st.integers(1, len(right)))
    subsets = list(combinations(right, k))
    assert pass_at_k(len(right), sum(right), k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize("k", [0, 4])
def test_k_must_lie_within_the_answers(k):
    with pytest.raises(DataError, match="pass@k needs at least k answers"):
        pass_at_k(3, 1, k)
    with pytest.raises(DataError, match="maj@k needs at least k answers"):
        majority_at_k(["a"] * 3, [1.0] * 3, k)


def vote(answers, scores, chosen):
    """One vote, told plainly: the answers with most voices share the outcome; each is worth its givers' mean score."""
    counts = Counter(answers[row] for row in chosen if answers[row] is not None)
    leaders = [answer for answer, count in counts.items() if count == max(counts.values())]
    worth = []
    for leader in leaders:
        given = [score for answer, score in zip(answers, scores, strict=True) if answer == leader]
        worth.append(sum(given) / len(given))
    return sum(worth) / len(worth) if worth else 0.0


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=7
    ),
    st.data(),
)
def test_majority_at_k_is_the_mean_over_all_votes(pairs, data):
    answers, scores = [answer for answer, _ in pairs], [score for _, score in pairs]
    k = data.draw(st.integers(1, len(pairs)))
    outcomes = [vote(answers, scores, chosen) for chosen in combinations(range(len(pairs)), k)]
    assert majority_at_k(answers, scores, k) == pytest.approx(sum(outcomes) / len(outcomes))


def test_a_vote_by_hand():
    # Of the three pairs of "4", "4", "5": one elects "4", two tie and share: (1 + .5 + .5) / 3.
    assert majority_at_k(["4", "4", "5"], [1.0, 1.0, 0.0], 2) == pytest.approx(2 / 3)
    assert majority_at_k([None, None], [1.0, 1.0], 2) == 0.0
    assert majority_at_k(["4", None, None, None], [1.0, 1.0, 1.0, 1.0], 4) == 1.0


def test_thirty_two_different_answers_are_counted_in_no_time():
    answers = [str(number) for number in range(32)]
    scores = [1.0] * 8 + [0.0] * 24
    assert majority_at_k(answers, scores, 16) == pytest.approx(8 / 32)
    assert comb(32, 16) == 601_080_390  # which nobody wants to enumerate


def test_win_rate():
    assert win_rate([1.0], [0.0]) == 1.0
    assert win_rate([1.0, 0.0], [1.0, 0.0]) == 0.5
    with pytest.raises(DataError, match="an answer of each"):
        win_rate([], [1.0])
