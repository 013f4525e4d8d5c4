from __future__ import annotations

import math

import pytest
import torch

from rlhf.core.ratios import importance_ratio

NAN = float("nan")
ALL = torch.ones(1, 3, dtype=torch.bool)
OLD = torch.tensor([[0.5, 0.25, 0.2]], dtype=torch.float64).log()
NEW = torch.tensor([[0.25, 0.5, 0.4]], dtype=torch.float64).log()
"""Token ratios 1/2, 2, 2: product 2, geometric mean 2^(1/3)."""


def test_each_level_by_hand():
    assert importance_ratio(NEW, OLD, ALL)[0].tolist() == pytest.approx([0.5, 2.0, 2.0])
    product = importance_ratio(NEW, OLD, ALL, level="sequence_product")
    assert product[0].tolist() == pytest.approx([2.0] * 3)
    geometric = importance_ratio(NEW, OLD, ALL, level="sequence_geometric_mean")
    assert geometric[0].tolist() == pytest.approx([2 ** (1 / 3)] * 3)


@pytest.mark.parametrize(
    ("level", "expected"),
    [("token", [0.5, 1.0, 2.0]), ("sequence_product", [1.0] * 3), ("sequence_geometric_mean", [1.0] * 3)],
)
def test_masked_steps_count_in_no_ratio_and_no_gradient(level, expected):
    mask = torch.tensor([[True, False, True]])
    new = torch.where(mask, NEW, NAN).requires_grad_()
    ratio = importance_ratio(new, torch.where(mask, OLD, NAN), mask, level=level)
    assert ratio[0].tolist() == pytest.approx(expected)
    ratio.sum().backward()
    assert new.grad.isfinite().all()
    assert new.grad[0, 1] == 0


@pytest.mark.parametrize("level", ["token", "sequence_product", "sequence_geometric_mean"])
def test_a_row_without_own_steps_has_ratio_one(level):
    assert (importance_ratio(NEW, OLD, ~ALL, level=level) == 1).all()


def test_row_ratios_pass_their_gradient_to_every_action():
    # s = exp(mean d): ds/dlog pi_t = s / 3. w = exp(sum d): dw/dlog pi_t = w. Each repeated 3 times along T.
    for level, each in (("sequence_geometric_mean", 2 ** (1 / 3) / 3), ("sequence_product", 2.0)):
        new = NEW.clone().requires_grad_()
        importance_ratio(new, OLD, ALL, level=level).sum().backward()
        assert new.grad[0].tolist() == pytest.approx([3 * each] * 3)


def test_log_ratios_are_clamped_to_20_so_that_nothing_overflows():
    # SPEC: "clamp log rho to +-20"; float32 would overflow at e^88.7.
    new = torch.tensor([[0.0, -1000.0, 19.0]])
    ratio = importance_ratio(new, torch.tensor([[-1000.0, 0.0, 0.0]]), ALL)
    assert ratio[0].tolist() == pytest.approx([math.exp(20), math.exp(-20), math.exp(19)], rel=1e-6)
    # The product is clamped once, as a whole, and not factor by factor: 15 + 15 - 25 = 5.
    whole = importance_ratio(torch.tensor([[15.0, 15.0, -25.0]]), torch.zeros(1, 3), ALL, level="sequence_product")
    assert whole[0].tolist() == pytest.approx([math.exp(5)] * 3, rel=1e-6)


def test_the_sequence_product_is_the_exact_importance_weight():
    """E_old[w f] = E_new[f] over all 3^2 sequences of two dependent actions."""
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(3, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2)]
    second = [torch.randn(3, 3, generator=generator, dtype=torch.float64).log_softmax(1) for _ in range(2)]
    outcome = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    pairs = [(i, j) for i in range(3) for j in range(3)]
    log_probs, old_log_probs = (
        torch.stack([torch.stack([first[k][i], second[k][i, j]]) for i, j in pairs]) for k in range(2)
    )
    weights = importance_ratio(log_probs, old_log_probs, torch.ones(9, 2, dtype=torch.bool), level="sequence_product")[
        :, 0
    ]
    flat = torch.stack([outcome[i, j] for i, j in pairs])
    expected = (log_probs.sum(1).exp() * flat).sum()
    assert (old_log_probs.sum(1).exp() * weights * flat).sum().item() == pytest.approx(expected.item())


def test_an_unknown_level_is_refused():
    with pytest.raises(AssertionError):
        importance_ratio(NEW, OLD, ALL, level="sequence")
