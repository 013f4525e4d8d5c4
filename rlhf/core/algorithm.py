"""An algorithm is a row of settings: one typed union per axis, and validators across them.

`rlhf.core.presets.ALGORITHMS` holds the named rows. `estimate` reads the advantage and in-reward KL axes,
`Objective` the others, the learner `epochs` and `minibatches`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rlhf.config import Config
from rlhf.core.advantage_axis import (
    Advantages,
    BestOfGroup,
    Gae,
    GreedyBaseline,
    GroupRelative,
    GroupRelativeParts,
    LeaveOneOut,
    NStep,
    RewardsToGo,
    Standardize,
)
from rlhf.core.surrogate_axis import (
    Clipped,
    ClippedWeight,
    DualClipped,
    GeometricMean,
    PolicyGradient,
    ProbabilityMask,
    SoftGate,
    Surrogate,
    Unclipped,
)

__all__ = [
    "AdaptiveEntropy",
    "AdaptiveKl",
    "Advantages",
    "Aggregation",
    "AlgorithmConfig",
    "BestOfGroup",
    "Clipped",
    "ClippedValueLoss",
    "ClippedWeight",
    "DualClipped",
    "DualKl",
    "FixedKl",
    "FixedLength",
    "Gae",
    "GeometricMean",
    "GreedyBaseline",
    "GroupRelative",
    "GroupRelativeParts",
    "Imitation",
    "Kl",
    "KlCoefficientConfig",
    "KlInLoss",
    "KlInReward",
    "LeaveOneOut",
    "MaskedWeights",
    "NStep",
    "NoKl",
    "PolicyGradient",
    "ProbabilityMask",
    "ProportionalKl",
    "RewardsToGo",
    "RolloutCorrection",
    "SequenceMean",
    "SequenceSum",
    "SoftGate",
    "SquaredValueLoss",
    "Standardize",
    "Surrogate",
    "TokenMean",
    "TruncatedWeights",
    "Unclipped",
    "ValueLoss",
]


# --- KL -----------------------------------------------------------------------------------------------------------


class FixedKl(Config):
    """A constant coefficient."""

    type: Literal["fixed"] = "fixed"
    value: float = Field(default=0.05, ge=0)
    """The coefficient."""


class AdaptiveKl(Config):
    """Halved below target / 1.5, doubled above target x 1.5, once per policy update (PPO paper, section 4)."""

    type: Literal["adaptive"] = "adaptive"
    initial: float = Field(default=1.0, gt=0)
    """The coefficient before the first update."""
    target: float = Field(default=0.01, gt=0)
    unit: Literal["token", "sequence"] = "token"
    """Whether target is nats per action or nats per row (summed over its actions)."""


class ProportionalKl(Config):
    """coef x (1 + clip(KL / target - 1, +-0.2) x episodes / horizon) (Ziegler et al. 2019)."""

    type: Literal["proportional"] = "proportional"
    initial: float = Field(default=0.15, gt=0)
    """The coefficient before the first update."""
    target: float = Field(default=6.0, gt=0)
    horizon: float = Field(default=10_000, gt=0)
    """Episodes over which a persistent 10 % error changes the coefficient by 10 %."""
    unit: Literal["token", "sequence"] = "sequence"
    """Whether target is nats per action or nats per row (summed over its actions)."""


class DualKl(Config):
    """Lagrange multiplier: coef <- max(0, coef + learning_rate x (KL - target))."""

    type: Literal["dual"] = "dual"
    initial: float = Field(default=1.0, ge=0)
    """The coefficient before the first update."""
    target: float = Field(default=0.01, gt=0)
    learning_rate: float = Field(default=1.0, gt=0)
    unit: Literal["token", "sequence"] = "token"
    """Whether target is nats per action or nats per row (summed over its actions)."""


KlCoefficientConfig = Annotated[FixedKl | AdaptiveKl | ProportionalKl | DualKl, Field(discriminator="type")]


class NoKl(Config):
    """No KL term; no reference policy is kept."""

    type: Literal["none"] = "none"


class KlInReward(Config):
    """Each reward is lowered by coefficient x KL(policy || reference), estimated at collection."""

    type: Literal["in_reward"] = "in_reward"
    estimator: Literal["k1", "k2", "k3"] = "k1"
    """With d = log policy - log reference: k1 is d, k2 is d^2 / 2, k3 is exp(-d) - 1 + d."""
    coefficient: KlCoefficientConfig = FixedKl(value=0.05)


class KlInLoss(Config):
    """coefficient x KL is added to the loss."""

    type: Literal["in_loss"] = "in_loss"
    estimator: Literal["k1", "k2", "k3", "k3_straight_through", "k3_weighted"] = "k3"
    """Its gradient counts: k2's is that of KL(policy || reference), k3's of the reverse; see kl_estimate."""
    against: Literal["reference", "old_policy"] = "reference"
    """reference: KL(policy || reference), as in GRPO. old_policy: KL(old || policy), as in the PPO paper."""
    coefficient: KlCoefficientConfig = FixedKl(value=0.04)

    @model_validator(mode="after")
    def _refuse_estimators_without_meaning(self) -> Self:
        if self.against == "reference" and self.estimator == "k1":
            raise ValueError(
                "k1 in the loss has an expected gradient of 0; use k2, k3_straight_through or k3_weighted, "
                "or put k1 into the reward with type: in_reward"
            )
        if self.against == "old_policy" and self.estimator in ("k3_straight_through", "k3_weighted"):
            raise ValueError(
                f"{self.estimator} corrects KL(policy || reference); against the old policy, whose samples these "
                "are, k1 and k3 need no correction (and k2 is right to first order): use one of them"
            )
        return self


Kl = Annotated[NoKl | KlInReward | KlInLoss, Field(discriminator="type")]


# --- aggregation, value loss, rollout correction ----------------------------------------------------------------


class TokenMean(Config):
    """Every action counts the same."""

    type: Literal["token_mean"] = "token_mean"


class SequenceMean(Config):
    """Mean over each row's actions, then mean over rows."""

    type: Literal["sequence_mean"] = "sequence_mean"


