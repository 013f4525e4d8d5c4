"""Reading one row as a ranking: a list with ranks, scores or an order, or a pair with or without its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rlhf.data.mapping import field_of, read_completion_field, read_prompt_field
from rlhf.data.records import (
    Message,
    Ranking,
    Text,
    check_number,
    dense_ranks,
    is_chat,
    ranks_from_scores,
    read_text,
)
from rlhf.data.settings import DataConfig
from rlhf.errors import DataError

Values = dict[str, Any]

_READ = ("prompt", "completions", "ranks", "scores", "chosen", "rejected")

ASSISTANT_MARKER = "\n\nAssistant:"
"""Where an answer begins in the dialogues of Anthropic's hh-rlhf."""


def read_ranking(values: Values, *, where: str, data: DataConfig) -> Ranking:
    """Read a row whose columns already have our names.

    Raises:
        DataError: A field is missing, of the wrong type or length, or contradicts another; the ranking is one tie
            and `tied` is `refuse`.
    """
    if "completions" not in values and ("chosen" in values or "rejected" in values):
        ranking = _read_pair(values, where, data)
    else:
        ranking = _read_list(values, where, data)
    if ranking.tied and data.tied == "refuse":
        raise DataError(
            "ranks: every completion is tied, so the ranking prefers nothing",
            got=ranking.scores or ranking.ranks,
            remedy="Set `tied: keep` or `tied: drop`.",
        )
    return replace(ranking, columns={name: value for name, value in values.items() if name not in _READ})


def _read_list(values: Values, where: str, data: DataConfig) -> Ranking:
    prompt = read_prompt_field(field_of(values, "prompt"), data)
    completions = _read_completions(field_of(values, "completions"), prompt)
    scores = _read_numbers(values, "scores", len(completions))
    order = _read_numbers(values, "ranks", len(completions))
    if data.order == "best_first":
        ranks = tuple(range(len(completions)))
    elif order is not None and (data.order == "ranks" or (data.order == "auto" and not data.min_score_gap)):
        ranks = _ranks(order)
    elif scores is not None and data.order != "ranks":
        ranks = ranks_from_scores(scores, min_gap=data.min_score_gap)
    else:
        raise DataError(
            "ranks: nothing orders the completions",
            expected={"auto": "ranks or scores"}.get(data.order, data.order) + f" among {', '.join(values)}",
            remedy="If the list itself runs from best to worst, set `order: best_first`.",
        )
    _check_agreement(ranks, scores)
    return Ranking(prompt, completions, ranks, scores, where)


def _read_completions(value: Any, prompt: Text) -> tuple[Text, ...]:
    if not isinstance(value, list | tuple):
        raise DataError("completions: is no list", got=value, expected="a list of texts")
    return tuple(read_completion_field(item, prompt, name=f"completions[{index}]") for index, item in enumerate(value))


def _read_numbers(values: Values, name: str, length: int) -> tuple[float, ...] | None:
    numbers = values.get(name)
    if numbers is None:
        return None
    if not isinstance(numbers, list | tuple):
        raise DataError(f"{name}: is no list", got=numbers, expected=f"{length} numbers, one per completion")
    if len(numbers) != length:
        raise DataError(f"{name}: wrong length", got=len(numbers), expected=f"{length}, one per completion")
    for index, number in enumerate(numbers):
        check_number(number, f"{name}[{index}]")
    return tuple(float(number) for number in numbers)


def _ranks(order: Sequence[float]) -> tuple[int, ...]:
    fraction = next((index for index, rank in enumerate(order) if rank != int(rank)), None)
    if fraction is not None:
        raise DataError(
            f"ranks[{fraction}]: is no whole number",
            got=order[fraction],
            expected="0 for the best, 1 for the next",
            remedy="If these are scores (higher is better), map them: `columns: {scores: ranks}`.",
        )
    return dense_ranks(order)


