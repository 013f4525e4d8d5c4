"""Policy surrogates: what is maximised per action.

Each returns the gain [B, T] whose mean is to grow; at token ratios of 1 every one has the gradient of the plain policy
gradient. (For a row's ratio see `importance_ratio`.)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.core.masking import masked_mean


def policy_gradient(log_probs: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """`log pi(a_t) * A_t`. Source: Williams 1992; Sutton et al. 1999.

    >>> policy_gradient(torch.tensor([[-1.0]]), torch.tensor([[2.0]]))
    tensor([[-2.]])
    """
    return log_probs * advantages


def unclipped(ratio: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """`rho_t * A_t` (conservative policy iteration). Source: Kakade and Langford 2002; PPO paper, eq. 6.

    >>> unclipped(torch.tensor([[1.5]]), torch.tensor([[2.0]]))
    tensor([[3.]])
    """
    return ratio * advantages


def clipped(
    ratio: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"], *, clip_low: float, clip_high: float
) -> Float[Tensor, "B T"]:
    """`min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)`: no gain from moving further than the clip range.

    Source: Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7 (section 6.1 of the paper misplaces a
    parenthesis); clip_high > clip_low: Yu et al. 2025, https://arxiv.org/abs/2503.14476, eq. 10.

    >>> clipped(torch.tensor([[1.5, 0.5, 1.5]]), torch.tensor([[1.0, 1.0, -1.0]]), clip_low=0.2, clip_high=0.2)
    tensor([[ 1.2000,  0.5000, -1.5000]])
    """
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def dual_clipped(
    ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
    bound: float,
) -> Float[Tensor, "B T"]:
    """The clipped surrogate, and where A < 0 never below `bound * A`.

    Source: Ye et al. 2020, https://arxiv.org/abs/1912.09729, eq. 5.

    >>> dual_clipped(torch.tensor([[9.0]]), torch.tensor([[-1.0]]), clip_low=0.2, clip_high=0.2, bound=3.0)
    tensor([[-3.]])
    """
    single = clipped(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    return torch.where(advantages < 0, torch.maximum(single, bound * advantages), single)


def clipped_weight(
    ratio: Float[Tensor, "B T"], log_probs: Float[Tensor, "B T"], advantages: Float[Tensor, "B T"], *, clip_high: float
) -> Float[Tensor, "B T"]:
    """`stop_gradient(min(rho, 1 + clip_high)) * A * log pi` (CISPO): every action keeps a gradient.

    There is no lower bound. Source: MiniMax 2025, https://arxiv.org/abs/2506.13585, eq. 4 and 5.

    >>> clipped_weight(torch.tensor([[9.0]]), torch.tensor([[-1.0]]), torch.tensor([[2.0]]), clip_high=4.0)
    tensor([[-10.]])
    """
    return ratio.detach().clamp(max=1 + clip_high) * advantages * log_probs


def geometric_mean(
    ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, "B T"]:
    """`exp(mean_t c_t) * A`, where c_t is log rho_t, clipped from the side on which it gains (GMPO).

    For A > 0, `c_t = min(log rho_t, clip_high)`, else `max(log rho_t, -clip_low)`. One action's extreme ratio moves a
    row of l actions by its l-th root only.
    Source: Zhao et al. 2025, https://arxiv.org/abs/2507.20673 (clip range exp(-.4) to exp(.4)).

    Args:
        ratio: Of each action, > 0.
        advantages: Of each action; one value per row in the paper.
        mask: True where the action was the policy's own.
        clip_low: In nats.
        clip_high: In nats.

    Returns:
        [B, T], the row's ratio repeated.

    >>> ratio = torch.tensor([[0.5, 9.0]])
    >>> geometric_mean(ratio, torch.ones(1, 2), ratio > 0, clip_low=0.4, clip_high=0.6931472)
    tensor([[1., 1.]])
    """
    log_ratio = ratio.log()
    kept = torch.where(advantages > 0, log_ratio.clamp(max=clip_high), log_ratio.clamp(min=-clip_low))
    return masked_mean(kept, mask, dim=1).unsqueeze(1).exp() * advantages


def probability_masked(
    ratio: Float[Tensor, "B T"],
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    limit: float,
) -> Float[Tensor, "B T"]:
    """`rho A`, and 0 where pi - pi_old has already moved by more than `limit` in A's direction (DPPO, binary TV).

    A ratio of 1.3 is much for a probable action and nothing for a rare one; the difference of probabilities, the total
    variation distance of "this action or another", treats them alike.
    Source: https://arxiv.org/abs/2602.04879.

    >>> old, new = torch.tensor([[0.5, 0.01]]), torch.tensor([[0.8, 0.1]])
    >>> probability_masked(new / old, new.log(), old.log(), torch.ones(1, 2), limit=0.2)
    tensor([[ 0., 10.]])
    """
    moved = (log_probs.exp() - old_log_probs.exp()).detach()
    spent = torch.where(advantages > 0, moved > limit, (moved < -limit) & (advantages < 0))
    return torch.where(spent, 0.0, ratio * advantages)


def soft_gate(
    ratio: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    *,
    temperature_positive: float,
    temperature_negative: float,
) -> Float[Tensor, "B T"]:
    """`4 / tau * sigmoid(tau (rho - 1)) * A`: slope A at rho = 1, fading smoothly on both sides (SAPO).

    tau is `temperature_positive` where A > 0, else `temperature_negative`.
    Source: Gao et al. 2025, https://arxiv.org/abs/2511.20347.

    >>> soft_gate(torch.tensor([[1.0]]), torch.tensor([[3.0]]), temperature_positive=2.0, temperature_negative=1.0)
    tensor([[3.]])
    """
    tau = torch.where(advantages > 0, temperature_positive, temperature_negative)
    return 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