class SequenceSum(Config):
    """Sum over each row's actions, then mean over rows."""

    type: Literal["sequence_sum"] = "sequence_sum"


class FixedLength(Config):
    """Sum over all actions, divided by rows x length (Dr. GRPO): no length bias."""

    type: Literal["fixed_length"] = "fixed_length"
    length: int | None = Field(default=None, ge=1)
    """The maximum completion length; recipes fill it in from their generation settings."""


Aggregation = Annotated[TokenMean | SequenceMean | SequenceSum | FixedLength, Field(discriminator="type")]


class SquaredValueLoss(Config):
    """1/2 (V - return)^2."""

    type: Literal["squared"] = "squared"
    coefficient: float = Field(default=0.5, ge=0)
    """Weight of the value loss beside the policy loss."""


class ClippedValueLoss(Config):
    """1/2 max((V - return)^2, (V_old + clip(V - V_old, +-clip_range) - return)^2)."""

    type: Literal["clipped"] = "clipped"
    coefficient: float = Field(default=0.5, ge=0)
    """Weight of the value loss beside the policy loss."""
    clip_range: float = Field(default=0.2, gt=0)


ValueLoss = Annotated[SquaredValueLoss | ClippedValueLoss, Field(discriminator="type")]


class TruncatedWeights(Config):
    """Multiply each action's loss by min(pi_old / mu, cap), mu being the generation engine."""

    type: Literal["truncated"] = "truncated"
    cap: float = Field(default=2.0, gt=0)
    level: Literal["token", "sequence"] = "token"
    """One weight per action, or one per row: the product over its actions."""


class MaskedWeights(Config):
    """Multiply by pi_old / mu where it lies in [low, high], by 0 elsewhere (IcePop; at sequence level, MIS)."""

    type: Literal["masked"] = "masked"
    low: float = Field(default=0.5, ge=0)
    high: float = Field(default=5.0, gt=0)
    level: Literal["token", "sequence", "sequence_geometric_mean"] = "token"

    @model_validator(mode="after")
    def _refuse_bands_without_one(self) -> Self:
        if not self.low <= 1 <= self.high:
            raise ValueError(
                f"the band [{self.low}, {self.high}] would drop actions on which engine and trainer agree; "
                "choose low <= 1 <= high"
            )
        return self


