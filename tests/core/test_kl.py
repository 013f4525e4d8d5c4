from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.core.algorithm import AdaptiveKl, DualKl, FixedKl, KlInLoss, KlInReward, NoKl, ProportionalKl
from rlhf.core.kl import exact_categorical_kl, kl_estimate, make_kl_coefficient
from rlhf.errors import UserError

ESTIMATORS = ["k1", "k2", "k3", "k3_straight_through", "k3_weighted"]

# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        # Schulman's blog post: with x = log(ref / pi) = [-.2, .5, -.2]: k1 = -x, k2 = x^2 / 2, k3 = e^x - x - 1;
        # e^-.2 = .8187308 -> .0187308, e^.5 = 1.6487213 -> .1487213.
        ("k1", [0.2, -0.5, 0.2]),
        ("k2", [0.02, 0.125, 0.02]),
        ("k3", [0.018730753077981888, 0.1487212707001282, 0.018730753077981888]),
        ("k3_straight_through", [0.018730753077981888, 0.1487212707001282, 0.018730753077981888]),
        ("k3_weighted", [0.018730753077981888, 0.1487212707001282, 0.018730753077981888]),
    ],
)
def test_estimates_by_hand(estimator, expected):
    pi = torch.tensor([[-1.0, -2.0, -0.5]], dtype=torch.float64)
    reference = torch.tensor([[-1.2, -1.5, -0.7]], dtype=torch.float64)
    assert kl_estimate(pi, reference, estimator=estimator)[0].tolist() == pytest.approx(expected)


def test_weighted_estimate_off_policy():
    # pi / pi_old = e^(-1 + 1.5) = e^.5; k3 at d = .2 is .0187307531.
    one = torch.ones(1, 1, dtype=torch.float64)
    value = kl_estimate(-one, -1.2 * one, estimator="k3_weighted", old_log_probs=-1.5 * one)
    assert value.item() == pytest.approx(math.exp(0.5) * 0.018730753077981888)


@settings(max_examples=200, deadline=None)
@given(st.floats(-50, 50, width=32))
def test_k3_is_never_negative(difference):
    for dtype in (torch.float32, torch.float64):
        d = torch.full((1, 9), difference, dtype=dtype)
        for estimator in ("k3", "k3_straight_through", "k3_weighted"):
            value = kl_estimate(d, torch.zeros_like(d), estimator=estimator)
            assert (value >= 0).all(), (difference, dtype, estimator)
            assert value.isfinite().all()


@pytest.mark.parametrize("difference", [1e-3, 1e-4, -1e-4])
def test_k3_keeps_its_digits_near_zero(difference):
    # k3 = d^2 / 2 - d^3 / 6 + ...; exp(-d) - 1 + d in float32 would have no correct digit at d = 1e-4 (d^2 / 2 = 5e-9,
    # the spacing of floats near 1 is 1.2e-7).
    d = torch.tensor([[difference]])
    expected = difference**2 / 2 - difference**3 / 6
    assert kl_estimate(d, torch.zeros(1, 1), estimator="k3").item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_large_drift_is_not_clamped(estimator):
    # verl clamps k3 to +-10, whose gradient is then 0 just where the leash is needed most.
    for difference in (-30.0, 30.0):
        d = torch.tensor([[difference]], dtype=torch.float64, requires_grad=True)
        kl_estimate(d, torch.zeros(1, 1, dtype=torch.float64), estimator=estimator).sum().backward()
        assert abs(d.grad.item()) >= 1 - 1e-9


# --- gradients, by enumeration over a small categorical -------------------------------------------------------------


