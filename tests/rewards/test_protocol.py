"""What a reward function gets, and every way in which its answer can be wrong."""

import functools

import numpy as np
import pytest
import torch

from rlhf.errors import RewardError
from rlhf.rewards.protocol import RewardFunction, RewardLog, reward_name, score_completions, text_of

CHAT = [[{"role": "assistant", "content": "b"}]]


def ask(reward, completions=("a", "bb", "ccc"), **settings):
    prompts = settings.pop("prompts", ["p"] * len(completions))
    return score_completions(reward, prompts=prompts, completions=completions, **settings)


# --- what it gets -------------------------------------------------------------------------------------------------


def test_arguments_arrive_by_name():
    seen = {}

    def reward(prompts, completions, answer, **columns):
        seen.update(prompts=prompts, completions=completions, answer=answer, **columns)
        return [1.0]

    ask(reward, ["a"], columns={"answer": [4], "level": ["easy"]}, completion_ids=[[1, 2]])
    assert seen["prompts"] == ["p"]
    assert seen["completions"] == ["a"]
    assert (seen["answer"], seen["level"], seen["completion_ids"]) == ([4], ["easy"], [[1, 2]])
    assert {"trainer_state", "log_extra", "log_metric"} <= set(seen)


def test_a_function_gets_only_what_it_names():
    assert ask(lambda completions: [len(text) for text in completions], columns={"other": [1, 2, 3]}).tolist() == [
        1,
        2,
        3,
    ]
    assert ask(lambda completions, answer=None: [0.0 if answer is None else 1.0] * 3).tolist() == [0, 0, 0]


def test_a_missing_column_is_named():
    with pytest.raises(RewardError, match=r"correct: the function needs 'solution'.*columns: \{solution: \.\.\.\}"):
        ask(functools.partial(lambda completions, solution: [1.0]), name="correct", columns={"answer": [1, 2, 3]})


def test_callables_of_every_kind():
    class Length:
        def __call__(self, completions, **columns):
            return [len(text) for text in completions]

    async def later(completions, **columns):
        return [1.0, 2.0, 3.0]

    assert ask(Length()).tolist() == [1, 2, 3]
    assert ask(later).tolist() == [1, 2, 3]
    assert ask(functools.partial(lambda completions, scale, **columns: [scale] * 3, scale=2)).tolist() == [2, 2, 2]
    assert reward_name(Length()) == "Length"
    assert reward_name(functools.partial(test_a_missing_column_is_named)) == "test_a_missing_column_is_named"
    assert isinstance(Length(), RewardFunction)


def test_a_coroutine_is_awaited_inside_a_running_loop():
    import asyncio

    async def later(completions):
        return [1.0, 2.0, 3.0]

    async def notebook():
        return ask(later)

    assert asyncio.run(notebook()).tolist() == [1, 2, 3]


def test_logging_and_extras():
    def reward(completions, log_metric, log_extra, trainer_state):
        log_metric("mean_length", 2)
        log_extra("length", [1, 2, 3])
        return [trainer_state.global_step] * 3

    log = RewardLog()
    state = type("State", (), {"global_step": 7})
    assert ask(reward, log=log, extras={"trainer_state": state}).tolist() == [7, 7, 7]
    assert (log.metrics, log.columns) == ({"mean_length": [2.0]}, {"length": [1, 2, 3]})


def test_text_of():
    assert text_of("a") == "a"
    assert text_of(CHAT[0]) == "b"


# --- what it returns ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.5, True],
        (1, 0.5, True),
        torch.tensor([1, 0.5, 1]),
        torch.tensor([1, 0.5, 1], dtype=torch.bfloat16, requires_grad=True),
        np.array([1, 0.5, 1]),
        [torch.tensor(1), np.float64(0.5), np.int64(1)],
    ],
)
def test_lists_tensors_and_arrays_are_accepted(returned):
    scores = ask(lambda completions: returned)
    assert scores.tolist() == [1, 0.5, 1]
    assert scores.dtype == torch.float32


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ([1.0, 2.0], r"f: wrong number of scores; got 2; expected 3, one per completion"),
        ([1.0, float("nan"), 2.0], r"f, completion 1 \('bb'\): a score is NaN.*Return None"),
        (torch.tensor([1.0, 2.0, float("nan")]), r"completion 2 \('ccc'\): a score is NaN"),
        ([1.0, float("inf"), 2.0], "completion 1 .*: a score is not finite"),
        ([1.0, 1e300, 2.0], "completion 1 .*: a score is not finite in float32"),
        ([1.0, "2", 2.0], "completion 1 .*: a score is no number; got '2'"),
        ([1.0, [2.0], 2.0], "completion 1 .*: a score is no number"),
        (torch.zeros(3, 1), r"wrong shape; got '\(3, 1\)'.*\.squeeze\(-1\)"),
        (torch.tensor(1.0), "wrong shape"),
        (1.0, "returned no list of scores; got 'float'"),
        (None, "returned no list of scores; got 'NoneType'"),
        ("abc", "returned no list of scores; got 'str'"),
        ({0: 1.0}, "returned no list of scores; got 'dict'"),
        ([1.0, None, 2.0], r"no score for completion 1: the function returned None \(1 of 3\)"),
        ([None] * 3, r"no score for every completion: the function returned None \(3 of 3\)"),
    ],
)
def test_anything_else_is_refused(returned, reason):
    with pytest.raises(RewardError, match=reason):
        ask(lambda completions: returned, name="f")


def test_none_is_nan_for_callers_that_allow_it():
    scores = ask(lambda completions: [1.0, None, 2.0], allow_missing=True)
    assert scores.isnan().tolist() == [False, True, False]
    assert ask(lambda completions: [None] * 3, allow_missing=True).isnan().all()


def test_an_exception_is_named_with_its_place():
    def broken(completions):
        return 1 / 0

    with pytest.raises(
        RewardError, match=r"broken \(.*test_protocol\.py, line \d+\): .*ZeroDivisionError: division by zero"
    ) as error:
        ask(broken)
    assert isinstance(error.value.__cause__, ZeroDivisionError)


def test_prompts_and_completions_must_match():
    with pytest.raises(RewardError, match="as many prompts as completions"):
        ask(lambda completions: [1.0], ["a"], prompts=["p", "q"])


def test_nothing_to_score():
    assert ask(lambda completions: [], []).shape == (0,)
