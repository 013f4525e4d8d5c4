from __future__ import annotations

import pytest
import torch

from rlhf.core.algorithm import MaskedWeights, TruncatedWeights
from rlhf.core.corrections import correction_weights

NAN = float("nan")
# pi_old / mu per action: .25, 4, 1 and 2; product of the unmasked three .25 * 4 * 2 = 2, geometric mean 2^(1/3).
OLD = torch.tensor([[0.1, 0.8, 0.5, 0.4]], dtype=torch.float64).log()
ENGINE = torch.tensor([[0.4, 0.2, 0.5, 0.2]], dtype=torch.float64).log()
MASK = torch.tensor([[True, True, False, True]])


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        # min(w, 2): no lower bound.
        (TruncatedWeights(cap=2.0), [0.25, 2.0, 2.0]),
        (TruncatedWeights(cap=1.5, level="sequence"), [1.5, 1.5, 1.5]),
        (TruncatedWeights(cap=5.0, level="sequence"), [2.0, 2.0, 2.0]),
        # w inside [.5, 5], else 0 (IcePop).
        (MaskedWeights(low=0.5, high=5.0), [0.0, 4.0, 2.0]),
        (MaskedWeights(low=0.2, high=3.0), [0.25, 0.0, 2.0]),
        # A row that is kept has the row's weight, not its tokens' (OpenRLHF's seq-mask-tis multiplies the raw token
        # ratios .25, 4, 2 under a sequence's mask), and a row that is dropped has 0 everywhere.
        (MaskedWeights(low=0.5, high=3.0, level="sequence"), [2.0, 2.0, 2.0]),
        (MaskedWeights(low=0.5, high=1.9, level="sequence"), [0.0, 0.0, 0.0]),
        (MaskedWeights(low=0.9, high=1.3, level="sequence_geometric_mean"), [2 ** (1 / 3)] * 3),
        (MaskedWeights(low=0.9, high=1.2, level="sequence_geometric_mean"), [0.0, 0.0, 0.0]),
    ],
)
def test_weights_by_hand(correction, expected):
    weights = correction_weights(OLD, torch.where(MASK, ENGINE, NAN), MASK, correction=correction)
    assert weights[MASK].tolist() == pytest.approx(expected)
    assert weights.isfinite().all()


def test_weights_are_constants():
    old = OLD.clone().requires_grad_()
    assert not correction_weights(old, ENGINE, MASK, correction=TruncatedWeights()).requires_grad


def test_bounds_belong_to_the_band():
    even = torch.zeros(1, 1)
    assert correction_weights(even, even, even == 0, correction=MaskedWeights(low=1.0, high=1.0)).item() == 1.0
