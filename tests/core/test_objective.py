from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from rlhf.core.algorithm import (
    AlgorithmConfig,
    Clipped,
    ClippedValueLoss,
    ClippedWeight,
    DualClipped,
    FixedLength,
    Gae,
    GroupRelative,
    Imitation,
    KlInLoss,
    LeaveOneOut,
    PolicyGradient,
    SequenceMean,
    SequenceSum,
    SquaredValueLoss,
    TokenMean,
    Unclipped,
)
from rlhf.core.estimate import estimate
from rlhf.core.objective import Objective
from rlhf.core.types import Experience, PolicyOutput, Rollout
from rlhf.errors import UserError

MASK = torch.tensor([[True, True], [True, False]])
OLD = torch.tensor([[0.5, 0.5], [0.5, 0.5]], dtype=torch.float64).log()
NEW = torch.tensor([[0.75, 0.25], [0.25, 0.125]], dtype=torch.float64).log()
"""Ratios 1.5 and .5 in the first row, .5 in the second (and a masked one)."""
REF = torch.tensor([[0.375, 0.5], [0.5, 0.5]], dtype=torch.float64).log()
ADVANTAGES = torch.tensor([[1.0, 1.0], [-2.0, 0.0]], dtype=torch.float64)
ENTROPY = torch.tensor([[0.5, 0.7], [0.3, 9.0]], dtype=torch.float64)


def experience(**changes) -> Experience:
    plain = Experience(
        inputs={},
        actions=torch.zeros(2, 2, dtype=torch.int64),
        action_mask=MASK,
        old_log_probs=OLD,
        advantages=ADVANTAGES,
        ref_log_probs=REF,
    )
    return replace(plain, **changes)


def loss_of(algorithm, *, output=None, kl_coef=0.0, clip_scale=1.0, surrogate=None, **changes) -> float:
    objective = Objective(algorithm, surrogate=surrogate)
    output = PolicyOutput(NEW, ENTROPY, None) if output is None else output
    sums = objective(output, experience(**changes), kl_coef=kl_coef, clip_scale=clip_scale)
    return objective.loss(sums, objective.denominators(MASK)).item()


def rows(**settings) -> AlgorithmConfig:
    return AlgorithmConfig(advantages=GroupRelative(), **settings)


# Gains with clip .2: min(1.5, 1.2) = 1.2 | .5 | min(-1, -.8 * 2) = -1.6.
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"aggregation": TokenMean()}, -(1.2 + 0.5 - 1.6) / 3),
        ({"aggregation": SequenceMean()}, -((1.2 + 0.5) / 2 - 1.6) / 2),
        ({"aggregation": SequenceSum()}, -(1.2 + 0.5 - 1.6) / 2),
        ({"aggregation": FixedLength(length=10)}, -(1.2 + 0.5 - 1.6) / 20),
        ({"surrogate": Unclipped()}, -(1.5 + 0.5 - 1.0) / 3),
        ({"surrogate": Clipped(clip_low=0.2, clip_high=0.28)}, -(1.28 + 0.5 - 1.6) / 3),
        ({"surrogate": DualClipped(bound=1.5)}, -(1.2 + 0.5 - 1.6) / 3),
        # log .75 = -.28768207, log .25 = -1.38629436.
        ({"surrogate": PolicyGradient()}, -(-0.28768207 - 1.38629436 + 2 * 1.38629436) / 3),
        # Weights min(rho, 1.2) = 1.2, .5, .5.
        (
            {"surrogate": ClippedWeight(clip_high=0.2)},
            -(1.2 * -0.28768207 + 0.5 * -1.38629436 + 0.5 * 2 * 1.38629436) / 3,
        ),
        # Row ratios: sqrt(1.5 * .5) = .8660254 and .5, repeated along the row.
        (
            {"ratio": "sequence_geometric_mean", "aggregation": SequenceMean(), "surrogate": Unclipped()},
            -(0.8660254 - 2 * 0.5) / 2,
        ),
        # 1.5 * .5 = .75 and .5.
        (
            {"ratio": "sequence_product", "aggregation": SequenceMean(), "surrogate": Unclipped()},
            -(0.75 - 2 * 0.5) / 2,
        ),
        ({"entropy_coef": 0.1}, -(1.2 + 0.5 - 1.6) / 3 - 0.1 * (0.5 + 0.7 + 0.3) / 3),
        (
            {"entropy_coef": 0.1, "aggregation": SequenceMean()},
            -((1.2 + 0.5) / 2 - 1.6) / 2 - 0.1 * ((0.5 + 0.7) / 2 + 0.3) / 2,
        ),
    ],
)
def test_losses_by_hand(settings, expected):
    assert loss_of(rows(**settings)) == pytest.approx(expected, abs=1e-7)


