"""Procedural tasks: the same records everywhere, held-out prompts apart, gold scores by hand."""

import pytest

from rlhf.data.records import Prompt
from rlhf.errors import ConfigError
from rlhf.lm.tasks import TaskConfig, make_task, rank_by_score, sorted_letters, vowel_share

NAMES = ["sort_letters", "vowel_words"]


@pytest.mark.parametrize("name", NAMES)
def test_records_are_a_function_of_the_seed(name):
    first, again = (make_task(TaskConfig(name=name, train=50, held_out=10)) for _ in range(2))
    assert first.prompts == again.prompts
    assert first.demonstrations == again.demonstrations
    other = make_task(TaskConfig(name=name, train=50, held_out=10, seed=1))
    assert first.prompts != other.prompts


@pytest.mark.parametrize("name", NAMES)
def test_held_out_prompts_are_apart(name):
    task = make_task(TaskConfig(name=name, train=2000, held_out=60))
    train, held_out = ({p.prompt for p in prompts} for prompts in (task.prompts, task.held_out_prompts))
    assert len(task.prompts) == 2000
    assert len(held_out) == 60
    assert not train & held_out
    assert not held_out & {demonstration.prompt for demonstration in task.demonstrations}


def test_demonstrations_of_sorting_are_right():
    task = make_task(TaskConfig(name="sort_letters", train=50))
    assert task.gold([d.prompt for d in task.demonstrations], [d.completion for d in task.demonstrations]) == [1.0] * 50
    assert task.prompts[0].columns == {"answer": task.demonstrations[0].completion}
    assert task.max_completion_length == 7


def test_demonstrations_of_vowel_words_are_well_formed_and_mediocre():
    task = make_task(TaskConfig(name="vowel_words", train=2000))
    scores = task.gold([d.prompt for d in task.demonstrations], [d.completion for d in task.demonstrations])
    # Four uniform letters, five vowels among 26.
    assert sum(scores) / len(scores) == pytest.approx(5 / 26, abs=0.02)


def test_every_character_is_in_the_alphabet():
    for name in NAMES:
        task = make_task(TaskConfig(name=name, train=100, letters=12, word_length=4, held_out=20))
        text = "".join(d.prompt + d.completion for d in task.demonstrations + task.held_out_demonstrations)
        assert set(text) <= set(task.alphabet)


def test_gold_scores_by_hand():
    assert sorted_letters(["cab>"] * 3, ["abc", "acb", "abc "]) == [1.0, 0.0, 0.0]
    words = ["ktaexx", "ktaeio", "kta", "tkaeio", "ktae1o"]
    assert vowel_share(["kt>"] * 5, words) == [0.5, 1.0, 0.0, 0.0, 0.0]


def test_rankings_come_from_scores_with_ties_and_forget_them():
    def length(prompts, completions, **columns):
        return [float(len(text)) for text in completions]

    rankings = rank_by_score([Prompt("a>"), Prompt("b>")], [["x", "xx", "y"], ["x", "y", "z"]], length)
    assert len(rankings) == 1
    assert rankings[0].ranks == (1, 0, 1)
    assert rankings[0].scores is None


def test_tasks_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="distinct letters"):
        TaskConfig(name="sort_letters", word_length=6, letters=5)
    with pytest.raises(ConfigError, match="too few distinct prompts"):
        make_task(TaskConfig(name="vowel_words", letters=3, held_out=10))
