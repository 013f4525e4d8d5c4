from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.core.values import clipped_value_loss, squared_value_loss


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_squared_loss_has_the_factor_one_half():
    # 1/2 (1 - 3)^2 = 2; the gradient is V - return.
    values = row(1.0, 3.0).requires_grad_()
    losses = squared_value_loss(values, row(3.0, 3.0))
    losses.sum().backward()
    assert losses[0].tolist() == [2.0, 0.0]
    assert values.grad[0].tolist() == [-2.0, 0.0]


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        # 1/2 max((V - R)^2, (clip(V, old +- .2) - R)^2); Engstrom et al. 2020, appendix A.
        (1.0, 0.0, 1.0, 0.32, 0.0),  # clipped to .2: 1/2 .8^2, and no pull further from the old value
        (1.0, 0.0, 3.0, 3.92, 0.0),  # clipped to .2: 1/2 2.8^2 > 1/2 2^2
        (1.0, 0.0, -1.0, 2.0, 2.0),  # 1/2 2^2 > 1/2 1.2^2: the way back stays open
        (0.1, 0.0, 1.0, 0.405, -0.9),  # inside the range both are equal
        (-1.0, 0.0, -3.0, 3.92, 0.0),
    ],
)
def test_clipped_loss_by_hand(value, old, target, loss, slope):
    values = row(value).requires_grad_()
    result = clipped_value_loss(values, row(target), old_values=row(old), clip_range=0.2)
    result.sum().backward()
    assert result.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(slope)


@settings(max_examples=60, deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-5, 5), st.floats(0.01, 2))
def test_clipping_never_lowers_the_loss(value, old, target, clip_range):
    clipped = clipped_value_loss(row(value), row(target), old_values=row(old), clip_range=clip_range)
    plain = squared_value_loss(row(value), row(target))
    assert (clipped >= plain).all()
    if abs(value - old) <= clip_range:
        assert clipped.item() == pytest.approx(plain.item(), abs=1e-9)
