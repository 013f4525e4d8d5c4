"""Verifiable rewards for children's stories, used by the `stories_*` recipes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

CHEERFUL = frozenset(
    "happy happily smile smiled smiling smiles laugh laughed laughing laughs fun love loved loves hug hugged hugs play "
    "played playing friend friends joy yay proud excited wonderful best kind nice thank thanked".split()
)
SAD = frozenset(
    "sad sadly cry cried crying cries tear tears hurt hurts scared afraid angry mad lost alone lonely sorry bad broke "
    "broken dark sick pain scary fell worried upset".split()
)
_WORD = re.compile(r"[a-z']+")


def cheerfulness(completions: Sequence[str], **columns: Any) -> list[float]:
    """(cheerful words - sad words) / all words x 10, by two short lists of words: a stated rule, not a judgement.

    Args:
        completions: Story continuations.
        columns: Not read.

    Returns:
        One score per completion; 0 for a completion without words.

    >>> cheerfulness(["They were happy and had fun.", "He was sad."])
    [3.3333333333333335, -3.3333333333333335]
    """
    scores = []
    for completion in completions:
        words = _WORD.findall(completion.lower())
        balance = sum((word in CHEERFUL) - (word in SAD) for word in words)
        scores.append(10 * balance / len(words) if words else 0.0)
    return scores


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
