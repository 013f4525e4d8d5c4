"""The three records of the language side: what is asked, what was shown, what was preferred.

A text is a string or a list of chat messages `{"role", "content"}`, everywhere. Records check themselves when they
are made, so that those built by hand in Python are as sound as those read from a file. This module imports nothing
heavy: no torch, no transformers, no datasets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

from typing_extensions import TypeIs

from rlhf.errors import DataError

Message: TypeAlias = dict[str, Any]
Text: TypeAlias = str | list[Message]

# ShareGPT files name the speaker `from` and the text `value`; every chat template speaks of these roles instead.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Something to be answered, made by `load_prompts`, used by the prompt collector and by evaluation.

    Raises:
        DataError: The prompt is empty or no text.
    """

    prompt: Text
    columns: dict[str, Any] = field(default_factory=dict)
    """Every other column of the row; a reward function receives each by its name, as a list."""
    source: str = field(default="", compare=False, repr=False)
    """File and line, for error messages."""

    def __post_init__(self) -> None:
        check_text(self.prompt, "prompt")


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt with the completion to imitate, made by `load_demonstrations`, used by supervised fine-tuning.

    The prompt may be the empty string: then the completion is plain text to be modelled from its first token on.

    Raises:
        DataError: A part is no text, the completion is empty, or one is a string and the other chat messages.
    """

    prompt: Text
    completion: Text
    source: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_text(self.prompt, "prompt", allow_empty=isinstance(self.prompt, str))
        check_text(self.completion, "completion")
        _check_same_kind(self.prompt, self.completion, "completion")


@dataclass(frozen=True, slots=True)
class Ranking:
    """K completions of one prompt in order of preference, made by `load_rankings`, used by reward models.

    Raises:
        DataError: Fewer than two completions, ranks or scores of another length, ranks that do not start at 0,
            scores that are not finite, or a completion that is not of the prompt's kind (string or chat).
    """

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[int, ...]
    """One per completion: 0 is best, equal ranks are ties."""
    scores: tuple[float, ...] | None = None
    """The scores the ranks came from, higher is better; None where the file had only an order."""
    source: str = field(default="", compare=False, repr=False)
    columns: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Every other column of the row, such as a benchmark's `subset`."""

    def __post_init__(self) -> None:
        check_text(self.prompt, "prompt")
        if len(self.completions) < 2:
            raise DataError(
                "completions: a ranking needs at least two", got=len(self.completions), expected="2 or more completions"
            )
        for index, completion in enumerate(self.completions):
            # An empty answer is a bad answer, and rankings must be able to say so.
            check_text(completion, f"completions[{index}]", allow_empty=True)
            _check_same_kind(self.prompt, completion, f"completions[{index}]")
        _check_length("ranks", self.ranks, len(self.completions))
        if any(isinstance(rank, bool) or not isinstance(rank, int) for rank in self.ranks) or min(self.ranks) != 0:
            raise DataError(
                "ranks: must be whole numbers from 0 on",
                got=self.ranks,
                expected="0 for the best, equal ranks for ties",
                remedy="`dense_ranks` turns any order of numbers into such ranks.",
            )
        if self.scores is not None:
            _check_length("scores", self.scores, len(self.completions))
            for index, score in enumerate(self.scores):
                check_number(score, f"scores[{index}]")

    @property
    def tied(self) -> bool:
        """True where every completion has the same rank, so that nothing is preferred to anything."""
        return len(set(self.ranks)) == 1


# --- texts --------------------------------------------------------------------------------------------------------


def is_chat(text: Text) -> TypeIs[list[Message]]:
    """Return True for a list of chat messages, False for a string."""
    return not isinstance(text, str)


