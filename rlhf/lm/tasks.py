"""Procedural tasks that a tiny model learns in seconds, with a hidden gold scorer to judge by.

They need no data file, no hub and no second library, so recipes, tests and the demo run on them as shipped:

- `sort_letters`: "dbacfe>" is answered by "abcdef". One right answer, so exact match is a verifiable reward.
- `vowel_words`: "kt>" is answered by a six-letter word that begins with "kt"; the more vowels after the stem, the
  better. Many answers of graded quality, so it suits rankings, a reward model and PPO.

Everything is drawn from one seeded generator: equal configs give equal records on every machine. Held-out prompts
never occur among the training prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rlhf.config import Config
from rlhf.data.records import Demonstration, Prompt, Ranking, Text, ranks_from_scores
from rlhf.errors import ConfigError

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = frozenset("aeiou")
PROMPT_END = ">"
STEM_LENGTH = 2

Scorer = Callable[..., list[float]]


class TaskConfig(Config):
    """Which procedural task, how large, and its seed."""

    name: Literal["sort_letters", "vowel_words"] = "sort_letters"
    """sort_letters is answered right or wrong; vowel_words has answers of graded quality (see the module)."""
    word_length: int = Field(6, ge=3, le=26)
    """Letters in an answer."""
    letters: int = Field(26, ge=3, le=26)
    """The first so many letters of the alphabet are in play."""
    train: int = Field(4000, ge=1)
    """Number of training prompts and of demonstrations."""
    held_out: int = Field(256, ge=1)
    """Number of held-out prompts, none of which is among the training prompts."""
    seed: int = 0
    """Seed of the records; independent of the run's seed, so that runs of several seeds see the same data."""

    @model_validator(mode="after")
    def _refuse_what_cannot_be_drawn(self) -> Self:
        if self.name == "sort_letters" and self.word_length > self.letters:
            raise ValueError(
                f"sort_letters draws {self.word_length} distinct letters from only {self.letters}; "
                "raise letters or lower word_length"
            )
        return self


@dataclass(frozen=True)
class Task:
    """Records of a task and its gold scorer."""

    name: str
    alphabet: str
    """Every character that occurs; make the tokenizer from it."""
    max_completion_length: int
    """Tokens of the longest answer, end token included."""
    prompts: list[Prompt]
    held_out_prompts: list[Prompt]
    demonstrations: list[Demonstration]
    held_out_demonstrations: list[Demonstration]
    gold: Scorer
    """The hidden scorer, a reward function with values in [0, 1]."""


def make_task(config: TaskConfig) -> Task:
    """Draw a task's records.

    Raises:
        ConfigError: There are fewer distinct prompts than `held_out` and one training prompt need.
    """
    generator = random.Random(config.seed)
    letters = LETTERS[: config.letters]
    draw_prompt, answer, gold = _parts(config, letters)
    held_out = _draw_distinct(lambda: draw_prompt(generator), config.held_out)
    excluded = set(held_out)
    train = _draw_outside(lambda: draw_prompt(generator), excluded, config.train)
    train_answers = [answer(stem, generator) for stem in train]
    held_out_answers = [answer(stem, generator) for stem in held_out]
    return Task(
        name=config.name,
        alphabet=letters + PROMPT_END,
        max_completion_length=config.word_length + 1,
        prompts=_prompts(config, train),
        held_out_prompts=_prompts(config, held_out),
        demonstrations=_demonstrations(train, train_answers),
        held_out_demonstrations=_demonstrations(held_out, held_out_answers),
        gold=gold,
    )


