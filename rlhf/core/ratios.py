"""Importance ratios between the policy that is trained and the policy that collected."""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.core.masking import blank, masked_mean, masked_sum

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before exp, so that no ratio overflows float32; e^20 is far beyond any clip range."""

RatioLevel = Literal["token", "sequence_geometric_mean", "sequence_geometric_mean_token", "sequence_product"]


def importance_ratio(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | None,
    *,
    level: RatioLevel = "token",
) -> Float[Tensor, "B T"]:
    """Importance ratio pi / pi_old, per action or one per row.

    token: `rho_t = pi(a_t) / pi_old(a_t)`. sequence_geometric_mean: `exp(mean_t log rho_t)` (GSPO).
    sequence_geometric_mean_token: the same value, but at each action the gradient of its own log-prob
    (GSPO-token).
    sequence_product: `prod_t rho_t`, the exact importance weight of the whole row. Row ratios are repeated along T,
    so that every surrogate and aggregation reads the same shape; their gradient reaches every action of the row, so
    that advantages which differ within a row act through their mean.
    Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347; Zheng et al. 2025, https://arxiv.org/abs/2507.18071.

    Args:
        log_probs: Under the policy being trained.
        old_log_probs: Under the policy that collected.
        mask: True where the action was the policy's own; at token level None where every action was.
        level: What one ratio belongs to.

    Returns:
        [B, T]; 1 where masked at token level.

    >>> log_probs = torch.tensor([[0.5, 0.25]]).log()
    >>> old = torch.tensor([[0.25, 0.5]]).log()
    >>> importance_ratio(log_probs, old, torch.ones(1, 2, dtype=torch.bool))
    tensor([[2.0000, 0.5000]])
    >>> importance_ratio(log_probs, old, torch.ones(1, 2, dtype=torch.bool), level="sequence_product")
    tensor([[1., 1.]])
    """
    log_ratio = blank(log_probs - old_log_probs, mask)
    if level == "token":
        return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))
    assert mask is not None, "a row's ratio is a mean or a sum over its mask"
    match level:
        case "sequence_geometric_mean":
            log_ratio = masked_mean(log_ratio, mask, dim=1).unsqueeze(1).expand_as(log_ratio)
        case "sequence_geometric_mean_token":
            row = masked_mean(log_ratio, mask, dim=1).unsqueeze(1).detach()
            log_ratio = row + log_ratio - log_ratio.detach()
        case "sequence_product":
            log_ratio = masked_sum(log_ratio, mask, dim=1).unsqueeze(1).expand_as(log_ratio)
        case _:
            assert_never(level)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