def test_kl_in_the_loss_against_the_reference():
    # pi / ref = 2, .5, .5: d = log 2, -log 2, -log 2. k3 = .5 - 1 + log 2 = .19314718, 2 - 1 - log 2 = .30685282 twice.
    algorithm = rows(kl=KlInLoss(estimator="k3"), surrogate=Unclipped())
    expected = -(1.5 + 0.5 - 1.0) / 3 + 0.1 * (0.19314718 + 2 * 0.30685282) / 3
    assert loss_of(algorithm, kl_coef=0.1) == pytest.approx(expected)
    # k3 weighted by pi / pi_old = 1.5, .5, .5.
    weighted = rows(kl=KlInLoss(estimator="k3_weighted"), surrogate=Unclipped())
    expected = -(1.5 + 0.5 - 1.0) / 3 + 0.1 * (1.5 * 0.19314718 + 0.5 * 2 * 0.30685282) / 3
    assert loss_of(weighted, kl_coef=0.1) == pytest.approx(expected)
    # The coefficient comes with the call; without it there is no term.
    assert loss_of(algorithm) == pytest.approx(-1 / 3)


def test_kl_in_the_loss_against_the_old_policy():
    # KL(old || new), estimated from old's own samples: rho - 1 - log rho = .5 - log 1.5 = .09453489, -.5 + log 2 twice.
    algorithm = rows(kl=KlInLoss(estimator="k3", against="old_policy"), surrogate=Unclipped())
    expected = -1 / 3 + 2.0 * (0.09453489 + 2 * 0.19314718) / 3
    assert loss_of(algorithm, kl_coef=2.0, ref_log_probs=None) == pytest.approx(expected)


def test_engine_weights_multiply_the_gain_but_not_the_kl():
    weights = torch.tensor([[2.0, 0.0], [0.5, 7.0]], dtype=torch.float64)
    algorithm = rows(kl=KlInLoss(estimator="k3"), surrogate=Unclipped())
    expected = -(2 * 1.5 + 0 - 0.5 * 1.0) / 3 + 0.1 * (0.19314718 + 2 * 0.30685282) / 3
    assert loss_of(algorithm, kl_coef=0.1, weights=weights) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("aggregation", "likelihood"),
    [
        # log .75, .25 in the row that succeeded, .25 in the one that did not, log 4 = 1.38629436.
        (TokenMean(), (0.28768207 + 1.38629436) / 2),
        (SequenceMean(), (0.28768207 + 1.38629436) / 2),
        (SequenceSum(), 0.28768207 + 1.38629436),
        (FixedLength(length=10), (0.28768207 + 1.38629436) / 10),
    ],
)
def test_imitation_is_the_mean_likelihood_of_the_successes(aggregation, likelihood):
    algorithm = rows(aggregation=aggregation, imitation=Imitation(coefficient=0.1, above=0.5))
    rollout = Rollout(
        inputs={}, actions=torch.zeros(2, 2, dtype=torch.int64), action_mask=MASK, old_log_probs=OLD,
        rewards=torch.tensor([[0.0, 1.0], [0.5, 7.0]], dtype=torch.float64),  # 7.0 is masked; .5 is not above .5
        episode_ends=MASK, group_ids=torch.tensor([0, 0]),
    )  # fmt: skip
    weights = estimate(rollout, algorithm).imitation
    without = loss_of(rows(aggregation=aggregation))
    assert loss_of(algorithm, imitation=weights) - without == pytest.approx(0.1 * likelihood, abs=1e-7)
    nothing = algorithm.model_copy(update={"imitation": Imitation(above=2.0)})
    assert estimate(rollout, nothing).imitation.eq(0).all()  # nobody succeeded: no term, and no division by 0


