from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.core.surrogates import clipped, clipped_weight, dual_clipped, policy_gradient, unclipped


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def chosen_log_probs(logits: list[list[float]], actions: list[int]) -> torch.Tensor:
    return torch.tensor(logits, dtype=torch.float64).log_softmax(-1)[range(len(actions)), actions].unsqueeze(0)


@pytest.mark.parametrize(
    ("advantages", "expected"),
    # rlax ClippedSurrogatePGLossTest (rlax/_src/policy_gradients_test.py), epsilon .2, recomputed in float64.
    [((0.3, 0.2, 0.1), -0.17117784277455375), ((-0.3, -0.2, -0.1), 0.19333333333333336)],
)
def test_clipped_gives_rlax_losses(advantages, expected):
    new = chosen_log_probs([[1, 1, 1], [2, 0, 0], [-1, -2, -3]], [0, 1, 2])
    old = chosen_log_probs([[1, 1, 1], [2, 0, 0], [-3, -2, -1]], [0, 1, 2])
    gain = clipped((new - old).exp(), row(*advantages), clip_low=0.2, clip_high=0.2)
    assert -gain.mean().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("logits", "actions", "advantages", "weights", "expected"),
    # rlax PolicyGradientLossTest: mean of -weight * advantage * log pi(a).
    [
        (
            [[1, 1, 1], [2, 0, 0], [-1, -2, -3]],
            [0, 1, 2],
            (0.3, 0.2, 0.1),
            (-2.0, 2.0, 0.0),
            0.0788835110959627,
        ),
        (
            [[2, 2, 2], [3, 1, 1], [0, -1, -2]],
            [0, 0, 0],
            (-0.3, -0.2, -0.1),
            (-3.0, 1.0, -1.0),
            0.3272009010004533,
        ),
    ],
)
def test_policy_gradient_gives_rlax_losses(logits, actions, advantages, weights, expected):
    gain = policy_gradient(chosen_log_probs(logits, actions), row(*advantages))
    assert -(row(*weights) * gain).mean().item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        # min(rho A, clip(rho, .8, 1.28) A) and its derivative in rho; PPO paper eq. 7 (6.1 misplaces a parenthesis:
        # with `clip(rho), 1 - eps, 1 + eps` the third row would not be 1.28).
        (1.0, 1.0, 1.0, 1.0),
        (1.2, 1.0, 1.2, 1.0),
        (1.5, 1.0, 1.28, 0.0),  # too far up already: no gain from going on
        (0.5, 1.0, 0.5, 1.0),  # the way back stays open
        (1.5, -1.0, -1.5, -1.0),
        (0.5, -1.0, -0.8, 0.0),
        (0.9, -1.0, -0.9, -1.0),
    ],
)
def test_clipped_with_unequal_ranges(ratio, advantage, gain, slope):
    r = row(ratio).requires_grad_()
    result = clipped(r, row(advantage), clip_low=0.2, clip_high=0.28)
    result.sum().backward()
    assert result.item() == pytest.approx(gain)
    assert r.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [
        # max(min(rho A, clip(rho) A), 3 A) where A < 0; Ye et al. eq. 5.
        (2.0, -1.0, -2.0, -1.0),
        (9.0, -1.0, -3.0, 0.0),
        (9.0, -2.0, -6.0, 0.0),
        (0.5, -1.0, -0.8, 0.0),
        (9.0, 1.0, 1.2, 0.0),  # nothing changes where A > 0
        (0.5, 1.0, 0.5, 1.0),
    ],
)
def test_dual_clipped_bounds_the_loss_of_bad_actions(ratio, advantage, gain, slope):
    r = row(ratio).requires_grad_()
    result = dual_clipped(r, row(advantage), clip_low=0.2, clip_high=0.2, bound=3.0)
    result.sum().backward()
    assert result.item() == pytest.approx(gain)
    assert r.grad.item() == pytest.approx(slope)