RolloutCorrection = Annotated[TruncatedWeights | MaskedWeights, Field(discriminator="type")]


class AdaptiveEntropy(Config):
    """A coefficient of the entropy bonus that rises while the entropy is below its target, and falls above it.

    It acts only while the entropy is at or below the target. Source: Skywork-OR1, https://arxiv.org/abs/2505.22312.
    """

    target: float = Field(gt=0)
    """Nats per action."""
    step: float = Field(default=0.005, gt=0)
    """Added, or taken away, once per policy update."""


class Imitation(Config):
    """Adds coefficient x the mean of -log pi over the rows that succeeded: the policy learns its own good answers.

    Averaged as the surrogate is, over these rows alone. Source: VAPO, https://arxiv.org/abs/2504.05118, equations 8
    and 9, where rows are answers that the verifier accepts, and the coefficient is .1.
    """

    coefficient: float = Field(default=0.1, gt=0)
    above: float = 0.0
    """Rows whose score, the sum of their rewards without any KL penalty, exceeds this count as successes."""


# --- the row ------------------------------------------------------------------------------------------------------


class AlgorithmConfig(Config):
    """One policy-optimization algorithm, complete."""

    advantages: Advantages
    ratio: Literal["token", "sequence_geometric_mean", "sequence_geometric_mean_token", "sequence_product"] = "token"
    """Importance ratio to the policy that collected: per action, or one per row; sequence_geometric_mean_token has the
    row's value and each action's own gradient (GSPO-token)."""
    surrogate: Surrogate = Clipped()
    kl: Kl = NoKl()
    aggregation: Aggregation = TokenMean()
    value_loss: ValueLoss | None = None
    """None trains no critic."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Entropy bonus per action, aggregated as the surrogate is."""
    adaptive_entropy: AdaptiveEntropy | None = None
    """Steers the coefficient, from entropy_coef on, towards a target entropy; null keeps it as it is."""
    imitation: Imitation | None = None
    """A likelihood loss on the rollout's successes beside the policy loss; null: off."""
    rollout_correction: RolloutCorrection | None = None
    """Importance weights against sampling_log_probs; None trusts the engine."""
    off_policy_threshold: float | None = Field(default=None, ge=0)
    """Leave out rows of negative advantage whose mean log(behaviour / policy) exceeds this, in nats (OPSM of
    DeepSeek-V3.2); behaviour is the generation engine where it reports log-probs. null keeps all."""
    whiten_rewards: bool = False
    """Scale rewards, KL penalty included, to standard deviation 1 over all actions of the rollout; the mean is kept."""
    advantage_clip: float | None = Field(default=None, gt=0)
    """Clip advantages, after any standardization, to [-advantage_clip, advantage_clip]; null: off."""
    discounted_state_weight: bool = False
    """Weigh the action at step t of its episode by discount^t, as the policy gradient theorem has it and hardly any
    library does; needs rows that begin with their episodes."""
    epochs: int = Field(default=1, ge=1)
    """Passes over one rollout."""
    minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per pass."""

    @model_validator(mode="after")
    def _refuse_combinations_without_meaning(self) -> Self:
        if self.wants_values and self.value_loss is None:
            raise ValueError(
                f"advantages {self.advantages.type!r} need a critic that nothing trains; set value_loss: "
                "{type: squared}, or use rewards_to_go, group_relative or leave_one_out"
            )
        if self.value_loss is not None and not self.wants_values:
            raise ValueError(
                f"advantages {self.advantages.type!r} use no critic, so value_loss trains one for nothing; "
                "set value_loss: null, or use gae, n_step, or rewards_to_go with baseline: value"
            )
        if isinstance(self.surrogate, PolicyGradient) and self.ratio != "token":
            raise ValueError("policy_gradient ignores the ratio; remove `ratio`, or use a clipped surrogate")
        ratio_is_differentiated = isinstance(self.surrogate, Unclipped | Clipped | DualClipped)
        if self.ratio == "sequence_product" and ratio_is_differentiated and self.aggregation.type != "sequence_mean":
            raise ValueError(
                f"with ratio: sequence_product, whose one value per row stands at each of its actions, "
                f"{self.aggregation.type} would weigh a row by its length; use aggregation: sequence_mean"
            )
        if isinstance(self.kl, KlInReward) and isinstance(self.kl.coefficient, DualKl) and self.needs_groups:
            raise ValueError("a dual KL coefficient inside group rewards has no fixed point; use fixed or proportional")
        return self

    @model_validator(mode="after")
    def _refuse_members_that_do_not_fit(self) -> Self:
        if isinstance(self.surrogate, ProbabilityMask | GeometricMean | SoftGate) and self.ratio != "token":
            raise ValueError(f"{self.surrogate.type} is defined on the ratio of each action; use ratio: token")
        if isinstance(self.surrogate, GeometricMean) and self.aggregation.type != "sequence_mean":
            raise ValueError(
                f"geometric_mean has one value per row, which stands at each of its actions; {self.aggregation.type} "
                "would weigh a row by its length; use aggregation: sequence_mean"
            )
        if isinstance(self.advantages, GroupRelativeParts) and isinstance(self.kl, KlInReward):
            raise ValueError(
                "group_relative_parts compares the parts of the reward, so a KL in the reward would not be seen; use "
                "kl: {type: in_loss}"
            )
        if self.whiten_rewards and (self.needs_groups or isinstance(self.advantages, GreedyBaseline)):
            raise ValueError(
                f"advantages {self.advantages.type!r} sum the rewards of a row, and whitening gives every action a "
                "part of the mean, so that length would count; remove whiten_rewards"
            )
        if self.discounted_state_weight and not isinstance(self.advantages, Gae | RewardsToGo | NStep):
            raise ValueError(
                f"advantages {self.advantages.type!r} have no discount; remove discounted_state_weight, or use gae, "
                "n_step or rewards_to_go"
            )
        return self

    @property
    def wants_values(self) -> bool:
        """Whether advantages are computed from a critic."""
        match self.advantages:
            case Gae() | NStep():
                return True
            case RewardsToGo(baseline=baseline):
                return baseline == "value"
            case _:
                return False

    @property
    def needs_critic(self) -> bool:
        """Whether the policy must predict values."""
        return self.value_loss is not None

    @property
    def needs_old_log_probs(self) -> bool:
        """Whether the log-probs under the policy that collected must be known before the first step's own forward.

        Where one step is made of a rollout, they are that forward's.
        """
        first = isinstance(self.kl, KlInReward) or self.rollout_correction is not None
        return first or self.epochs > 1 or self.minibatches > 1

    @property
    def needs_groups(self) -> bool:
        """Whether rows must come in groups of at least two."""
        return isinstance(self.advantages, GroupRelative | GroupRelativeParts | LeaveOneOut | BestOfGroup)

    @property
    def language_only(self) -> str | None:
        """What only language models have and this algorithm needs, in words; None where gymnasium will do."""
        match self.advantages:
            case GreedyBaseline():
                return "the score of a greedy completion of the same prompt"
            case GroupRelativeParts():
                return "a reward made of several parts"
            case _:
                return None if self.rollout_correction is None else "the log-probs of a generation engine"

    @property
    def needs_reference(self) -> bool:
        """Whether the rollout must carry ref_log_probs."""
        return isinstance(self.kl, KlInReward) or (isinstance(self.kl, KlInLoss) and self.kl.against == "reference")

    def with_length(self, length: int) -> Self:
        """Fill in the length of a `fixed_length` aggregation that has none; otherwise unchanged."""
        if isinstance(self.aggregation, FixedLength) and self.aggregation.length is None:
            return self.model_copy(update={"aggregation": FixedLength(length=length)})
        return self
