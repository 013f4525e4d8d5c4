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

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        """Score completions; see the class's docstring.

        Raises:
            RewardError: A part fails; the error names it.
        """
        completion_ids = columns.pop("completion_ids", None)
        extras = {name: columns.pop(name) for name in ("trainer_state",) if name in columns}
        outer_metric, outer_extra = columns.pop("log_metric", None), columns.pop("log_extra", None)
        self.last_log = RewardLog()
        self.last_scores = {
            str(part.name): score_completions(
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
            for part in self.parts
        }
        self._pass_on(outer_metric, outer_extra)
        combined = self._combine(len(completions)).tolist()
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
        gates, rewards, penalties = torch.ones(number), torch.zeros(number), torch.zeros(number)
        applies = torch.zeros(number, dtype=torch.bool)
        for part in self.parts:
            scores = self.last_scores[str(part.name)]
            if part.role == "gate":
                gates *= scores.nan_to_num(nan=1.0)
                continue
            applies |= ~scores.isnan()
            weighted = part.weight * scores.nan_to_num(nan=0.0)
            if part.role == "reward":
                rewards += weighted
            else:
                penalties += weighted
        return torch.where(applies, gates * rewards + penalties, torch.nan)

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
