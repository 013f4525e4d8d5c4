"""Completions with their scores, and what is done to scores before they become rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.lm.collector_config import ShapingConfig
from rlhf.lm.rollout_metrics import uniform_groups
from rlhf.lm.samples import Samples, Verdict, concatenate_samples, select_samples
from rlhf.rewards.shaping import length_penalty, missing_end_penalty, soft_overlong


@dataclass(frozen=True)
class Judged:
    """Completions, the reward function's verdict, and what shaping made of it; groups lie side by side."""

    samples: Samples
    verdict: Verdict
    rewards: Tensor
    """[R] float32 on the CPU, after shaping."""
    baselines: Tensor | None = None
    """[R] float32 on the CPU: the reward of the greedy completion of each row's prompt."""

    @property
    def scores(self) -> Tensor:
        """[R] float32 on the CPU, as the reward function gave them."""
        return self.verdict.scores

    def select(self, rows: Tensor) -> Judged:
        """The rows at integer indices [n]."""
        return Judged(
            select_samples(self.samples, rows.tolist()),
            self.verdict.select(rows),
            self.rewards[rows],
            None if self.baselines is None else self.baselines[rows],
        )

    def placed(self, ends: Tensor) -> Tensor:
        """[R, T] float32 on the CPU: rewards where they were given.

        A score per completion stands on its last token, as does what shaping adds; a score per token stays where it
        is.

        Args:
            ends: [R, T] bool, True on the last token of each completion.
        """
        if self.verdict.token_scores is None:
            return torch.where(ends, self.rewards.unsqueeze(1), 0.0)
        placed = torch.zeros(ends.shape)
        for row, scores in enumerate(self.verdict.token_scores):
            placed[row, : len(scores)] = torch.tensor(scores)
        return placed + torch.where(ends, (self.rewards - self.scores).unsqueeze(1), 0.0)

    def parts(self) -> tuple[Tensor | None, tuple[float, ...]]:
        """[R, P] what each part of a combined reward gave, shaping as a part of its own, and the P weights."""
        if self.verdict.parts is None:
            return None, ()
        shaping = self.rewards - self.scores
        if not (shaping != 0).any():
            return self.verdict.parts, self.verdict.part_weights
        return torch.cat([self.verdict.parts, shaping.unsqueeze(1)], dim=1), (*self.verdict.part_weights, 1.0)


def concatenate_judged(rounds: Sequence[Judged], *, pad_id: int) -> Judged:
    """Several rounds under one another; what rewards reported is averaged."""
    if len(rounds) == 1:
        return rounds[0]
    baselines = [judged.baselines for judged in rounds if judged.baselines is not None]
    return Judged(
        samples=concatenate_samples([judged.samples for judged in rounds], pad_id=pad_id),
        verdict=Verdict.concatenate([judged.verdict for judged in rounds]),
        rewards=torch.cat([judged.rewards for judged in rounds]),
        baselines=torch.cat(baselines) if baselines else None,
    )


def last_position(mask: Tensor) -> Tensor:
    """[R, T] bool, True on the last unmasked position of each row: the end token, or where the limit cut.

    >>> last_position(torch.tensor([[True, True, False]]))
    tensor([[False,  True, False]])
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    return mask & (positions == torch.where(mask, positions, -1).amax(dim=1, keepdim=True))


def shape_scores(scores: Tensor, shaping: ShapingConfig, *, ended: Tensor, lengths: Tensor, limit: int) -> Tensor:
    """Turn a reward function's scores into rewards: clip, replace where the end is missing, punish length.

    Args:
        scores: [R].
        shaping: Which of these, in this order.
        ended: [R] bool, True where an end token came within the limit.
        lengths: [R] completion tokens.
        limit: The greatest completion length.

    Returns:
        [R]
    """
    if shaping.score_clip is not None:
        scores = scores.clamp(-shaping.score_clip, shaping.score_clip)
    if shaping.missing_end_score is not None:
        scores = missing_end_penalty(scores, ended, score=shaping.missing_end_score)
    scores = scores - shaping.missing_end_penalty * (~ended).float()
    if shaping.length_penalty > 0:
        scores = scores + length_penalty(lengths, per_token=shaping.length_penalty)
    if shaping.overlong_buffer is not None:
        scores = scores + soft_overlong(lengths, limit=limit, buffer=shaping.overlong_buffer)
    return scores


def rows_to_learn_from(ended: Tensor, groups: Tensor, *, grouped: bool) -> Tensor:
    """Rows that are left when completions cut at the limit drop out, and with them groups of which one row is left.

    >>> rows_to_learn_from(torch.tensor([True, False, True, True]), torch.tensor([0, 0, 1, 1]), grouped=True)
    tensor([2, 3])
    """
    kept = ended.clone()
    if grouped:
        sizes = torch.zeros(int(groups.max()) + 1, dtype=torch.int64).index_add_(0, groups, ended.long())
        kept &= sizes[groups] > 1
    return kept.nonzero().squeeze(1)


def telling_groups(rewards: Tensor, *, group_size: int, quota: int) -> tuple[Tensor, int]:
    """The first `quota` groups whose rewards differ, filled up with uniform ones where there are too few.

    Args:
        rewards: [N * group_size].
        group_size: Rows of a group, side by side.
        quota: Groups to return; N >= quota.

    Returns:
        Group numbers [quota] in ascending order, and how many of them are uniform.

    >>> telling_groups(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), group_size=2, quota=2)
    (tensor([0, 1]), 1)
    """
    uniform = uniform_groups(rewards, group_size)
    preferred = uniform.to(torch.int8).argsort(stable=True)[:quota]
    return preferred.sort().values, int(uniform[preferred].sum())