def test_clipped_weight_caps_the_weight_and_keeps_every_gradient():
    # CISPO: min(rho, 1 + 4) A log pi. rho .01 is not raised (no lower bound), 3 stays, 9 becomes 5.
    # The slope in log pi is weight * A.
    log_probs = row(-1.0, -2.0, -3.0).requires_grad_()
    ratio = row(0.01, 3.0, 9.0).requires_grad_()
    gain = clipped_weight(ratio, log_probs, row(2.0, 2.0, -1.0), clip_high=4.0)
    assert gain[0].tolist() == pytest.approx([-0.02, -12.0, 15.0])
    gain.sum().backward()
    assert log_probs.grad[0].tolist() == pytest.approx([0.02, 6.0, -5.0])
    assert ratio.grad is None


def test_the_cap_of_clipped_weight_is_relative_to_one():
    # TRL's `cispo` clamps at epsilon_high itself; with its default .2 every weight would be at most .2. Here a ratio
    # of 1 keeps weight 1 however small clip_high is.
    assert clipped_weight(row(1.0), row(-1.0), row(1.0), clip_high=0.2).item() == -1.0
    assert clipped_weight(row(1.0), row(-1.0), row(1.0), clip_high=0.0).item() == -1.0


@settings(max_examples=100, deadline=None)
@given(log_ratio=st.floats(-5, 5), advantage=st.floats(-10, 10), low=st.floats(0, 1), high=st.floats(0, 3))
def test_clipped_is_a_lower_bound_that_touches_at_ratio_one(log_ratio, advantage, low, high):
    """L_CLIP <= L_CPI, with equality at ratio 1 (PPO paper, section 3)."""
    a = row(advantage)
    ratio = row(math.exp(log_ratio))
    single = clipped(ratio, a, clip_low=low, clip_high=high)
    assert (single <= unclipped(ratio, a)).all()
    double = dual_clipped(ratio, a, clip_low=low, clip_high=high, bound=3.0)
    assert (double >= single).all()
    one = torch.ones(1, 1, dtype=torch.float64)
    for gain in (
        clipped(one, a, clip_low=low, clip_high=high),
        dual_clipped(one, a, clip_low=low, clip_high=high, bound=3.0),
    ):
        assert torch.equal(gain, unclipped(one, a))


@pytest.mark.parametrize("clip", [0.0, 3e-4, 0.2])
def test_at_ratio_one_every_surrogate_has_the_plain_gradient(clip):
    advantages = row(2.0, -0.5, 0.0, 1e-3)
    old = row(-1.0, -2.0, -3.0, -0.1)
    gains = {
        "policy_gradient": lambda ratio, lp: policy_gradient(lp, advantages),
        "unclipped": lambda ratio, lp: unclipped(ratio, advantages),
        "clipped": lambda ratio, lp: clipped(ratio, advantages, clip_low=clip, clip_high=clip),
        "dual": lambda ratio, lp: dual_clipped(ratio, advantages, clip_low=clip, clip_high=clip, bound=3.0),
        "clipped_weight": lambda ratio, lp: clipped_weight(ratio, lp, advantages, clip_high=clip),
    }
    for name, gain in gains.items():
        log_probs = old.clone().requires_grad_()
        gain((log_probs - old).exp(), log_probs).sum().backward()
        # d/d log pi of log pi A is A.
        assert torch.allclose(log_probs.grad, advantages), name


def test_a_baseline_does_not_change_the_expected_gradient():
    """E[grad log pi(a) B] = sum_a pi(a) grad log pi(a) B = B grad sum_a pi(a) = 0, by enumeration."""
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_probs = logits.log_softmax(0)
    baseline = torch.full((1, 7), 3.7, dtype=torch.float64)
    (log_probs.exp().detach() * policy_gradient(log_probs.unsqueeze(0), baseline)).sum().backward()
    assert logits.grad.abs().max().item() < 1e-12
