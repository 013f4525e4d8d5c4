"""Importance weights against a generation engine whose probabilities differ from the trainer's."""

from __future__ import annotations

from typing import assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.core.algorithm import MaskedWeights, RolloutCorrection, TruncatedWeights
from rlhf.core.ratios import RatioLevel, importance_ratio


def correction_weights(
    old_log_probs: Float[Tensor, "B T"],
    sampling_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    correction: RolloutCorrection,
) -> Float[Tensor, "B T"]:
    """`w = pi_old / mu`, truncated from above, or masked outside a band; detached.

    Truncated: `min(w, cap)`. Masked: `w` where `low <= w <= high`, else 0. The weight is the ratio of its level, not
    the token ratio under a sequence's mask.
    Source: Yao et al. 2025, https://fengyao.notion.site/off-policy-rl (truncated); IcePop, https://arxiv.org/abs/2510.18855
    (masked).

    Args:
        old_log_probs: By the trainer's forward, under the policy that collected.
        sampling_log_probs: As the engine reported them.
        mask: True where the action was the policy's own.
        correction: The rule.

    Returns:
        [B, T]

    >>> correction_weights(torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.2]]).log(),
    ...                    torch.ones(1, 2, dtype=torch.bool), correction=TruncatedWeights(cap=2.0))
    tensor([[2., 1.]])
    """
    levels: dict[str, RatioLevel] = {
        "token": "token",
        "sequence": "sequence_product",
        "sequence_geometric_mean": "sequence_geometric_mean",
    }
    with torch.no_grad():
        weights = importance_ratio(old_log_probs, sampling_log_probs, mask, level=levels[correction.level])
        match correction:
            case TruncatedWeights(cap=cap):
                return weights.clamp(max=cap)
            case MaskedWeights(low=low, high=high):
                return torch.where((weights >= low) & (weights <= high), weights, 0.0)
            case _:
                assert_never(correction)
