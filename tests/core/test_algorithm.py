from __future__ import annotations

import pytest
from pydantic import ValidationError

from rlhf.core.algorithm import (
    AdaptiveKl,
    AlgorithmConfig,
    Clipped,
    ClippedWeight,
    DualClipped,
    DualKl,
    FixedLength,
    Gae,
    GroupRelative,
    KlInLoss,
    KlInReward,
    LeaveOneOut,
    MaskedWeights,
    NStep,
    PolicyGradient,
    ProportionalKl,
    RewardsToGo,
    SequenceMean,
    SequenceSum,
    SquaredValueLoss,
    TokenMean,
    TruncatedWeights,
    Unclipped,
)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"advantages": Gae()}, "'gae' need a critic that nothing trains; set value_loss"),
        ({"advantages": NStep()}, "'n_step' need a critic that nothing trains; set value_loss"),
        ({"advantages": RewardsToGo(baseline="value")}, "'rewards_to_go' need a critic that nothing trains"),
        (
            {"advantages": GroupRelative(), "value_loss": SquaredValueLoss()},
            "'group_relative' use no critic, so value_loss trains one for nothing; set value_loss: null",
        ),
        ({"advantages": RewardsToGo(), "value_loss": SquaredValueLoss()}, "'rewards_to_go' use no critic"),
        (
            {"advantages": LeaveOneOut(), "surrogate": PolicyGradient(), "ratio": "sequence_product", "epochs": 2},
            "policy_gradient ignores the ratio; remove `ratio`",
        ),
        # A setting that nothing reads is refused with one update too.
        (
            {"advantages": LeaveOneOut(), "surrogate": PolicyGradient(), "ratio": "sequence_product"},
            "policy_gradient ignores the ratio",
        ),
        (
            {"advantages": LeaveOneOut(), "kl": KlInReward(coefficient=DualKl())},
            "a dual KL coefficient inside group rewards has no fixed point",
        ),
        # A row's ratio stands at each of its actions: summing over them would weigh a row by its length.
        (
            {"advantages": LeaveOneOut(), "ratio": "sequence_product", "aggregation": SequenceSum()},
            "sequence_product, .* use aggregation: sequence_mean",
        ),
        ({"advantages": LeaveOneOut(), "ratio": "sequence_product"}, "use aggregation: sequence_mean"),
    ],
)
def test_combinations_without_meaning_are_refused_with_a_remedy(settings, sentence):
    with pytest.raises(ValidationError, match=sentence):
        AlgorithmConfig(**settings)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: KlInLoss(estimator="k1"), "k1 in the loss has an expected gradient of 0; use k2"),
        (lambda: KlInLoss(estimator="k3_weighted", against="old_policy"), "k3_weighted corrects KL"),
        (lambda: KlInLoss(estimator="k3_straight_through", against="old_policy"), "k3_straight_through corrects KL"),
        (lambda: KlInReward(estimator="k3_straight_through"), "k1"),
        (lambda: MaskedWeights(low=2.0, high=0.5), "low <= 1 <= high"),
        (lambda: MaskedWeights(low=1.5, high=2.0), "low <= 1 <= high"),
        (lambda: DualClipped(bound=1.0), "greater than 1"),
        (lambda: DualClipped(clip_high=4.0, bound=3.0), r"bound .* 1 \+ clip_high"),
        (lambda: Gae(discount=1.1), "less than or equal to 1"),
        (lambda: Gae(gae_lambda=-0.1), "greater than or equal to 0"),
        (lambda: NStep(n=0), "greater than or equal to 1"),
        (lambda: Clipped(clip_low=1.5), "less than or equal to 1"),
        (lambda: ClippedWeight(clip_high=-1), "greater than or equal to 0"),
        (lambda: FixedLength(length=0), "greater than or equal to 1"),
        (lambda: AdaptiveKl(target=0), "greater than 0"),
        (lambda: ProportionalKl(horizon=0), "greater than 0"),
        (lambda: TruncatedWeights(cap=0), "greater than 0"),
        (lambda: Clipped(clip=0.2), "Extra inputs"),
        (lambda: Gae(discount=float("nan")), "finite number"),
    ],
)
def test_single_settings_are_checked(build, sentence):
    with pytest.raises(ValidationError, match=sentence):
        build()


def test_what_has_a_meaning_is_allowed():
    # The PPO paper's penalty, k1 where it is not void: against the old policy it is the gradient of KL(old || policy).
    for estimator in ("k1", "k2", "k3"):
        assert KlInLoss(estimator=estimator, against="old_policy").estimator == estimator
    for estimator in ("k2", "k3", "k3_straight_through", "k3_weighted"):
        assert KlInLoss(estimator=estimator).against == "reference"
    assert AlgorithmConfig(advantages=RewardsToGo(baseline="value"), value_loss=SquaredValueLoss()).wants_values
    exact = AlgorithmConfig(advantages=LeaveOneOut(), ratio="sequence_product", aggregation=SequenceMean())
    assert exact.ratio == "sequence_product"
    # LUSPO: a length-weighted geometric mean on purpose (TRL's loss_type "luspo").
    luspo = AlgorithmConfig(advantages=GroupRelative(), ratio="sequence_geometric_mean", aggregation=SequenceSum())
    assert isinstance(luspo.aggregation, SequenceSum)
    assert MaskedWeights(low=0.0, high=1.0).low == 0.0


@pytest.mark.parametrize(
    ("settings", "wants_values", "needs_groups", "needs_reference"),
    [
        ({"advantages": Gae(), "value_loss": SquaredValueLoss()}, True, False, False),
        ({"advantages": NStep(), "value_loss": SquaredValueLoss()}, True, False, False),
        ({"advantages": RewardsToGo(baseline="value"), "value_loss": SquaredValueLoss()}, True, False, False),
        ({"advantages": RewardsToGo()}, False, False, False),
        ({"advantages": GroupRelative()}, False, True, False),
        ({"advantages": LeaveOneOut(), "kl": KlInReward()}, False, True, True),
        ({"advantages": GroupRelative(), "kl": KlInLoss()}, False, True, True),
        ({"advantages": GroupRelative(), "kl": KlInLoss(against="old_policy")}, False, True, False),
    ],
)
def test_an_algorithm_says_what_it_needs(settings, wants_values, needs_groups, needs_reference):
    algorithm = AlgorithmConfig(**settings)
    assert algorithm.wants_values is wants_values
    assert algorithm.needs_critic is wants_values
    assert algorithm.needs_groups is needs_groups
    assert algorithm.needs_reference is needs_reference


def test_with_length_fills_in_what_is_missing_only():
    open_length = AlgorithmConfig(advantages=GroupRelative(), aggregation=FixedLength())
    assert open_length.with_length(128).aggregation == FixedLength(length=128)
    assert open_length.aggregation == FixedLength()
    chosen = AlgorithmConfig(advantages=GroupRelative(), aggregation=FixedLength(length=64))
    assert chosen.with_length(128) == chosen
    other = AlgorithmConfig(advantages=GroupRelative(), aggregation=TokenMean())
    assert other.with_length(128) == other


def test_configs_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        AlgorithmConfig(advantages=GroupRelative(), surrogate=Unclipped()).epochs = 3