def read_text(value: Any, name: str) -> Text:
    """Turn a field of a row into a text: a string, a list of messages, or one message alone.

    ShareGPT's `{"from": "human", "value": ...}` becomes `{"role": "user", "content": ...}`, and a content given as a
    list of text parts becomes their concatenation. Other keys of a message (such as `tool_calls`) are kept.

    Raises:
        DataError: Anything else, with the field's name.

    Example:
        >>> read_text([{"from": "human", "value": "Hi"}], "prompt")
        [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise DataError(f"{name}: is no text", got=value, expected="a string or a list of chat messages")
    return [_read_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _read_message(message: Any, name: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{name}: is no chat message", got=message, expected='{"role": ..., "content": ...}')
    if "role" not in message and "from" in message and "value" in message:
        speaker = message["from"]
        if speaker not in _SHAREGPT_ROLES:
            raise DataError(f"{name}.from: unknown speaker", got=speaker, expected=", ".join(sorted(_SHAREGPT_ROLES)))
        others = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": _SHAREGPT_ROLES[speaker], "content": message["value"], **others}
    missing = [key for key in ("role", "content") if key not in message]
    if missing:
        raise DataError(
            f"{name}: a chat message lacks {missing[0]!r}", got=sorted(message), expected="role and content"
        )
    content = message["content"]
    if isinstance(content, list):
        content = "".join(_read_part(part, f"{name}.content[{index}]") for index, part in enumerate(content))
    elif content is None and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{name}.content: is no string", got=content, expected="a string")
    return {**message, "content": content}


def _read_part(part: Any, name: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise DataError(f"{name}: only text parts are supported", got=part, expected='{"type": "text", "text": ...}')


def check_text(text: Any, name: str, *, allow_empty: bool = False) -> None:
    """Raise `DataError` unless `text` is a string or a list of messages, and says something."""
    if isinstance(text, str):
        if not text.strip() and not allow_empty:
            raise DataError(f"{name}: is empty", got=text, expected="a text")
        return
    if not isinstance(text, list):
        raise DataError(f"{name}: is no text", got=text, expected="a string or a list of chat messages")
    if not text:
        raise DataError(f"{name}: has no message", got=text, expected="one chat message or more")
    for index, message in enumerate(text):
        where = f"{name}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f"{where}: is no chat message", got=message, expected='{"role": ..., "content": "..."}')
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise DataError(f"{where}.role: is no role", got=message.get("role"), expected="system, user or assistant")
    if not allow_empty and not text[-1]["content"].strip() and not text[-1].get("tool_calls"):
        raise DataError(f"{name}: its last message is empty", got=text[-1], expected="a message that says something")


def _check_same_kind(prompt: Text, completion: Text, name: str) -> None:
    if is_chat(prompt) != is_chat(completion):
        kinds = {True: "chat messages", False: "a string"}
        raise DataError(
            f"{name}: is {kinds[is_chat(completion)]}, but the prompt is {kinds[is_chat(prompt)]}",
            expected="two texts of one kind",
            remedy="`chat: true` in the data settings wraps strings into chat messages.",
        )


# --- numbers ------------------------------------------------------------------------------------------------------


def check_number(value: Any, name: str) -> None:
    """Raise `DataError` unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{name}: is no number", got=value, expected="a number")
    if not math.isfinite(value):
        raise DataError(f"{name}: is not finite", got=value, expected="a finite number")


def _check_length(name: str, values: Sequence[Any], length: int) -> None:
    if len(values) != length:
        raise DataError(f"{name}: wrong length", got=len(values), expected=f"{length}, one per completion")


def dense_ranks(order: Sequence[float]) -> tuple[int, ...]:
    """Turn numbers of which the lowest is best into ranks 0, 1, 2 ... with equal numbers tied.

    Example:
        >>> dense_ranks([3, 1, 1, 7])
        (1, 0, 0, 2)
    """
    levels = {value: rank for rank, value in enumerate(sorted(set(order)))}
    return tuple(levels[value] for value in order)


def ranks_from_scores(scores: Sequence[float], *, min_gap: float = 0.0) -> tuple[int, ...]:
    """Turn scores of which the highest is best into ranks; equal scores are ties.

    With a minimum gap, scores are walked from the best to the worst and a new rank begins only where the next score
    is lower by at least `min_gap`. So every two completions of different rank differ by at least the gap; a chain of
    small steps becomes one tie, because ranks cannot say "a beats c, but b ties with both".

    Args:
        scores: One finite number per completion, higher is better.
        min_gap: In the scores' unit, >= 0.

    Returns:
        One rank per completion, 0 is best.

    Example:
        >>> ranks_from_scores([0.2, 0.9, 0.2, 0.5])
        (2, 0, 2, 1)
        >>> ranks_from_scores([0.2, 0.9, 0.1, 0.5], min_gap=0.35)
        (1, 0, 1, 1)
    """
    if min_gap < 0:
        raise DataError("min_gap: is negative", got=min_gap, expected="0 or more")
    best_first = sorted(range(len(scores)), key=lambda index: -scores[index])
    ranks, rank = [0] * len(scores), 0
    for previous, index in pairwise(best_first):
        gap = scores[previous] - scores[index]
        rank += gap > 0 and gap >= min_gap
        ranks[index] = rank
    return tuple(ranks)
