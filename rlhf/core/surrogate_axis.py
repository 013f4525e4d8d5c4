"""The settings of the surrogate axis: what is maximised per action. The formulas are in `rlhf.core.surrogates`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf.config import Config


class PolicyGradient(Config):
    """log pi x A: the plain policy gradient; the ratio is not used."""

    type: Literal["policy_gradient"] = "policy_gradient"


class Unclipped(Config):
    """ratio x A (conservative policy iteration; the PPO paper's row 'no clipping or penalty')."""

    type: Literal["unclipped"] = "unclipped"


class Clipped(Config):
    """min(ratio x A, clip(ratio, 1 - clip_low, 1 + clip_high) x A)."""

    type: Literal["clipped"] = "clipped"
    clip_low: float = Field(default=0.2, ge=0, le=1)
    clip_high: float = Field(default=0.2, ge=0)


class DualClipped(Config):
    """The clipped surrogate, bounded below by bound x A where A < 0."""

    type: Literal["dual_clipped"] = "dual_clipped"
    clip_low: float = Field(default=0.2, ge=0, le=1)
    """The ratio gains nothing below 1 - clip_low."""
    clip_high: float = Field(default=0.2, ge=0)
    """The ratio gains nothing above 1 + clip_high."""
    bound: float = Field(default=3.0, gt=1)

    @model_validator(mode="after")
    def _refuse_bounds_inside_the_clip_range(self) -> Self:
        if self.bound <= 1 + self.clip_high:
            raise ValueError(f"bound {self.bound} must lie above 1 + clip_high = {1 + self.clip_high}; raise bound")
        return self


class ClippedWeight(Config):
    """stop_gradient(min(ratio, 1 + clip_high)) x A x log pi (CISPO); there is no lower bound."""

    type: Literal["clipped_weight"] = "clipped_weight"
    clip_high: float = Field(default=4.0, ge=0)
    """The weight's cap is 1 + clip_high; 4 gives ScaleRL's cap of 5."""


class GeometricMean(Config):
    """exp(mean over the row of the log-ratio, clipped on the side that gains) x A (GMPO)."""

    type: Literal["geometric_mean"] = "geometric_mean"
    clip_low: float = Field(default=0.4, ge=0)
    """Log-ratios gain nothing below -clip_low: nats, not a share."""
    clip_high: float = Field(default=0.4, ge=0)
    """Log-ratios gain nothing above clip_high."""


class ProbabilityMask(Config):
    """ratio x A, but 0 where the action's probability has moved by more than `limit` in A's direction (DPPO)."""

    type: Literal["probability_mask"] = "probability_mask"
    limit: float = Field(default=0.2, gt=0, lt=1)
    """Difference of probabilities, the total variation of 'this action or another'."""


class SoftGate(Config):
    """4 / tau x sigmoid(tau x (ratio - 1)) x A: the gradient fades with the distance instead of ending (SAPO)."""

    type: Literal["soft_gate"] = "soft_gate"
    temperature_positive: float = Field(default=1.0, gt=0)
    """tau where A > 0."""
    temperature_negative: float = Field(default=1.05, gt=0)
    """tau elsewhere; larger, because pushing an action down raises all others at once."""


Surrogate = Annotated[
    PolicyGradient | Unclipped | Clipped | DualClipped | ClippedWeight | GeometricMean | ProbabilityMask | SoftGate,
    Field(discriminator="type"),
]
