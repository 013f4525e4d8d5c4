"""Records check themselves; ranks follow from scores as arithmetic says."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.records import Demonstration, Prompt, Ranking, dense_ranks, ranks_from_scores, read_text
from rlhf.errors import DataError

CHAT = [{"role": "user", "content": "Hi"}]
ANSWER = [{"role": "assistant", "content": "Hello"}]


def test_records_hold_strings_or_chat():
    assert Prompt("Hi").columns == {}
    assert Demonstration(CHAT, ANSWER).completion == ANSWER
    assert Ranking("Hi", ("a", "b"), (0, 1)).scores is None
    assert Ranking(CHAT, (ANSWER, ANSWER), (0, 0)).tied


def test_where_a_record_came_from_does_not_make_it_another():
    assert Prompt("Hi", source="a, line 1") == Prompt("Hi", source="b, line 2")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Prompt(""), "prompt: is empty"),
        (lambda: Prompt([]), "prompt: has no message"),
        (lambda: Prompt(3), "prompt: is no text"),
        (lambda: Prompt([{"role": "user"}]), r"prompt\[0\]: is no chat message"),
        (lambda: Prompt([{"role": "", "content": "x"}]), r"prompt\[0\].role"),
        (lambda: Demonstration("Hi", " "), "completion: is empty"),
        (lambda: Demonstration("Hi", ANSWER), "completion: is chat messages, but the prompt is a string"),
        (lambda: Demonstration(CHAT, "Hello"), "completion: is a string, but the prompt is chat messages"),
        (lambda: Ranking("Hi", ("a",), (0,)), "at least two"),
        (lambda: Ranking("Hi", ("a", "b"), (0,)), "ranks: wrong length"),
        (lambda: Ranking("Hi", ("a", "b"), (1, 2)), "ranks: must be whole numbers from 0"),
        (lambda: Ranking("Hi", ("a", "b"), (0, 0.5)), "ranks: must be whole numbers from 0"),
        (lambda: Ranking("Hi", ("a", "b"), (0, 1), (1.0, float("nan"))), r"scores\[1\]: is not finite"),
        (lambda: Ranking("Hi", ("a", "b"), (0, 1), (1.0, "2")), r"scores\[1\]: is no number"),
        (lambda: Ranking("Hi", ("a", ANSWER), (0, 1)), r"completions\[1\]: is chat messages"),
    ],
)
def test_unsound_records_are_refused(make, reason):
    with pytest.raises(DataError, match=reason):
        make()


def test_an_empty_answer_may_be_ranked_and_an_empty_prompt_demonstrated():
    assert Ranking("Hi", ("Hello", ""), (0, 1)).ranks == (0, 1)
    assert Demonstration("", "Once upon a time").prompt == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Hi", "Hi"),
        (
            [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}],
            [*CHAT, {"role": "assistant", "content": "Yo"}],
        ),
        ({"from": "gpt", "value": "Hello"}, ANSWER),
        ([{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}], CHAT),
        (
            [{"role": "assistant", "content": None, "tool_calls": [1]}],
            [{"role": "assistant", "content": "", "tool_calls": [1]}],
        ),
    ],
)
def test_texts_are_read_from_the_shapes_that_files_have(value, text):
    assert read_text(value, "prompt") == text


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "prompt: is no text"),
        (["Hi"], r"prompt\[0\]: is no chat message"),
        ([{"role": "user"}], r"prompt\[0\]: a chat message lacks 'content'"),
        ([{"from": "alien", "value": "x"}], r"prompt\[0\].from: unknown speaker"),
        ([{"role": "user", "content": 3}], r"prompt\[0\].content: is no string"),
        ([{"role": "user", "content": [{"type": "image"}]}], "only text parts"),
    ],
)
def test_other_shapes_are_refused(value, reason):
    with pytest.raises(DataError, match=reason):
        read_text(value, "prompt")


def test_ranks_from_scores():
    assert ranks_from_scores([3.0, 1.0, 2.0]) == (0, 2, 1)
    assert ranks_from_scores([1.0, 1.0, 0.0]) == (0, 0, 1)
    # Sorted 1.0, 0.75, 0.0 with gaps 0.25 and 0.75: only the second reaches 0.5.
    assert ranks_from_scores([0.0, 1.0, 0.75], min_gap=0.5) == (1, 0, 0)
    # A gap that is exactly the minimum counts.
    assert ranks_from_scores([1.0, 0.5], min_gap=0.5) == (0, 1)
    assert dense_ranks([2, 5, 2, 9]) == (0, 1, 0, 2)


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=8), st.integers(0, 6))
def test_every_ordered_pair_differs_by_the_gap(scores, gap):
    ranks = ranks_from_scores(scores, min_gap=gap)
    for i, one in enumerate(scores):
        for j, other in enumerate(scores):
            if ranks[i] < ranks[j]:
                assert one - other >= max(gap, 1)
            if one == other:
                assert ranks[i] == ranks[j]


def test_importing_records_is_light():
    code = (
        "import sys, rlhf.data.records; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
