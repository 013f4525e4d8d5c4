"""From losses per action to one number, as a numerator and a denominator.

Numerators add up over microbatches and processes, denominators too; dividing once, at the end, makes the gradient
the same under every split.
"""

from __future__ import annotations

from typing import assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.core.algorithm import Aggregation, FixedLength, SequenceMean, SequenceSum, TokenMean
from rlhf.core.masking import masked_mean, masked_sum
from rlhf.errors import ConfigError


def aggregate(
    losses: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"] | None, aggregation: Aggregation
) -> Float[Tensor, ""]:
    """The numerator: a sum of what these rows contribute.

    Args:
        losses: Loss of each action.
        mask: True where the action was the policy's own; None where every action was.
        aggregation: What a row, and an action, weighs.

    Returns:
        A scalar.

    >>> aggregate(torch.tensor([[1.0, 3.0]]), torch.ones(1, 2, dtype=torch.bool), SequenceMean())
    tensor(2.)
    """
    match aggregation:
        case SequenceMean():
            return (losses.sum(dim=1) / losses.shape[1] if mask is None else masked_mean(losses, mask, dim=1)).sum()
        case TokenMean() | SequenceSum() | FixedLength():
            return masked_sum(losses, mask)
        case _:
            assert_never(aggregation)


def denominator(mask: Bool[Tensor, "B T"], aggregation: Aggregation) -> Float[Tensor, ""]:
    """What the sum of all numerators is divided by: actions, rows, or rows x length.

    A row without any unmasked action counts as a row, as in the papers' 1/G.

    Args:
        mask: True where the action was the policy's own.
        aggregation: As in `aggregate`.

    Returns:
        A float32 scalar.

    Raises:
        ConfigError: fixed_length without a length.

    >>> denominator(torch.ones(2, 3, dtype=torch.bool), FixedLength(length=10))
    tensor(20.)
    """
    match aggregation:
        case TokenMean():
            return mask.sum().float()
        case SequenceMean() | SequenceSum():
            return torch.tensor(float(mask.shape[0]), device=mask.device)
        case FixedLength(length=length):
            if length is None:
                raise ConfigError(
                    "fixed_length needs the length it divides by",
                    where="algorithm.aggregation.length",
                    expected="the maximum completion length",
                    remedy="Set it, or call algorithm.with_length(max_completion_length).",
                )
            return torch.tensor(float(mask.shape[0] * length), device=mask.device)
        case _:
            assert_never(aggregation)
