"""Factors of the surrogate: importance weights against a generation engine, masks of stale rows, discount^t."""

from __future__ import annotations

from typing import assert_never

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.core.algorithm import MaskedWeights, RolloutCorrection, TruncatedWeights
from rlhf.core.masking import masked_mean
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


def off_policy_rows(
    log_probs: Float[Tensor, "B T"],
    behaviour_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    threshold: float,
) -> Bool[Tensor, "B 1"]:
    """True for rows that the policy has left behind: `mean_t (log mu - log pi) > threshold`.

    The objective leaves them out where their advantage is negative: pushing down what the policy would hardly write
    any more destabilises it. Source: OPSM of DeepSeek-AI 2025, https://arxiv.org/abs/2512.02556.

    Args:
        log_probs: Under the policy that is trained.
        behaviour_log_probs: Under what drew the actions.
        mask: True where the action was the policy's own.
        threshold: Nats per action.

    Returns:
        [B, 1]

    >>> off_policy_rows(torch.tensor([[-3.0, -1.0]]), torch.tensor([[-1.0, -1.0]]),
    ...                 torch.ones(1, 2, dtype=torch.bool), threshold=0.9)
    tensor([[True]])
    """
    with torch.no_grad():
        return masked_mean(behaviour_log_probs - log_probs, mask, dim=1).unsqueeze(1) > threshold


def state_weights(
    mask: Bool[Tensor, "B T"], *, episode_ends: Bool[Tensor, "B T"], discount: float
) -> Float[Tensor, "B T"]:
    """`discount^t` for the own action number t of its episode, counted from 0.

    The factor of the policy gradient theorem for discounted returns. Nearly every library leaves it out, which makes
    the update no gradient of any objective (Nota and Thomas 2020, https://arxiv.org/abs/1906.07073), but learns faster.

    Args:
        mask: True where the action was the policy's own; other steps do not count.
        episode_ends: True where the episode ended after this action; counting begins anew after it.
        discount: gamma in [0, 1].

    Returns:
        [B, T] float32, 0 where masked.

    >>> state_weights(torch.ones(1, 3, dtype=torch.bool), episode_ends=torch.tensor([[False, True, False]]),
    ...               discount=0.5)
    tensor([[1.0000, 0.5000, 1.0000]])
    """
    number = mask.long().cumsum(dim=1) - mask.long()  # own actions of the row before this one
    begins = torch.cat([torch.zeros_like(episode_ends[:, :1]), episode_ends[:, :-1]], dim=1)
    # The count at the latest beginning of an episode; counts never fall, so the running maximum is the latest.
    first = torch.where(begins, number, 0).cummax(dim=1).values
    return torch.where(mask, discount ** (number - first).float(), 0.0)
