"""The settings of the advantage axis: how credit is assigned. The formulas are in `rlhf.core.advantages`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf.config import Config

Standardize = Literal["none", "minibatch", "batch"]


class Gae(Config):
    """Generalized advantage estimation; needs a critic."""

    type: Literal["gae"] = "gae"
    discount: float = Field(default=0.99, ge=0, le=1)
    """gamma, per action."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """lambda; 0 is the one-step TD error, 1 is discounted return minus value."""
    length_adaptive: float | None = Field(default=None, gt=0)
    """alpha of VAPO: a row of l actions has the lambda 1 - 1 / (alpha x l), in place of gae_lambda; null: off. VAPO's
    .05 is for answers of thousands of tokens: below 1 / alpha actions lambda is 0, and only the critic tells them."""
    critic_lambda: float | None = Field(default=None, ge=0, le=1)
    """lambda of the critic's returns, 1 in VC-PPO and VAPO; null takes the advantages' own."""
    standardize: Standardize = "none"
    """Mean 0, std 1 over each minibatch, or over the whole rollout of all processes."""


class RewardsToGo(Config):
    """Discounted rewards to go (REINFORCE), optionally minus the critic's value as baseline."""

    type: Literal["rewards_to_go"] = "rewards_to_go"
    discount: float = Field(default=0.99, ge=0, le=1)
    """gamma, per action."""
    baseline: Literal["none", "value"] = "none"
    standardize: Standardize = "none"


class NStep(Config):
    """n-step bootstrapped return minus value; needs a critic."""

    type: Literal["n_step"] = "n_step"
    n: int = Field(default=5, ge=1)
    discount: float = Field(default=0.99, ge=0, le=1)
    """gamma, per action."""
    standardize: Standardize = "none"


class GroupRelative(Config):
    """Score minus its group's mean, divided by a standard deviation (GRPO), or by the mean (MaxRL)."""

    type: Literal["group_relative"] = "group_relative"
    baseline: Literal["mean", "length_weighted"] = "mean"
    """mean of the group's scores, or their mean weighted by the rows' lengths (OPO)."""
    scale: Literal["sample_std", "population_std", "batch_std", "mean", "none"] = "sample_std"
    """What divides the centred score; batch_std is the standard deviation over all scores of the rollout, mean the
    group's mean score."""
    epsilon: float = Field(default=1e-4, ge=0)
    """Added to what divides."""
    standardize: Literal["none", "batch"] = "none"
    """batch: mean 0, std 1 over all actions of the rollout besides (REINFORCE++-baseline)."""

    @model_validator(mode="after")
    def _refuse_a_scale_around_another_mean(self) -> Self:
        if self.baseline == "length_weighted" and self.scale != "none":
            raise ValueError(
                "the length-weighted baseline is derived for scores that are not scaled; set scale: none, or "
                "baseline: mean"
            )
        return self


class GroupRelativeParts(Config):
    """Each reward of a combination centred and scaled in its group by itself, then summed (GDPO).

    The sum over the parts, weighted as the rewards are, is then brought to mean 0 and standard deviation 1 over the
    rollout. Needs a reward of several parts, so it exists for language models only.
    """

    type: Literal["group_relative_parts"] = "group_relative_parts"
    epsilon: float = Field(default=1e-4, ge=0)
    """Added to every standard deviation."""


class LeaveOneOut(Config):
    """Score minus the mean of the other scores in its group (RLOO)."""

    type: Literal["leave_one_out"] = "leave_one_out"


class BestOfGroup(Config):
    """The group's best row gets its lead over the second best, all others 0 (pass@k, max@k)."""

    type: Literal["best_of_group"] = "best_of_group"


class GreedyBaseline(Config):
    """Rewards to go, minus the score of the greedy answer to the same prompt (ReMax).

    Needs a greedy completion beside each sampled one, so it exists for language models only.
    """

    type: Literal["greedy_baseline"] = "greedy_baseline"


Advantages = Annotated[
    Gae | RewardsToGo | NStep | GroupRelative | GroupRelativeParts | LeaveOneOut | BestOfGroup | GreedyBaseline,
    Field(discriminator="type"),
]
