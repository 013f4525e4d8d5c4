"""Several rewards as one: a weighted sum, behind gates, plus penalties.

score = (product of gates) x (sum of weight x reward) + (sum of weight x penalty)

Format rewards belong into gates, not into the sum. With group-relative advantages a completion that earns only the
format point gets, in a group where nobody is right, the same advantage as a correct answer in another group
(open-instruct #659); behind a gate the format earns nothing by itself. Penalties, which are negative, stand outside:
inside, a closed gate would turn a bad score into a better one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.errors import RewardError
from rlhf.rewards.protocol import RewardLog, Text, reward_name, score_completions

Role = Literal["reward", "gate", "penalty"]


@dataclass(frozen=True, slots=True)
class RewardPart:
    """One reward of a combination."""

    reward: Callable[..., Any]
    weight: float = 1.0
    """Factor of a reward or penalty; gates have none."""
    role: Role = "reward"
    name: str | None = None
    """For the metrics; None takes the function's own."""


class CombinedReward:
    """A reward function made of parts; None from a part leaves that part out for that completion, as in TRL.

    Args:
        parts: Pairs `(reward, weight)` or `RewardPart`s.

    Raises:
        RewardError: No part with the role "reward" or "penalty", a weight that is not finite, or a weighted gate.

    Example:
        >>> def short(completions, **columns): return [1.0 / len(text) for text in completions]
        >>> def polite(completions, **columns): return [float("please" in text) for text in completions]
        >>> combined = CombinedReward([(short, 2.0), (polite, 0.5)])
        >>> combined(prompts=["", ""], completions=["plea", "please??"])
        [0.5, 0.75]
    """

    def __init__(self, parts: Sequence[RewardPart | tuple[Callable[..., Any], float]]) -> None:
        self.parts = _name_parts([part if isinstance(part, RewardPart) else RewardPart(*part) for part in parts])
        self.__name__ = "combined_reward"
        self.last_scores: dict[str, Tensor] = {}
        """Of the last call: part -> [N] float32 before weighting, NaN where the part returned None."""
        self.last_log = RewardLog()
        """Of the last call: what the parts logged themselves."""
        self._token_scores: dict[str, list[list[float]]] = {}

    def __call__(
        self, prompts: list[Text], completions: list[Text], **columns: Any
    ) -> list[float | None] | list[list[float]]:
        """Score completions; see the class's docstring.

        Raises:
            RewardError: A part fails; the error names it.
        """
        completion_ids = columns.pop("completion_ids", None)
        extras = {name: columns.pop(name) for name in ("trainer_state",) if name in columns}
        outer_metric, outer_extra = columns.pop("log_metric", None), columns.pop("log_extra", None)
        self.last_log = RewardLog()
        self.last_scores, self._token_scores = {}, {}
        for part in self.parts:
            self.last_scores[str(part.name)] = score_completions(
                part.reward,
                prompts=prompts,
                completions=completions,
                columns=columns,
                completion_ids=completion_ids,
                name=part.name,
                log=self.last_log,
                extras=extras,
                allow_missing=True,
            )
            if self.last_log.token_scores is not None:
                self._token_scores[str(part.name)] = self.last_log.token_scores
        self._pass_on(outer_metric, outer_extra)
        combined = self._combine(len(completions)).tolist()
        if self._token_scores:
            return self._spread(combined)
        return [None if math.isnan(score) else score for score in combined]

    def metrics(self) -> dict[str, float]:
        """Return the mean, standard deviation and share of missing scores of each part in the last call."""
        metrics: dict[str, float] = {}
        for name, scores in self.last_scores.items():
            given = scores[~scores.isnan()]
            metrics[f"reward/{name}_mean"] = given.mean().item() if len(given) else math.nan
            metrics[f"reward/{name}_std"] = given.std(correction=0).item() if len(given) else math.nan
            if len(given) < len(scores):
                metrics[f"reward/{name}_missing"] = 1 - len(given) / len(scores)
        for name, values in self.last_log.metrics.items():
            metrics[f"reward/{name}"] = sum(values) / len(values)
        return metrics

    def _combine(self, number: int) -> Tensor:
        """[N] float32; NaN where no reward and no penalty applies."""
        gates, rewards, penalties = self._gates(number), torch.zeros(number), torch.zeros(number)
        applies = torch.zeros(number, dtype=torch.bool)
        for part in self.parts:
            scores = self.last_scores[str(part.name)]
            if part.role == "gate":
                continue
            applies |= ~scores.isnan()
            weighted = part.weight * scores.nan_to_num(nan=0.0)
            if part.role == "reward":
                rewards += weighted
            else:
                penalties += weighted
        return torch.where(applies, gates * rewards + penalties, torch.nan)

    def part_scores(self) -> tuple[Tensor, tuple[float, ...]]:
        """What the parts gave in the last call, each by itself, for advantages that compare them apart (GDPO).

        Returns:
            [N, P] of the rewards, behind the gates, and of the penalties, before weighting, NaN where a part does not
            apply; and their P weights.
        """
        number = len(next(iter(self.last_scores.values())))
        gates = self._gates(number)
        columns, weights = [], []
        for part in self.parts:
            if part.role != "gate":
                scores = self.last_scores[str(part.name)]
                columns.append(gates * scores if part.role == "reward" else scores)
                weights.append(part.weight)
        return torch.stack(columns, dim=1), tuple(weights)

    def _gates(self, number: int) -> Tensor:
        """[N] product of the gates."""
        gates = torch.ones(number)
        for part in self.parts:
            if part.role == "gate":
                gates *= self.last_scores[str(part.name)].nan_to_num(nan=1.0)
        return gates

    def _spread(self, combined: list[float]) -> list[list[float]]:
        """Rewards per token: those of the parts that give them, and the others' on each completion's last token."""
        gates = self._gates(len(combined))
        rows = [[0.0] * len(row) for row in next(iter(self._token_scores.values()))]
        for part in self.parts:
            if str(part.name) not in self._token_scores:
                continue
            if part.role == "gate":
                raise RewardError("a gate gave rewards per token", where=str(part.name), remedy="Make it a reward.")
            for row, scores, gate in zip(rows, self._token_scores[str(part.name)], gates.tolist(), strict=True):
                factor = part.weight * (gate if part.role == "reward" else 1.0)
                for position, score in enumerate(scores):
                    row[position] += factor * score
        for row, total in zip(rows, combined, strict=True):
            row[-1] += total - math.fsum(row)
        return rows

    def _pass_on(self, log_metric: Callable[..., None] | None, log_extra: Callable[..., None] | None) -> None:
        """Report to an outer log as well, which a combination inside a combination has."""
        if log_metric is not None:
            for name, values in self.last_log.metrics.items():
                for value in values:
                    log_metric(name, value)
        if log_extra is not None:
            for column, values in self.last_log.columns.items():
                log_extra(column, values)


def _name_parts(parts: list[RewardPart]) -> list[RewardPart]:
    if not any(part.role != "gate" for part in parts):
        raise RewardError("a combination needs at least one reward; gates alone give no score")
    named: list[RewardPart] = []
    taken: set[str] = set()
    for part in parts:
        if not callable(part.reward):
            raise RewardError("a part is no function", got=part.reward, remedy="`load_reward` finds one by its name.")
        base = part.name or reward_name(part.reward)
        if not math.isfinite(part.weight):
            raise RewardError("a weight is not finite", where=base, got=part.weight)
        if part.role == "gate" and part.weight != 1.0:
            raise RewardError(
                "a gate has no weight", where=base, got=part.weight, remedy="Weigh the rewards behind it."
            )
        name, count = base, 1
        while name in taken:
            count += 1
            name = f"{base}_{count}"
        taken.add(name)
        named.append(RewardPart(part.reward, part.weight, part.role, name))
    return named