def distributions(seed: int, outcomes: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of pi, and log-probs of a reference and of an older policy that drew the actions."""
    generator = torch.Generator().manual_seed(seed)
    logits, reference, old = torch.randn(3, outcomes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), reference.log_softmax(0), old.log_softmax(0)


def gradient(function, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(function(logits.log_softmax(0)), logits)[0]


def reverse_kl(reference):
    """KL(pi || ref) = sum pi (log pi - log ref)."""
    return lambda log_pi: (log_pi.exp() * (log_pi - reference)).sum()


def forward_kl(reference):
    """KL(ref || pi) = sum ref (log ref - log pi)."""
    return lambda log_pi: (reference.exp() * (reference - log_pi)).sum()


def expected_estimate(estimator, reference, drawn_from=None):
    """sum_a p(a) estimate(a), p being held fixed as a sampler is."""

    def function(log_pi):
        drawn = log_pi.detach() if drawn_from is None else drawn_from
        estimate = kl_estimate(
            log_pi.unsqueeze(0),
            reference.unsqueeze(0),
            estimator=estimator,
            old_log_probs=None if drawn_from is None else drawn_from.unsqueeze(0),
        )
        return (drawn.exp() * estimate[0]).sum()

    return function


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_unbiased_values(seed):
    logits, reference, _ = distributions(seed)
    log_pi = logits.detach().log_softmax(0)
    truth = reverse_kl(reference)(log_pi).item()
    for estimator in ("k1", "k3", "k3_straight_through", "k3_weighted"):
        assert expected_estimate(estimator, reference)(log_pi).item() == pytest.approx(truth, abs=1e-10)
    assert exact_categorical_kl(log_pi, reference).item() == pytest.approx(truth, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_gradients_on_policy_are_as_the_spec_says(seed):
    logits, reference, _ = distributions(seed)
    reverse, forward = gradient(reverse_kl(reference), logits), gradient(forward_kl(reference), logits)
    of = {estimator: gradient(expected_estimate(estimator, reference), logits) for estimator in ESTIMATORS}
    assert torch.allclose(of["k1"], torch.zeros_like(reverse), atol=1e-12)
    assert torch.allclose(of["k2"], reverse, atol=1e-10)
    assert torch.allclose(of["k3"], forward, atol=1e-10)
    assert torch.allclose(of["k3_straight_through"], reverse, atol=1e-10)
    assert torch.allclose(of["k3_weighted"], reverse, atol=1e-10)
    assert not torch.allclose(reverse, forward, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_weighted_k3_stays_right_off_policy(seed):
    logits, reference, old = distributions(seed)
    reverse = gradient(reverse_kl(reference), logits)
    assert torch.allclose(gradient(expected_estimate("k3_weighted", reference, old), logits), reverse, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_against_the_old_policy_k1_and_k3_are_the_penalty_of_the_ppo_paper(seed):
    """KL(old || pi), the actions being drawn from old: the old policy takes the place of pi in the estimator."""
    logits, _, old = distributions(seed)
    truth, value = gradient(forward_kl(old), logits), forward_kl(old)(logits.detach().log_softmax(0)).item()

    def expected(estimator):
        return lambda log_pi: (old.exp() * kl_estimate(old[None], log_pi[None], estimator=estimator)[0]).sum()

    for estimator in ("k1", "k3"):
        assert expected(estimator)(logits.detach().log_softmax(0)).item() == pytest.approx(value, abs=1e-10)
        assert torch.allclose(gradient(expected(estimator), logits), truth, atol=1e-10)


def test_against_the_old_policy_k2_is_right_to_first_order_only():
    logits, _, old = distributions(3)
    near = (old + 1e-4 * logits.detach()).requires_grad_()
    far = logits
    for at, close in ((near, True), (far, False)):
        k2 = gradient(lambda lp: (old.exp() * kl_estimate(old[None], lp[None], estimator="k2")[0]).sum(), at)
        truth = gradient(forward_kl(old), at)
        assert ((k2 - truth).norm() / truth.norm() < 1e-2).item() is close


def test_exact_kl_by_hand_and_with_impossible_outcomes():
    # .5 log(.5 / .25) + .5 log(.5 / .75) = .5 log 2 + .5 log(2 / 3) = .14384104.
    p, q = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    assert exact_categorical_kl(p, q).tolist() == pytest.approx([0.14384104])
    # What q deems impossible costs infinitely much; what p deems impossible costs nothing.
    possible = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert exact_categorical_kl(possible, q).item() == math.inf
    assert exact_categorical_kl(p, possible).item() == pytest.approx(0.5 * math.log(2))


def test_exact_kl_of_masked_logits_has_a_finite_gradient():
    # An invalid action has logit -inf in both policies; 0 * (-inf) must not reach the other logits.
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    masked = torch.cat([logits, torch.tensor([-torch.inf], dtype=torch.float64)])
    reference = torch.tensor([0.1, 0.2, 0.3, -torch.inf], dtype=torch.float64).log_softmax(0)
    exact_categorical_kl(masked.log_softmax(0), reference).backward()
    expected = gradient(reverse_kl(reference[:3]), logits)
    assert torch.allclose(logits.grad, expected)


# --- coefficients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "expected"), [(0.005, 0.5), (0.0067, 1.0), (0.01, 1.0), (0.0149, 1.0), (0.0151, 2.0)]
)
def test_adaptive_coefficient(measured, expected):
    # PPO paper, section 4, beta 1, target .01: halved below .01 / 1.5 = .00667, doubled above .015.
    coefficient = make_kl_coefficient(KlInLoss(against="old_policy", coefficient=AdaptiveKl(initial=1.0, target=0.01)))
    coefficient.update(measured, episodes=1)
    assert coefficient.value == expected


@pytest.mark.parametrize(
    ("measured", "episodes", "expected"),
    [
        # Ziegler et al. eq. 5: beta (1 + clip(KL / 6 - 1, +-.2) episodes / 10000), beta = .15.
        (12.0, 512, 0.15 * (1 + 0.2 * 0.0512)),  # clipped from 1
        (6.6, 512, 0.15 * (1 + 0.1 * 0.0512)),
        (6.0, 512, 0.15),
        (5.4, 100, 0.15 * (1 - 0.1 * 0.01)),
        (-1.0, 64, 0.15 * (1 - 0.2 * 0.0064)),
    ],
)
def test_proportional_coefficient(measured, episodes, expected):
    coefficient = make_kl_coefficient(KlInReward(coefficient=ProportionalKl(initial=0.15, target=6.0, horizon=10_000)))
    assert coefficient.unit == "sequence"
    coefficient.update(measured, episodes=episodes)
    assert coefficient.value == pytest.approx(expected, rel=1e-12)


def test_a_persistent_error_of_ten_percent_changes_the_coefficient_by_ten_percent_over_the_horizon():
    coefficient = make_kl_coefficient(KlInReward(coefficient=ProportionalKl(initial=1.0, target=6.0, horizon=10_000)))
    for _ in range(100):
        coefficient.update(6.6, episodes=100)
    assert coefficient.value == pytest.approx(1.001**100, rel=1e-9)


def test_the_proportional_coefficient_never_turns_negative():
    # 1 - .2 * 600 / 100 = -.2 would reward the policy for drifting away.
    coefficient = make_kl_coefficient(KlInReward(coefficient=ProportionalKl(initial=1.0, target=6.0, horizon=100)))
    with pytest.raises(UserError, match="horizon"):
        coefficient.update(0.0, episodes=600)


def test_dual_coefficient_climbs_the_constraint_and_is_projected_at_zero():
    coefficient = make_kl_coefficient(
        KlInLoss(against="old_policy", coefficient=DualKl(initial=0.5, target=0.01, learning_rate=10.0))
    )
    coefficient.update(0.03, episodes=1)  # .5 + 10 (.03 - .01)
    assert coefficient.value == pytest.approx(0.7)
    coefficient.update(-0.05, episodes=1)  # .7 + 10 (-.05 - .01)
    assert coefficient.value == pytest.approx(0.1)
    coefficient.update(0.0, episodes=1)  # .1 - .1, and then no lower than 0
    coefficient.update(0.0, episodes=1)
    assert coefficient.value == 0.0
    coefficient.update(0.02, episodes=1)
    assert coefficient.value == pytest.approx(0.1)


def test_fixed_and_absent_coefficients_stay():
    for kl, expected in ((KlInReward(coefficient=FixedKl(value=0.05)), 0.05), (NoKl(), 0.0)):
        coefficient = make_kl_coefficient(kl)
        coefficient.update(100.0, episodes=1000)
        assert coefficient.value == expected


@pytest.mark.parametrize("rule", [AdaptiveKl(), ProportionalKl(), DualKl()])
@pytest.mark.parametrize("measured", [math.nan, math.inf])
def test_a_kl_that_is_not_a_number_is_refused(rule, measured):
    # max(0, nan) is 0 in python: a dual coefficient would silently let go of the leash.
    coefficient = make_kl_coefficient(KlInReward(coefficient=rule))
    with pytest.raises(UserError, match="KL"):
        coefficient.update(measured, episodes=1)


def test_a_coefficient_goes_on_from_its_checkpoint():
    rule = KlInReward(coefficient=AdaptiveKl(initial=1.0, target=0.01))
    first, second = make_kl_coefficient(rule), make_kl_coefficient(rule)
    first.update(1.0, episodes=1)
    second.load_state_dict(first.state_dict())
    assert second.value == 2.0
