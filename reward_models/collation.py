"""From rankings to token ids: all K completions of a prompt travel together, each tokenized with its end token.

A batch holds every candidate once, so a prompt costs K forwards, not one for each side of its K(K - 1)/2 pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.collation import right_pad
from rlhf.data.records import Ranking, Text
from rlhf.data.tokenization import encode_completion, encode_prompt
from rlhf.errors import DataError

Overlong = Literal["refuse", "truncate", "drop"]
InnerEnd = Literal["refuse", "text"]


@dataclass(frozen=True, kw_only=True)
class EncodedRanking:
    """The candidates of one prompt, ready for the model."""

    sequences: list[list[int]]
    """K sequences of prompt and completion, each ending in the end token."""
    ranks: list[int]
    """K ranks, 0 = best, equal = tie."""
    gold_scores: list[float] | None
    """K scores of the data set itself, if it has them."""
    lengths: list[int]
    """K lengths of the completions' text, in characters, for the baseline "longer answer wins"."""


@dataclass(frozen=True, kw_only=True)
class EncodingReport:
    """What encoding did to a list of rankings; print it, so that nothing is lost silently."""

    rankings: int = 0
    """Rankings read."""
    candidates: int = 0
    """Candidates read."""
    truncated_candidates: int = 0
    """Candidates shortened to the maximum length (`truncate`)."""
    dropped_candidates: int = 0
    """Candidates left out because they were too long (`drop`)."""
    dropped_rankings: int = 0
    """Rankings left out because fewer than two candidates fitted."""
    uninformative_rankings: int = 0
    """Rankings left out because all their candidates tie."""

    def __add__(self, other: EncodingReport) -> EncodingReport:
        return EncodingReport(
            **{item.name: getattr(self, item.name) + getattr(other, item.name) for item in fields(self)}
        )

    def __str__(self) -> str:
        parts = [f"{self.rankings} rankings with {self.candidates} candidates"]
        parts += [
            f"{getattr(self, item.name)} {item.name.replace('_', ' ')}"
            for item in fields(self)[2:]
            if getattr(self, item.name)
        ]
        return ", ".join(parts)


