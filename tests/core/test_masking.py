from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.core.masking import masked_mean, masked_sum, masked_var, standardize

NAN = float("nan")
MASK = torch.tensor([[True, True, False], [True, False, False]])
X = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, float("inf")]])


def test_sums_and_means_leave_masked_entries_out():
    assert masked_sum(X, MASK).item() == 9.0
    assert masked_sum(X, MASK, dim=1).tolist() == [3.0, 6.0]
    assert masked_mean(X, MASK).item() == 3.0
    assert masked_mean(X, MASK, dim=1).tolist() == [1.5, 6.0]
    # (1-3)^2 + (2-3)^2 + (6-3)^2 = 14, over 3.
    assert masked_var(X, MASK).item() == pytest.approx(14 / 3)


def test_nothing_unmasked_gives_zero():
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_mean(X, nothing).item() == 0.0
    assert masked_mean(X, nothing, dim=1).tolist() == [0.0, 0.0]
    assert standardize(X, nothing).tolist() == torch.zeros(2, 3).tolist()


@pytest.mark.parametrize("statistic", [masked_sum, masked_mean, masked_var])
def test_masked_garbage_leaks_into_no_gradient(statistic):
    x = X.clone().requires_grad_()
    statistic(x, MASK).backward()
    assert x.grad.isfinite().all()
    assert (x.grad[~MASK] == 0).all()


def test_standardize_uses_the_biased_variance():
    # Mean 2.5, population variance 1.25: -1.5 / sqrt(1.25) = -1.3416408. (The sample variance 5/3 would give -1.1619.)
    result = standardize(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4, dtype=torch.bool), epsilon=0.0)
    assert result.tolist() == pytest.approx([-1.3416408, -0.4472136, 0.4472136, 1.3416408])


def test_epsilon_is_inside_the_root():
    # Mean 0, variance 1e-8, epsilon 1e-8: 1e-4 / sqrt(2e-8) = 0.70710678 (outside the root it would be 0.9999).
    result = standardize(torch.tensor([1e-4, -1e-4], dtype=torch.float64), torch.ones(2, dtype=torch.bool))
    assert result.tolist() == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)])


def test_standardize_can_keep_the_mean():
    # As above, shifted back by the mean 2.5.
    result = standardize(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4, dtype=torch.bool), keep_mean=True)
    assert result.tolist() == pytest.approx([2.5 - 1.3416408, 2.5 - 0.4472136, 2.5 + 0.4472136, 2.5 + 1.3416408])


def test_a_large_common_mean_costs_no_precision():
    # 2^20 + k is exact in float32, so the result must equal that of k alone.
    offsets = torch.tensor([1.0, 2.0, 3.0, 4.0])
    result = standardize(offsets + 2**20, torch.ones(4, dtype=torch.bool), epsilon=0.0)
    assert result.tolist() == pytest.approx([-1.3416408, -0.4472136, 0.4472136, 1.3416408], rel=1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 100.1, -7.7e4, 1e8 / 3])
@pytest.mark.parametrize("count", [3, 1000, 4097])
def test_equal_entries_become_zero_whatever_the_rounding(value, count):
    # The mean of equal floats may miss them by one unit in the last place; that error must not be scaled up to 1.
    for mask in (torch.ones(count, dtype=torch.bool), None):
        assert standardize(torch.full((count,), value), mask).abs().max().item() <= 2e-3


@pytest.mark.parametrize("keep_mean", [False, True])
def test_no_mask_is_a_mask_of_ones(keep_mean):
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 5
    everything = torch.ones(7, 3, dtype=torch.bool)
    assert torch.equal(masked_sum(x, None), masked_sum(x, everything))
    assert torch.allclose(
        standardize(x, None, keep_mean=keep_mean), standardize(x, everything, keep_mean=keep_mean), rtol=1e-12
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, 6), keep_mean=st.booleans())
def test_two_processes_get_what_one_would(seed, cut, keep_mean, on_two_processes):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64) * 3 + 5
    mask = torch.rand(6, 4, generator=generator) < 0.7
    whole = standardize(x, mask, keep_mean=keep_mean)
    parts = on_two_processes(
        lambda rows, reduce: standardize(x[rows], mask[rows], reduce=reduce, keep_mean=keep_mean),
        slice(None, cut),
        slice(cut, None),
    )
    assert torch.allclose(torch.cat(parts), whole, atol=1e-12)
