"""Losses of the critic, per action."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def squared_value_loss(values: Float[Tensor, "B T"], returns: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """`1/2 (V - return)^2`.

    >>> squared_value_loss(torch.tensor([[1.0]]), torch.tensor([[3.0]]))
    tensor([[2.]])
    """
    return 0.5 * (values - returns) ** 2


def clipped_value_loss(
    values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    *,
    old_values: Float[Tensor, "B T"],
    clip_range: float,
) -> Float[Tensor, "B T"]:
    """`1/2 max((V - return)^2, (V_old + clip(V - V_old, +-clip_range) - return)^2)`.

    Source: Engstrom et al. 2020, https://arxiv.org/abs/2005.12729, appendix A.

    >>> one = torch.tensor([[1.0]])
    >>> clipped_value_loss(one, one, old_values=torch.tensor([[0.0]]), clip_range=0.5)
    tensor([[0.1250]])
    """
    near = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)
