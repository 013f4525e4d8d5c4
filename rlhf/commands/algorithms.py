"""The table of algorithms in words, made from the code, so that the documentation cannot say something else.

`python -m rlhf.commands.algorithms` prints the table that stands in the README; a test compares the two.
"""

from __future__ import annotations

from typing import assert_never

from rlhf.core.algorithm import (
    AdaptiveKl,
    AlgorithmConfig,
    BestOfGroup,
    Clipped,
    ClippedWeight,
    DualClipped,
    DualKl,
    FixedKl,
    Gae,
    GeometricMean,
    GreedyBaseline,
    GroupRelative,
    GroupRelativeParts,
    KlInLoss,
    KlInReward,
    LeaveOneOut,
    NoKl,
    NStep,
    PolicyGradient,
    ProbabilityMask,
    ProportionalKl,
    RewardsToGo,
    SoftGate,
    Unclipped,
)
from rlhf.core.presets import ALGORITHMS
from rlhf.markdown import markdown_table

HEADER = ("preset", "advantages", "ratio and surrogate", "KL", "aggregation", "critic", "epochs x minibatches")
RATIOS = {
    "token": "token",
    "sequence_geometric_mean": "sequence geometric mean",
    "sequence_geometric_mean_token": "the sequence's ratio, each action's gradient",
    "sequence_product": "sequence product",
}
STANDARDIZED = {"none": "", "minibatch": ", standardized per minibatch", "batch": ", standardized over the rollout"}


def algorithm_table() -> str:
    """Every row of `ALGORITHMS` as markdown."""
    return markdown_table(HEADER, [describe_preset(name, row) for name, row in ALGORITHMS.items()])


def describe_preset(name: str, row: AlgorithmConfig) -> list[str]:
    """One preset in the seven columns of `HEADER`.

    >>> describe_preset("grpo", ALGORITHMS["grpo"])[1:4]
    ['group relative, std', 'token, clip .2/.2', 'in the loss, k3, .04']
    """
    critic = "-" if row.value_loss is None else f"{row.value_loss.type}, weight {number(row.value_loss.coefficient)}"
    return [
        f"`{name}`" + (" (language models only)" if row.language_only else ""),
        describe_advantages(row),
        describe_surrogate(row),
        describe_kl(row),
        row.aggregation.type.replace("_", " "),
        critic,
        f"{row.epochs} x {row.minibatches}",
    ]


def describe_advantages(row: AlgorithmConfig) -> str:
    """The advantage axis in words."""
    axis = row.advantages
    match axis:
        case Gae():
            told = f"GAE {number(axis.discount)}/{number(axis.gae_lambda)}"
            if axis.length_adaptive is not None:
                told = f"GAE {number(axis.discount)}, lambda by length ({number(axis.length_adaptive)})"
            if axis.critic_lambda is not None:
                told += f", critic's lambda {number(axis.critic_lambda)}"
            return told + STANDARDIZED[axis.standardize]
        case RewardsToGo():
            baseline = ", minus value" if axis.baseline == "value" else ""
            return f"rewards to go, discount {number(axis.discount)}{baseline}{STANDARDIZED[axis.standardize]}"
        case NStep():
            return f"{axis.n} steps, discount {number(axis.discount)}{STANDARDIZED[axis.standardize]}"
        case GroupRelative():
            return _describe_group(axis)
        case GroupRelativeParts():
            return "each reward scaled in its group, then summed"
        case LeaveOneOut():
            return "leave one out"
        case BestOfGroup():
            return "best of group minus second"
        case GreedyBaseline():
            return "reward minus the greedy answer's"
        case _:
            assert_never(axis)


def _describe_group(axis: GroupRelative) -> str:
    baseline = "length-weighted baseline" if axis.baseline == "length_weighted" else "group relative"
    scales = {
        "sample_std": ", std",
        "population_std": ", population std",
        "batch_std": ", std of the rollout",
        "mean": ", divided by the mean",
        "none": ", no std",
    }
    return baseline + scales[axis.scale] + STANDARDIZED[axis.standardize]


def describe_surrogate(row: AlgorithmConfig) -> str:
    """The ratio and surrogate axes in words, with the rollout correction."""
    axis = row.surrogate
    match axis:
        case PolicyGradient():
            return "policy gradient"
        case Unclipped():
            told = f"{RATIOS[row.ratio]}, unclipped"
        case Clipped():
            told = f"{RATIOS[row.ratio]}, clip {number(axis.clip_low)}/{number(axis.clip_high)}"
        case DualClipped():
            clip = f"{number(axis.clip_low)}/{number(axis.clip_high)}"
            told = f"{RATIOS[row.ratio]}, clip {clip}, bound {number(axis.bound)}"
        case ClippedWeight():
            told = f"detached {RATIOS[row.ratio]} weight, cap {number(1 + axis.clip_high)}"
        case GeometricMean():
            told = f"geometric mean of clipped ratios, {number(axis.clip_low)}/{number(axis.clip_high)} nats"
        case ProbabilityMask():
            told = f"{RATIOS[row.ratio]}, masked where the probability moved by {number(axis.limit)}"
        case SoftGate():
            gate = f"{number(axis.temperature_positive)}/{number(axis.temperature_negative)}"
            told = f"{RATIOS[row.ratio]}, soft gate {gate}"
        case _:
            assert_never(axis)
    correction = row.rollout_correction
    return told if correction is None else f"{told}, times the {correction.type} weight to the engine"


def describe_kl(row: AlgorithmConfig) -> str:
    """The KL axis in words."""
    axis = row.kl
    match axis:
        case NoKl():
            return "-"
        case KlInReward():
            return f"in the reward, {axis.estimator}, {_describe_coefficient(axis)}"
        case KlInLoss():
            against = ", to the old policy" if axis.against == "old_policy" else ""
            return f"in the loss, {axis.estimator}{against}, {_describe_coefficient(axis)}"
        case _:
            assert_never(axis)


def _describe_coefficient(axis: KlInReward | KlInLoss) -> str:
    coefficient = axis.coefficient
    match coefficient:
        case FixedKl():
            return number(coefficient.value)
        case AdaptiveKl():
            return "adaptive"
        case ProportionalKl():
            return "proportional"
        case DualKl():
            return "dual"
        case _:
            assert_never(coefficient)


def number(value: float) -> str:
    """A number as tables have it.

    >>> number(0.28), number(1.0), number(3e-4)
    ('.28', '1', '3e-4')
    """
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:g}".removeprefix("0") or "0"


if __name__ == "__main__":
    print(algorithm_table())