def test_clip_scale_anneals_both_ranges():
    # Half of .2: gains 1.1 | .5 | -.9 * 2; at 0 only 1.0 | .5 | -2.
    algorithm = rows()
    assert loss_of(algorithm, clip_scale=0.5) == pytest.approx(-(1.1 + 0.5 - 1.8) / 3)
    assert loss_of(algorithm, clip_scale=0.0) == pytest.approx(-(1.0 + 0.5 - 2.0) / 3)


def critic(value_loss) -> AlgorithmConfig:
    return AlgorithmConfig(advantages=Gae(), value_loss=value_loss, aggregation=SequenceMean(), surrogate=Unclipped())


@pytest.mark.parametrize(
    ("value_loss", "value_part"),
    [
        # V = 1, 0 | 3; returns 0, 0 | 1: 1/2 (1 + 0 + 4) / 3 actions, whatever the policy's aggregation is.
        (SquaredValueLoss(coefficient=0.5), 0.5 * 2.5 / 3),
        # Old values 0, 0 | 5, range .2: clipped to .2 and 4.8: 1/2 max(1, .04) + 0 + 1/2 max(4, 14.44) = 7.72.
        (ClippedValueLoss(coefficient=0.1, clip_range=0.2), 0.1 * 7.72 / 3),
    ],
)
def test_the_value_part_has_its_own_denominator(value_loss, value_part):
    objective = Objective(critic(value_loss))
    values = torch.tensor([[1.0, 0.0], [3.0, 99.0]], dtype=torch.float64)
    returns = torch.tensor([[0.0, 0.0], [1.0, -99.0]], dtype=torch.float64)
    old_values = torch.tensor([[0.0, 0.0], [5.0, 0.0]], dtype=torch.float64)
    batch = experience(returns=returns, old_values=old_values)
    sums = objective(PolicyOutput(NEW, ENTROPY, values), batch)
    denominators = objective.denominators(MASK)
    assert denominators.tolist() == [2.0, 3.0]
    policy_part = -((1.5 + 0.5) / 2 - 1.0) / 2
    assert objective.loss(sums, denominators).item() == pytest.approx(policy_part + value_part)


def test_clip_scale_anneals_the_value_range_too():
    # Half of .4: old value 5 clipped to 4.8 as above, and 0 to .2.
    values = torch.tensor([[1.0, 0.0], [3.0, 99.0]], dtype=torch.float64)
    returns = torch.tensor([[0.0, 0.0], [1.0, -99.0]], dtype=torch.float64)
    old_values = torch.tensor([[0.0, 0.0], [5.0, 0.0]], dtype=torch.float64)
    objective = Objective(critic(ClippedValueLoss(coefficient=1.0, clip_range=0.4)))
    batch = experience(returns=returns, old_values=old_values)
    sums = objective(PolicyOutput(NEW, ENTROPY, values), batch, clip_scale=0.5)
    assert sums.value.item() == pytest.approx(7.72)


