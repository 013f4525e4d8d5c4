"""Verifiable rewards for children's stories, used by the `stories_*` recipes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

CHEERFUL = frozenset(
    {
        "happy",
        "happily",
        "smile",
        "smiled",
        "smiling",
        "smiles",
        "laugh",
        "laughed",
        "laughing",
        "laughs",
        "fun",
        "love",
        "loved",
        "loves",
        "hug",
        "hugged",
        "hugs",
        "play",
        "played",
        "playing",
        "friend",
        "friends",
        "joy",
        "yay",
        "proud",
        "excited",
        "wonderful",
        "best",
        "kind",
        "nice",
        "thank",
        "thanked",
    }
)
SAD = frozenset(
    {
        "sad",
        "sadly",
        "cry",
        "cried",
        "crying",
        "cries",
        "tear",
        "tears",
        "hurt",
        "hurts",
        "scared",
        "afraid",
        "angry",
        "mad",
        "lost",
        "alone",
        "lonely",
        "sorry",
        "bad",
        "broke",
        "broken",
        "dark",
        "sick",
        "pain",
        "scary",
        "fell",
        "worried",
        "upset",
    }
)
_WORD = re.compile(r"[a-z']+")


def cheerfulness(completions: Sequence[str], **columns: Any) -> list[float]:
    """Cheerful words minus sad words, by two short lists: a stated rule, not a judgement.

    A count, not a share of the words: a share is highest for a story that stops after its first cheerful word.

    Args:
        completions: Story continuations.
        columns: Not read.

    Returns:
        One score per completion.

    >>> cheerfulness(["They were happy and had fun.", "He was sad."])
    [2.0, -1.0]
    """
    return [
        float(sum((word in CHEERFUL) - (word in SAD) for word in _WORD.findall(completion.lower())))
        for completion in completions
    ]


def names_animal(completions: Sequence[str], animal: Sequence[str], **columns: Any) -> list[float]:
    """1 where the asked animal occurs as a word of its own, also in the plural, else 0.

    Args:
        completions: Story continuations.
        animal: The animal asked for, per completion.
        columns: Not read.

    >>> names_animal(["A cat sat.", "A category."], ["cat", "cat"])
    [1.0, 0.0]
    """
    return [
        float(re.search(rf"\b{re.escape(name)}s?\b", completion.lower()) is not None)
        for completion, name in zip(completions, animal, strict=True)
    ]
