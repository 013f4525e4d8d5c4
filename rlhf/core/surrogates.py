"""Policy surrogates: what is maximised per action.

Each returns the gain [B, T] whose mean is to grow; at token ratios of 1 every one has the gradient of the plain policy
gradient. (For a row's ratio see `importance_ratio`.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


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
