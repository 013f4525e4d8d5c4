"""Several reward models as one reward: their mean, the worst case, or the mean less their disagreement.

Where reward models of different seeds disagree, the policy has left what they were trained on, and a high score of one
of them is likely an error that optimization found. The worst case and the variance penalty take away what it gains.
Source: Coste et al. 2023, "Reward model ensembles help mitigate overoptimization" (arXiv 2310.02743, section 3).
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, assert_never

import torch
from torch import Tensor

from reward_models.scorer import RewardModelScorer
from rlhf.data.records import Text
from rlhf.errors import RewardError
from rlhf.rewards.protocol import score_completions

Combine = Literal["mean", "worst_case", "mean_minus_variance"]


def combine_scores(scores: Tensor, *, combine: Combine, coefficient: float = 0.1) -> Tensor:
    r"""Combine the scores of k members.

    mean: 1/k sum_i r_i. worst_case: min_i r_i. mean_minus_variance: mean - coefficient x 1/k sum_i (r_i - mean)^2.
    Source: Coste et al. 2023 (arXiv 2310.02743, equations 2 to 4).

    Args:
        scores: [k, N], on one scale (each member normalised on the same completions).
        combine: How.
        coefficient: Of the variance; the others do not read it.

    Returns:
        [N].

    >>> combine_scores(torch.tensor([[1.0], [3.0]]), combine="mean_minus_variance", coefficient=0.5)  # 2 - 0.5 x 1
    tensor([1.5000])
    """
    match combine:
        case "mean":
            return scores.mean(dim=0)
        case "worst_case":
            return scores.amin(dim=0)
        case "mean_minus_variance":
            return scores.mean(dim=0) - coefficient * scores.var(dim=0, correction=0)
        case _:
            assert_never(combine)


class EnsembleScorer:
    """An ensemble as a reward function; it logs each member's mean score and how much the members disagree.

    In a config: `function: reward_models:EnsembleScorer.from_pretrained`, `arguments: {folders:
    runs/reward_model/default/seed_*/reward_model, combine: worst_case}`.

    Args:
        members: Two reward functions or more on one scale; `rlhf run reward_model --seeds 0,1,2` trains reward models
            that differ by the seed of their head and of their data's order, each normalised.
        combine: mean, worst_case or mean_minus_variance (see `combine_scores`).
        coefficient: Of the variance.

    Raises:
        RewardError: Fewer than two members, or a coefficient that is negative.
    """

    def __init__(
        self, members: Sequence[Callable[..., Any]], *, combine: Combine = "mean", coefficient: float = 0.1
    ) -> None:
        if len(members) < 2:
            raise RewardError("an ensemble needs two members or more", where="EnsembleScorer", got=len(members))
        if combine not in ("mean", "worst_case", "mean_minus_variance"):
            expected = "mean, worst_case or mean_minus_variance"
            raise RewardError("unknown way to combine", where="EnsembleScorer", got=combine, expected=expected)
        if coefficient < 0:
            raise RewardError("a negative coefficient rewards disagreement", where="EnsembleScorer", got=coefficient)
        self.members = list(members)
        self.combine: Combine = combine
        self.coefficient = coefficient
        self.last_scores = torch.zeros(len(members), 0)
        """[k, N] of the last call."""
        self.__name__ = "ensemble"

    @classmethod
    def from_pretrained(
        cls, folders: str | Sequence[str], *, combine: Combine = "mean", coefficient: float = 0.1, **settings: Any
    ) -> Self:
        """Open reward models.

        Args:
            folders: Their folders, or one pattern such as `runs/reward_model/default/seed_*/reward_model`.
            combine: See the class.
            coefficient: See the class.
            **settings: For `RewardModelScorer.from_pretrained`: device, dtype, batch_tokens.

        Raises:
            RewardError: The pattern matches fewer than two folders.
            ModelError: One is no reward model.
        """
        found = sorted(glob.glob(folders)) if isinstance(folders, str) else list(folders)
        if len(found) < 2:
            raise RewardError(
                "an ensemble needs two reward models or more",
                where=str(folders),
                got=f"{len(found)} folders",
                remedy="Train them with `rlhf run reward_model --seeds 0,1,2`.",
            )
        members = [RewardModelScorer.from_pretrained(folder, **settings) for folder in found]
        return cls(members, combine=combine, coefficient=coefficient)

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Score completions.

        Args:
            prompts: N prompts.
            completions: N completions.
            log_metric: Gets `ensemble_member_<i>` (its mean score) and `ensemble_disagreement` (the members' standard
                deviation, averaged over completions).
            columns: Passed on to the members.

        Returns:
            N scores.

        Raises:
            RewardError: A member fails; the error names it.
        """
        if not completions:
            return []
        self.last_scores = torch.stack(
            [
                score_completions(
                    member, prompts=prompts, completions=completions, columns=columns, name=f"ensemble_member_{index}"
                )
                for index, member in enumerate(self.members)
            ]
        )
        if log_metric is not None:
            for index, scores in enumerate(self.last_scores):
                log_metric(f"ensemble_member_{index}", scores.mean().item())
            log_metric("ensemble_disagreement", self.last_scores.std(dim=0, correction=0).mean().item())
        return combine_scores(self.last_scores, combine=self.combine, coefficient=self.coefficient).tolist()
