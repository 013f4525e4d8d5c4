"""Sums, means and standardization over the actions that count.

Masked positions may hold anything, NaN included: they are replaced, never multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes and returns the result to each of them."""


def identity(tensor: Tensor) -> Tensor:
    """The reduction of a single process."""
    return tensor


def masked_sum(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None, *, dim: int | None = None) -> Tensor:
    """Sum of `x` where `mask` is True.

    Args:
        x: Any shape.
        mask: Same shape; True where the entry counts. None where every entry does, which saves operations.
        dim: Dimension to sum over; None sums everything.

    Returns:
        A scalar, or `x` without `dim`.

    >>> masked_sum(torch.tensor([1.0, 2.0, float("nan")]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    kept = blank(x, mask)
    return kept.sum() if dim is None else kept.sum(dim)


def blank(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None) -> Float[Tensor, "*shape"]:
    """`x` with 0 where `mask` is False; `x` itself where it is None, which means that every entry counts.

    >>> blank(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    return x if mask is None else torch.where(mask, x, 0.0)


def masked_mean(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], *, dim: int | None = None) -> Tensor:
    """Mean of `x` where `mask` is True; 0 where nothing counts.

    >>> masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
    tensor(1.5000)
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(x, mask, dim=dim) / count.clamp(min=1)


def masked_var(x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """Biased (population) variance of `x` where `mask` is True.

    >>> masked_var(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([True, True, False]))
    tensor(1.)
    """
    # Masked entries are replaced before the square: a NaN squared would leak into the gradient through 0 * NaN.
    centred = torch.where(mask, x - masked_mean(x, mask), 0.0)
    return masked_mean(centred**2, mask)


def standardize(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None,
    *,
    reduce: Reduce = identity,
    keep_mean: bool = False,
    epsilon: float = 1e-8,
) -> Float[Tensor, "*shape"]:
    """Shift to mean 0 and scale to standard deviation 1 over the unmasked entries of all processes.

    `(x - mean) / sqrt(var + epsilon)` with the biased variance, in two passes so that large means lose no precision;
    the second pass also takes out the first mean's rounding error, which equal entries would otherwise be scaled by.
    Source: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593 (whitening).

    Args:
        x: Any shape.
        mask: Same shape; None where every entry counts.
        reduce: Sums a tensor over processes; called twice.
        keep_mean: True where only the scale changes. Whitened rewards must keep their mean: shifting a reward
            per token makes long and short completions differ in sign.
        epsilon: Added to the variance.

    Returns:
        Same shape; 0 where masked.

    >>> standardize(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    if mask is None and reduce is identity:  # on the hot path of small policies: the same in half as many operations
        mean = x.mean()
        centred = x - mean
        centred = centred - centred.mean()
        scaled = centred * torch.rsqrt(centred.square().mean() + epsilon)
        return scaled + mean if keep_mean else scaled
    own_count = x.new_full((), float(x.numel())) if mask is None else mask.sum().to(x.dtype)
    total, count = reduce(torch.stack([masked_sum(x, mask), own_count]))
    count = count.clamp(min=1)
    mean = total / count
    centred = blank(x - mean, mask)
    error, variance = reduce(torch.stack([centred.sum(), (centred**2).sum()])) / count
    scaled = blank(centred - error, mask) * torch.rsqrt(variance + epsilon)
    return blank(scaled + mean, mask) if keep_mean else scaled