def encode_candidate(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    *,
    max_length: int | None,
    truncate: bool,
    inner_end: InnerEnd = "refuse",
    where: str | None = None,
) -> tuple[list[int], bool]:
    """Tokenize one prompt and completion as training and scoring both see them: template and end token included.

    Args:
        tokenizer: The reward model's own.
        prompt: A string or chat messages.
        completion: A string or chat messages.
        max_length: Most tokens a sequence may have; None sets no limit.
        truncate: Cut what is longer: first the completion at its end, down to half of `max_length`, then the
            prompt at its start; the first token of all (BOS) and the end token stay.
        inner_end: A completion that spells the end token in its midst is refused, or taken as plain `text`.
        where: File and line, for errors.

    Returns:
        The token ids, and whether they were, or without `truncate` would have to be, cut.
    """
    prompt_ids = encode_prompt(tokenizer, prompt, max_length=None, where=where)
    completion_ids = encode_completion(tokenizer, prompt, completion, add_end=True, inner_end=inner_end, where=where)
    if max_length is None or len(prompt_ids) + len(completion_ids) <= max_length:
        return prompt_ids + completion_ids, False
    if not truncate:
        return prompt_ids + completion_ids, True
    prompt_room = max(max_length - max_length // 2, max_length - len(completion_ids))
    if len(prompt_ids) > prompt_room:
        prompt_ids = prompt_ids[:1] + prompt_ids[len(prompt_ids) - prompt_room + 1 :]
    completion_room = max_length - len(prompt_ids)
    if len(completion_ids) > completion_room:
        completion_ids = completion_ids[: completion_room - 1] + completion_ids[-1:]
    return prompt_ids + completion_ids, True


def encode_ranking(
    tokenizer: PreTrainedTokenizerBase,
    ranking: Ranking,
    *,
    max_length: int | None,
    overlong: Overlong,
    where: str,
    inner_end: InnerEnd = "refuse",
) -> tuple[EncodedRanking | None, EncodingReport]:
    """Tokenize one ranking; None if it can teach nothing (see the report for why).

    Raises:
        DataError: A candidate is longer than `max_length` and `overlong` is "refuse".
    """
    sequences: list[list[int]] = []
    kept: list[int] = []
    truncated = 0
    for index, completion in enumerate(ranking.completions):
        ids, is_overlong = encode_candidate(
            tokenizer,
            ranking.prompt,
            completion,
            max_length=max_length,
            truncate=overlong == "truncate",
            inner_end=inner_end,
            where=where,
        )
        if is_overlong and overlong == "refuse":
            raise DataError(
                f"candidate {index} is longer than max_length={max_length} tokens",
                where=where,
                got=len(ids),
                remedy="Raise max_length if the model allows it, or set overlong to truncate or drop.",
            )
        if is_overlong and overlong == "drop":
            continue
        truncated += is_overlong
        sequences.append(ids)
        kept.append(index)
    ranks = [ranking.ranks[index] for index in kept]
    report = EncodingReport(
        rankings=1,
        candidates=len(ranking.completions),
        truncated_candidates=truncated,
        dropped_candidates=len(ranking.completions) - len(kept),
        dropped_rankings=int(len(kept) < 2),
        uninformative_rankings=int(len(kept) >= 2 and len(set(ranks)) == 1),
    )
    if len(set(ranks)) < 2:
        return None, report
    encoded = EncodedRanking(
        sequences=sequences,
        ranks=ranks,
        gold_scores=None if ranking.scores is None else [ranking.scores[index] for index in kept],
        lengths=[text_length(ranking.completions[index]) for index in kept],
    )
    return encoded, report


def encode_rankings(
    rankings: Sequence[Ranking],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    overlong: Overlong = "refuse",
    inner_end: InnerEnd = "refuse",
    name: str = "rankings",
) -> tuple[list[EncodedRanking], EncodingReport]:
    """Tokenize rankings.

    Args:
        rankings: What was loaded.
        tokenizer: The reward model's own.
        max_length: Most tokens of prompt plus completion; None sets no limit.
        overlong: What to do with longer candidates: refuse the data, cut them, or leave them out.
        inner_end: What to do with completions that spell the end token in their midst.
        name: Of the data, for error messages.

    Returns:
        The rankings that can teach something, and counts of everything that was cut or left out.

    Raises:
        DataError: A candidate is too long under "refuse", or nothing at all is left.
    """
    encoded: list[EncodedRanking] = []
    report = EncodingReport()
    for index, ranking in enumerate(rankings):
        one, its_report = encode_ranking(
            tokenizer,
            ranking,
            max_length=max_length,
            overlong=overlong,
            where=ranking.source or f"{name}[{index}]",
            inner_end=inner_end,
        )
        report += its_report
        if one is not None:
            encoded.append(one)
    if not encoded:
        raise DataError(f"no ranking is left to learn from: {report}", where=name)
    return encoded, report


class RankingCollator:
    """Puts the candidates of several prompts into one batch.

    Args:
        pad_id: Filler on the right; it is masked, so any id will do.

    A batch holds `input_ids` and `attention_mask` [N, L] for the N candidates that exist, `shared_lengths` [N] (first
    tokens that all candidates of the prompt share), their places `rows` and `columns` [N] in the [P, K] tables, and
    `ranks`, `mask` and (if the data has them) `gold_scores` [P, K].
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rankings: Sequence[EncodedRanking]) -> dict[str, Tensor]:
        """Collate P rankings."""
        input_ids, attention_mask = right_pad([ids for ranking in rankings for ids in ranking.sequences], self.pad_id)
        counts = torch.tensor([len(ranking.ranks) for ranking in rankings])
        mask = torch.arange(int(counts.max())) < counts.unsqueeze(1)  # [P, K]
        rows, columns = mask.nonzero(as_tuple=True)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "shared_lengths": shared_lengths(rankings),
            "rows": rows,
            "columns": columns,
            "ranks": torch.zeros_like(mask, dtype=torch.int64),
            "mask": mask,
        }
        batch["ranks"][rows, columns] = torch.tensor([rank for ranking in rankings for rank in ranking.ranks])
        if all(ranking.gold_scores is not None for ranking in rankings):
            batch["gold_scores"] = torch.zeros(mask.shape)
            batch["gold_scores"][rows, columns] = torch.tensor(
                [score for ranking in rankings for score in ranking.gold_scores or []]
            )
        return batch


def shared_lengths(rankings: Sequence[EncodedRanking]) -> Tensor:
    """[N] for each candidate, how many first tokens all candidates of its prompt have in common."""
    return torch.tensor([common_length(one.sequences) for one in rankings for _ in one.sequences])


def common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning.

    >>> common_length([[5, 6, 7], [5, 6, 8, 7]])
    2
    """
    # Between the two that sort farthest apart lie all others, and what those share all share.
    first, last = min(sequences), max(sequences)
    return next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), len(first))


def scatter_scores(scores: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Place scores [N] of a collated batch into [P, K]; 0 where there is no candidate."""
    table = scores.new_zeros(batch["mask"].shape)
    return table.index_put((batch["rows"], batch["columns"]), scores)


def text_length(text: Text) -> int:
    """Characters of a string, or of the contents of chat messages."""
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)