def test_metrics_are_sums_over_actions():
    algorithm = AlgorithmConfig(
        advantages=Gae(), value_loss=SquaredValueLoss(), kl=KlInLoss(estimator="k3"), surrogate=Clipped()
    )
    objective = Objective(algorithm)
    values, returns = torch.ones(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    batch = experience(returns=returns, old_values=values)
    sums = objective(PolicyOutput(NEW, ENTROPY, values), batch, kl_coef=0.0)
    metrics = dict(zip(objective.metric_names, sums.metrics.tolist(), strict=True))
    assert metrics == {
        "policy_loss": pytest.approx(-(1.2 + 0.5 - 1.6)),
        "entropy": pytest.approx(1.5),
        "ratio": pytest.approx(2.5),
        # rho - 1 - log rho and -log rho: two estimators of KL(old || new).
        "approx_kl": pytest.approx(0.09453489 + 2 * 0.19314718),
        "kl_to_old": pytest.approx(-math.log(1.5) + 2 * math.log(2)),
        # rho 1.5 with A > 0 and rho .5 with A < 0 are clipped; rho .5 with A > 0 is not.
        "clip_fraction": 2.0,
        "kl_to_ref": pytest.approx(math.log(2) - 2 * math.log(2)),
        "value_loss": pytest.approx(1.5),
    }
    assert not sums.metrics.requires_grad


@pytest.mark.parametrize(
    ("surrogate", "expected"),
    [
        (Unclipped(), 0.0),
        (PolicyGradient(), 0.0),
        (Clipped(), 2.0),
        (Clipped(clip_high=0.6), 1.0),
        (ClippedWeight(clip_high=0.2), 1.0),  # a weight of 1.5 is capped at 1.2
    ],
)
def test_clip_fraction_counts_what_clipping_silenced(surrogate, expected):
    objective = Objective(rows(surrogate=surrogate))
    sums = objective(PolicyOutput(NEW, ENTROPY, None), experience())
    assert sums.metrics[objective.metric_names.index("clip_fraction")].item() == expected


def test_clip_fraction_counts_the_second_bound_too():
    # rho = 9 with A < 0: the clipped surrogate keeps its gradient, the bound 3 takes it away.
    objective = Objective(rows(surrogate=DualClipped(bound=3.0)))
    output = PolicyOutput(OLD + math.log(9.0), ENTROPY, None)
    sums = objective(output, experience(advantages=-ADVANTAGES.abs()))
    assert sums.metrics[objective.metric_names.index("clip_fraction")].item() == 3.0


def test_a_researchers_own_surrogate_replaces_the_rows():
    def squared(ratio, log_probs, advantages):
        return ratio**2 * advantages

    # 2.25 + .25 - .5
    assert loss_of(rows(), surrogate=squared) == pytest.approx(-(2.25 + 0.25 - 0.5) / 3)


def test_a_step_without_any_action_costs_nothing():
    objective = Objective(rows())
    nothing = torch.zeros_like(MASK)
    sums = objective(PolicyOutput(NEW, ENTROPY, None), experience(action_mask=nothing))
    assert objective.loss(sums, objective.denominators(nothing)).item() == 0.0


def test_what_cannot_work_is_refused_at_once():
    with pytest.raises(UserError, match="with_length"):
        Objective(rows(aggregation=FixedLength()))
    objective = Objective(critic(SquaredValueLoss()))
    with pytest.raises(UserError, match="the policy predicts no values"):
        objective(PolicyOutput(NEW, ENTROPY, None), experience(returns=OLD, old_values=OLD))


@pytest.mark.parametrize(
    ("output", "name"),
    [
        (PolicyOutput(NEW[:, :1], ENTROPY, OLD), "log_probs"),
        (PolicyOutput(NEW, ENTROPY[0], OLD), "entropy"),
        (PolicyOutput(NEW, ENTROPY, OLD.unsqueeze(-1)), "values"),
        (PolicyOutput(NEW, ENTROPY, OLD[:, :1]), "values"),
    ],
)
def test_a_policys_output_that_would_broadcast_is_refused(output, name):
    # A value head's forgotten squeeze, [B, T, 1] against [B, T], would train on every pair of steps.
    objective = Objective(critic(SquaredValueLoss()))
    with pytest.raises(UserError, match=rf"{name}.*\(2, 2\)"):
        objective(output, experience(returns=OLD, old_values=OLD))


@pytest.mark.parametrize("clip_scale", [1.0, 0.0])
@pytest.mark.parametrize(
    ("settings", "divide_by_length"),
    [
        *[
            ({"surrogate": s}, False)
            for s in (PolicyGradient(), Unclipped(), Clipped(), DualClipped(), ClippedWeight())
        ],
        *[
            ({"surrogate": s, "aggregation": SequenceMean()}, True)
            for s in (PolicyGradient(), Unclipped(), Clipped(), DualClipped(), ClippedWeight())
        ],
        *[
            ({"surrogate": s, "aggregation": SequenceMean(), "ratio": "sequence_geometric_mean"}, True)
            for s in (Unclipped(), Clipped(clip_low=3e-4, clip_high=4e-4), DualClipped())
        ],
        # One exact weight per row: at ratio 1 its mean over the row is the sum of the row's scores.
        *[
            ({"surrogate": s, "aggregation": SequenceMean(), "ratio": "sequence_product"}, None)
            for s in (Unclipped(), Clipped(), DualClipped())
        ],
    ],
)
def test_at_ratio_one_the_gradient_is_the_plain_policy_gradient(settings, divide_by_length, clip_scale):
    """d loss / d log pi_t = -A_i weight_t, weight 1/N, 1/(B length_i), or 1/B for the exact row weight."""
    log_probs = OLD.clone().requires_grad_()
    advantages = torch.tensor([[1.5, 1.5], [-2.0, 0.0]], dtype=torch.float64)
    objective = Objective(AlgorithmConfig(advantages=LeaveOneOut(), **settings))
    sums = objective(PolicyOutput(log_probs, ENTROPY, None), experience(advantages=advantages), clip_scale=clip_scale)
    objective.loss(sums, objective.denominators(MASK)).backward()
    lengths = torch.tensor([[2.0], [1.0]], dtype=torch.float64)
    weight = {False: torch.full((2, 1), 1 / 3, dtype=torch.float64), True: 1 / (2 * lengths), None: 0.5}[
        divide_by_length
    ]
    expected = torch.where(MASK, -advantages * weight, 0.0)
    assert torch.allclose(log_probs.grad, expected, atol=1e-12)


def test_on_policy_rows_take_their_own_log_probs_for_the_old_ones():
    """Whatever stands in `old_log_probs`: ratio 1, distance 0, and the gradient of the plain policy gradient."""
    log_probs = OLD.clone().requires_grad_()
    advantages = torch.tensor([[1.5, 1.5], [-2.0, 0.0]], dtype=torch.float64)
    objective = Objective(rows(kl=KlInLoss(against="old_policy")))
    given = experience(advantages=advantages, old_log_probs=OLD - 3.0, on_policy=True)
    sums = objective(PolicyOutput(log_probs, ENTROPY, None), given, kl_coef=1.0)
    objective.loss(sums, objective.denominators(MASK)).backward()
    assert torch.allclose(log_probs.grad, torch.where(MASK, -advantages / 3, 0.0), atol=1e-12)
    measured = dict(zip(objective.metric_names, (sums.metrics / 3).tolist(), strict=True))
    assert measured["ratio"] == pytest.approx(1.0)
    assert measured["approx_kl"] == measured["kl_to_old"] == measured["clip_fraction"] == 0.0


def test_a_rows_ratio_averages_advantages_that_differ_within_the_row():
    """At ratio 1: d loss / d log pi_t = -mean_s(A_s) / (B length), so that credit per action is lost."""
    log_probs = OLD.clone().requires_grad_()
    advantages = torch.tensor([[3.0, -1.0], [2.0, 0.0]], dtype=torch.float64)
    objective = Objective(rows(ratio="sequence_geometric_mean", aggregation=SequenceMean(), surrogate=Unclipped()))
    sums = objective(PolicyOutput(log_probs, ENTROPY, None), experience(advantages=advantages))
    objective.loss(sums, objective.denominators(MASK)).backward()
    # First row: mean advantage 1, length 2, two rows: -1/4 each. Second row: -2 / (2 * 1).
    assert log_probs.grad.tolist() == [[-0.25, -0.25], [-1.0, 0.0]]
