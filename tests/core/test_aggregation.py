from __future__ import annotations

import pytest
import torch

from rlhf.core.aggregation import aggregate, denominator
from rlhf.core.algorithm import FixedLength, SequenceMean, SequenceSum, TokenMean
from rlhf.errors import ConfigError

NAN = float("nan")
MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [False, False, False, False]])
LOSSES = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, NAN, NAN], [NAN, NAN, NAN, NAN]])
"""Rows of 4, 2 and 0 actions, with sums 10, 30, 0 and means 2.5, 15, 0."""


@pytest.mark.parametrize(
    ("aggregation", "numerator", "divisor", "weights"),
    [
        # Six actions: 40 / 6.
        (TokenMean(), 40.0, 6.0, [1.0, 1.0]),
        # (2.5 + 15 + 0) / 3: the empty row is a row, as in GRPO's 1/G. An action weighs 1/length of its row.
        (SequenceMean(), 17.5, 3.0, [0.25, 0.5]),
        # 40 / 3
        (SequenceSum(), 40.0, 3.0, [1.0, 1.0]),
        # 40 / (3 x 8): a constant, whatever the lengths are (Dr. GRPO).
        (FixedLength(length=8), 40.0, 24.0, [1.0, 1.0]),
    ],
)
def test_numerators_and_denominators_by_hand(aggregation, numerator, divisor, weights):
    losses = LOSSES.clone().requires_grad_()
    total = aggregate(losses, MASK, aggregation)
    assert total.item() == numerator
    assert denominator(MASK, aggregation).item() == divisor
    total.backward()
    assert losses.grad.tolist() == [[weights[0]] * 4, [weights[1]] * 2 + [0.0] * 2, [0.0] * 4]


@pytest.mark.parametrize("aggregation", [TokenMean(), SequenceMean(), SequenceSum(), FixedLength(length=8)])
def test_both_parts_add_up_over_any_split(aggregation):
    parts = [slice(0, 1), slice(1, 3)]
    assert sum(aggregate(LOSSES[part], MASK[part], aggregation) for part in parts) == aggregate(
        LOSSES, MASK, aggregation
    )
    assert sum(denominator(MASK[part], aggregation) for part in parts) == denominator(MASK, aggregation)


def test_fixed_length_without_a_length_says_what_to_do():
    with pytest.raises(ConfigError, match=r"algorithm.aggregation.length.*with_length"):
        denominator(MASK, FixedLength())
