"""Blocked causal attention against torch's own in double precision."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rlhf.lm import causal_attention as module
from rlhf.lm.causal_attention import BLOCK, causal_attention


def heads(count, length, *, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, length, 8, generator=generator).requires_grad_()


def torchs_own(queries, keys, values, scale):
    rows = [part.detach().double().transpose(0, 1).requires_grad_() for part in (queries, keys, values)]
    repeated = [part.repeat_interleave(len(queries) // part.shape[1], dim=1) for part in rows]
    return rows, scaled_dot_product_attention(*repeated, is_causal=True, scale=scale)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_output_and_gradients_equal_torchs(length, key_heads):
    parts = heads(4, length, seed=0), heads(key_heads, length, seed=1), heads(key_heads, length, seed=2)
    scale = 0.7  # not the default, 8 ** -0.5
    output = causal_attention(*parts, scale=scale)
    rows, expected = torchs_own(*parts, scale)
    torch.testing.assert_close(output.double(), expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(3))
    got = torch.autograd.grad(output, parts, slope)
    wanted = torch.autograd.grad(expected, rows, slope.double().transpose(0, 1))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.transpose(0, 1), atol=2e-5, rtol=1e-5)


def test_long_rows_leave_it_to_torch(monkeypatch):
    parts = heads(4, 40, seed=0), heads(2, 40, seed=1), heads(2, 40, seed=2)
    blocked = causal_attention(*parts, scale=0.5)
    monkeypatch.setattr(module, "LONGEST", 39)
    monkeypatch.setattr(module._Attention, "apply", None)  # not called
    torch.testing.assert_close(causal_attention(*parts, scale=0.5), blocked, atol=1e-6, rtol=1e-5)


def test_large_scores_and_a_position_without_company_stay_finite():
    parts = heads(1, 2 * BLOCK, seed=0), heads(1, 2 * BLOCK, seed=1), heads(1, 2 * BLOCK, seed=2)
    output = causal_attention(*parts, scale=1e4)
    output.sum().backward()
    torch.testing.assert_close(output[0, :, 0], parts[2][0, :, 0])  # the first position sees itself alone
    assert all(part.grad.isfinite().all() for part in parts)