def _check_agreement(ranks: Sequence[int], scores: Sequence[float] | None) -> None:
    """Ranks count down in quality and scores up; a file that mixes them up would train the wrong way round."""
    if scores is None:
        return
    best_first = sorted(range(len(ranks)), key=lambda index: (ranks[index], -scores[index]))
    lowest = float("inf")
    for previous, index in pairwise(best_first):
        if ranks[index] > ranks[previous]:
            lowest = min(lowest, scores[previous])
        if scores[index] > lowest:
            raise DataError(
                f"ranks: completion {index} has a worse rank but a higher score than one before it",
                got={"ranks": list(ranks), "scores": list(scores)},
                expected="rank 0 for the highest score",
                remedy="Set `order: scores` to trust the scores, or leave the scores unmapped.",
            )


# --- pairs --------------------------------------------------------------------------------------------------------


def _read_pair(values: Values, where: str, data: DataConfig) -> Ranking:
    prompt, chosen, rejected = _split_pair(values, data)
    scores = _read_numbers(values, "scores", 2)
    # Two equal texts cannot be better than one another, whatever the file calls them.
    ranks = (0, 0) if chosen == rejected else (0, 1)
    _check_agreement(ranks, scores)
    return Ranking(prompt, (chosen, rejected), ranks, scores, where)


def _split_pair(values: Values, data: DataConfig) -> tuple[Text, Text, Text]:
    chosen = read_text(field_of(values, "chosen"), "chosen")
    rejected = read_text(field_of(values, "rejected"), "rejected")
    if is_chat(chosen) != is_chat(rejected):
        raise DataError("rejected: chosen and rejected are of different kinds", expected="two strings or two chats")
    given = values.get("prompt")
    if given is not None and not _repeats_prompt(given, chosen):
        prompt = read_prompt_field(given, data)
        return (
            prompt,
            read_completion_field(chosen, prompt, name="chosen"),
            read_completion_field(rejected, prompt, name="rejected"),
        )
    if is_chat(chosen) and is_chat(rejected):
        length = _shared_messages(chosen, rejected)
        return read_prompt_field(chosen[:length], data), chosen[length:], rejected[length:]
    assert not is_chat(chosen)
    assert not is_chat(rejected)
    length = _shared_text(chosen, rejected)
    prompt = read_prompt_field(chosen[:length], data)
    return (
        prompt,
        read_completion_field(chosen[length:], prompt, name="chosen"),
        read_completion_field(rejected[length:], prompt, name="rejected"),
    )


def _repeats_prompt(prompt: Any, chosen: Text) -> bool:
    """True where `chosen` is a whole chat that holds the prompt again, as UltraFeedback's files have it."""
    if not is_chat(chosen) or len(chosen) < 2:
        return False
    if isinstance(prompt, str):
        return any(message["role"] == "user" and message["content"] == prompt for message in chosen)
    messages = read_text(prompt, "prompt")
    return chosen[: len(messages)] == messages


def _shared_messages(chosen: list[Message], rejected: list[Message]) -> int:
    """Number of messages the two chats share, up to the assistant turn where they part."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and (chosen[shared]["role"] != "assistant" or rejected[shared]["role"] != "assistant"):
        shared -= 1
    if not shared:
        raise DataError(
            "prompt: is missing, and chosen and rejected share no turn that an assistant's answer follows",
            expected="a prompt, or two chats that begin alike",
        )
    return shared


def _shared_text(chosen: str, rejected: str) -> int:
    """Length of the prompt that two texts share: up to the last "Assistant:", or else to the last whole word.

    Where two dialogues part before their last turn, the prompt ends where they part, and the completions run over
    several turns.
    """
    length = next((index for index, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), None)
    shared = chosen[: min(len(chosen), len(rejected)) if length is None else length]
    marker = shared.rfind(ASSISTANT_MARKER)
    if marker >= 0:
        return marker + len(ASSISTANT_MARKER)
    words = shared.rstrip() if len(shared) < min(len(chosen), len(rejected)) else shared
    length = len(words) if words != shared else max(words.rfind(" "), words.rfind("\n"))
    if length <= 0 or not shared[:length].strip():
        raise DataError(
            "prompt: is missing, and chosen and rejected do not begin alike",
            got=(chosen[:60], rejected[:60]),
            expected="a prompt, or two dialogues that share their beginning",
        )
    return length