def sorted_letters(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Gold score of `sort_letters`: 1 where the completion is the prompt's letters in order, else 0.

    >>> sorted_letters(["dba>", "dba>"], ["abd", "abdd"])
    [1.0, 0.0]
    """
    return [
        float(completion == "".join(sorted(prompt.removesuffix(PROMPT_END))))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def vowel_share(
    prompts: Sequence[str], completions: Sequence[str], *, word_length: int = 6, **columns: Any
) -> list[float]:
    """Gold score of `vowel_words`: the share of vowels after the stem, or 0 for a malformed word.

    A word is well formed when it has exactly `word_length` characters, all letters, and begins with the stem.

    >>> vowel_share(["kt>", "kt>", "kt>"], ["ktaeba", "ktaeb", "taeiou"])
    [0.75, 0.0, 0.0]
    """
    scores = []
    for prompt, completion in zip(prompts, completions, strict=True):
        stem = prompt.removesuffix(PROMPT_END)
        well_formed = len(completion) == word_length and completion.isalpha() and completion.startswith(stem)
        rest = completion[len(stem) :]
        scores.append(sum(letter in VOWELS for letter in rest) / len(rest) if well_formed else 0.0)
    return scores


def rank_by_score(prompts: Sequence[Prompt], candidates: Sequence[Sequence[Text]], scorer: Scorer) -> list[Ranking]:
    """Turn K candidate completions a prompt into rankings by a scorer: what a human labeller would hand in.

    Equal scores tie. A prompt whose candidates all tie teaches nothing and is left out.

    Args:
        prompts: N prompts.
        candidates: N lists of K >= 2 completions.
        scorer: A reward function; its scores rank and are then forgotten (`scores` is None), so that a reward
            model cannot read them.

    Returns:
        At most N rankings.
    """
    rankings = []
    for prompt, completions in zip(prompts, candidates, strict=True):
        columns = {name: [value] * len(completions) for name, value in prompt.columns.items()}
        scores = scorer([prompt.prompt] * len(completions), list(completions), **columns)
        ranking = Ranking(prompt=prompt.prompt, completions=tuple(completions), ranks=ranks_from_scores(scores))
        if not ranking.tied:
            rankings.append(ranking)
    return rankings


def _parts(config: TaskConfig, letters: str) -> tuple[Callable[[random.Random], str], Callable[..., str], Scorer]:
    """The three functions that make a task: draw a prompt's letters, answer them, judge an answer."""
    length = config.word_length
    match config.name:
        case "sort_letters":

            def draw_letters(generator: random.Random) -> str:
                return "".join(generator.sample(letters, length))

            return draw_letters, lambda stem, generator: "".join(sorted(stem)), sorted_letters
        case "vowel_words":

            def draw_stem(generator: random.Random) -> str:
                return "".join(generator.choices(letters, k=STEM_LENGTH))

            def draw_word(stem: str, generator: random.Random) -> str:
                return stem + "".join(generator.choices(letters, k=length - STEM_LENGTH))

            def gold(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
                return vowel_share(prompts, completions, word_length=length)

            return draw_stem, draw_word, gold


def _draw_distinct(draw: Callable[[], str], count: int) -> list[str]:
    """The first `count` distinct draws, in order; gives up after many repeats."""
    drawn: dict[str, None] = {}
    for _ in range(100 * count):
        drawn[draw()] = None
        if len(drawn) == count:
            return list(drawn)
    raise ConfigError(
        "the task has too few distinct prompts",
        where="task.held_out",
        got=count,
        remedy="Lower held_out or raise letters.",
    )


def _draw_outside(draw: Callable[[], str], excluded: set[str], count: int) -> list[str]:
    """`count` draws, repeats allowed, none of them excluded."""
    drawn: list[str] = []
    for _ in range(100 * count + 1000):
        candidate = draw()
        if candidate not in excluded:
            drawn.append(candidate)
        if len(drawn) == count:
            return drawn
    raise ConfigError(
        "nearly all prompts of the task are held out",
        where="task.held_out",
        got=len(excluded),
        remedy="Lower held_out or raise letters.",
    )


def _prompts(config: TaskConfig, stems: Sequence[str]) -> list[Prompt]:
    """Prompts with the column `answer` where there is one right answer."""
    with_answer = config.name == "sort_letters"
    return [
        Prompt(prompt=stem + PROMPT_END, columns={"answer": "".join(sorted(stem))} if with_answer else {})
        for stem in stems
    ]


def _demonstrations(stems: Sequence[str], answers: Sequence[str]) -> list[Demonstration]:
    return [Demonstration(prompt=s + PROMPT_END, completion=a) for s, a in zip(stems, answers, strict=True)]
