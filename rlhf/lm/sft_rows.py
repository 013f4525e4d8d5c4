"""Demonstrations as rows of token ids with labels: what supervised fine-tuning learns, token by token.

Tokenization is ours, so that the model is trained on exactly the token ids that generation and RL will show it later,
its end token included.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rlhf.data.records import Demonstration, is_chat
from rlhf.data.tokenization import encode_completion, encode_prompt, end_token_ids
from rlhf.errors import DataError
from rlhf.lm.sft_config import SftConfig

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
"""The label that torch's cross-entropy leaves out."""


def tokenize_demonstrations(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], *, config: SftConfig
) -> tuple[list[dict[str, list[int]]], int]:
    """Turn demonstrations into rows of token ids and labels.

    Args:
        tokenizer: The model's.
        demonstrations: What to learn.
        config: `max_length`, `too_long`, `completion_only` and `assistant_only` are read.

    Returns:
        Rows {"input_ids", "labels"}, labels -100 where nothing is learned, and the number of dropped demonstrations.

    Raises:
        DataError: A demonstration is too long and `too_long` is error, or no row is left; or an earlier turn of the
            assistant's cannot be found in the prompt.
    """
    if tokenizer.chat_template and not any(is_chat(demonstration.prompt) for demonstration in demonstrations):
        logger.warning(
            "The tokenizer has a chat template, but the demonstrations are plain strings and do not pass through it. "
            "To train a chat model, set `chat: true` in the data."
        )
    rows, dropped = [], 0
    for index, demonstration in enumerate(demonstrations):
        where = demonstration.source or f"demonstration {index}"
        prompt = encode_prompt(tokenizer, demonstration.prompt, where=where)
        completion = encode_completion(tokenizer, demonstration.prompt, demonstration.completion, where=where)
        if len(prompt) + len(completion) > config.max_length:
            if config.too_long == "error":
                raise DataError(
                    "the demonstration is too long",
                    where=where,
                    got=f"{len(prompt) + len(completion)} tokens",
                    expected=f"at most {config.max_length}",
                    remedy="Raise max_length, or set too_long: drop.",
                )
            dropped += 1
            continue
        labels = _prompt_labels(tokenizer, demonstration, prompt, config=config, where=where)
        rows.append({"input_ids": prompt + completion, "labels": labels + completion})
    if not rows:
        raise DataError(
            "no demonstration is left to learn from",
            got=f"{dropped} dropped as longer than max_length={config.max_length}",
            remedy="Raise max_length, or check the data file.",
        )
    if dropped:
        logger.warning(
            "%d of %d demonstrations are longer than max_length and were dropped.", dropped, len(demonstrations)
        )
    return rows, dropped


def _prompt_labels(
    tokenizer: PreTrainedTokenizerBase,
    demonstration: Demonstration,
    prompt: list[int],
    *,
    config: SftConfig,
    where: str,
) -> list[int]:
    """Labels of the prompt's tokens: all, none, or those of the assistant's earlier turns."""
    if not config.completion_only:
        return prompt
    labels = [IGNORED_LABEL] * len(prompt)
    if not config.assistant_only or not is_chat(demonstration.prompt):
        return labels
    for turn, message in enumerate(demonstration.prompt):
        if message["role"] != "assistant" or turn == len(demonstration.prompt) - 1:
            continue  # a last turn of the assistant's is open: the completion goes on with it
        first, end = _turn_span(tokenizer, demonstration, prompt, turn=turn, where=where)
        labels[first:end] = prompt[first:end]
    return labels


def _turn_span(
    tokenizer: PreTrainedTokenizerBase, demonstration: Demonstration, prompt: list[int], *, turn: int, where: str
) -> tuple[int, int]:
    """First token of an assistant's turn in the prompt, and the place after the token that ends it."""
    assert is_chat(demonstration.prompt)
    before = encode_prompt(tokenizer, demonstration.prompt[:turn], where=where) if turn else []
    ends = set(end_token_ids(tokenizer))
    end = next((place for place in range(len(before), len(prompt)) if prompt[place] in ends), None)
    if not before or prompt[: len(before)] != before or end is None:
        raise DataError(
            "the chat template prints an earlier turn of the assistant's differently once others follow it",
            where=where,
            got=f"turn {turn + 1} of {len(demonstration.prompt)}",
            remedy="Unset assistant_only and set `assistant_turns: all` in the data: a demonstration for every turn.",
        )
    return len(before), end + 1


def share_of_learned_ends(rows: Sequence[dict[str, list[int]]], end_tokens: Sequence[int]) -> float:
    """Share of rows whose last token is an end token that carries a label.

    Args:
        rows: {"input_ids", "labels"} of one demonstration each.
        end_tokens: From `end_token_ids`.

    >>> learned, hidden = {"input_ids": [5, 2], "labels": [5, 2]}, {"input_ids": [5, 2], "labels": [5, -100]}
    >>> share_of_learned_ends([learned, hidden], [2])
    0.5
    """
    ends = set(end_tokens)
    return sum(row["input_ids"][-1] in ends and row["labels"][-1] != IGNORED_LABEL for row in rows) / len(rows)


def warn_of_unlearned_ends(rows: Sequence[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Say so where a model would not learn to stop: it would talk on to the limit."""
    share = share_of_learned_ends(rows, end_token_ids(tokenizer))
    if share < 1.0:
        logger.warning(
            "The end token is learned in %.1f %% of the rows only: the model would not learn to stop. Look at them "
            "with `rlhf show-batch`; check the tokenizer's eos_token and how its chat template closes a turn.",
            100 * share,
        )
