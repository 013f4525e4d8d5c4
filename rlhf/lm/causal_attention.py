"""Causal attention in float32 on a CPU, forward and backward, by products of whole blocks.

torch's own kernel for it cuts queries into blocks of 32 and keys likewise, whose products are too small to be fast:
on an AMD EPYC it reaches 30 GFLOP/s of one core where a batched product reaches 85. Here the queries are cut into
wider blocks, each of which meets the keys up to its own end in one batched product, so that most of what a causal
mask hides is never computed:

    S = scale Q K^T, hidden where a key comes after its query;  P = softmax(S);  O = P V
    dV = P^T dO;  dP = dO V^T;  dS = P (dP - rowsum(dP P));  dQ = scale dS K;  dK = scale dS^T Q

P is kept for the backward pass, S^2 / 2 numbers a head, hence `LONGEST`: beyond, torch's own kernel keeps less.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 64
"""Queries of a block, at most: wide enough for fast products, narrow enough to skip most of what is hidden."""
LONGEST = 512
"""Positions up to which the weights are kept."""


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
    """Attention of every position to itself and those before it.

    Args:
        queries: [h, B, S, D] float32, contiguous.
        keys: [g, B, S, D], g divides h: each serves h / g consecutive query heads.
        values: [g, B, S, D].
        scale: Factor of the scores.

    Returns:
        [h, B, S, D]. Differentiable once.
    """
    times = len(queries) // len(keys)
    if times > 1:
        keys, values = keys.repeat_interleave(times, dim=0), values.repeat_interleave(times, dim=0)
    if queries.shape[2] > LONGEST:
        rows = (heads.transpose(0, 1) for heads in (queries, keys, values))
        return scaled_dot_product_attention(*rows, is_causal=True, scale=scale).transpose(0, 1)
    flat = (heads.flatten(0, 1) for heads in (queries, keys, values))
    return _Attention.apply(*flat, scale).view(queries.shape)  # type: ignore[return-value]


def _blocks(length: int) -> list[tuple[int, int]]:
    """Start and end of blocks of nearly equal width."""
    count = -(-length // BLOCK)
    edges = [length * index // count for index in range(count + 1)]
    return list(pairwise(edges))


class _Attention(torch.autograd.Function):
    """Queries, keys and values [N, S, D] to [N, S, D]."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        output = torch.empty_like(queries)
        weights = []
        for start, end in _blocks(queries.shape[1]):
            hidden = queries.new_full((end - start, end), -torch.inf).triu_(start + 1)
            scores = torch.baddbmm(hidden, queries[:, start:end], keys[:, :end].transpose(1, 2), alpha=scale)
            weights.append(torch.softmax(scores, dim=-1))
            output[:, start:end] = torch.bmm(weights[-1], values[:, :end])
        ctx.save_for_backward(queries, keys, values, *weights)
        ctx.scale = scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        queries, keys, values, *weights = ctx.saved_tensors
        queries_gradient = torch.empty_like(queries)
        keys_gradient = values_gradient = None
        # The last block first: it sees every key, so that its products are what the others are added to.
        for (start, end), own in reversed(list(zip(_blocks(queries.shape[1]), weights, strict=True))):
            outer = gradient[:, start:end]
            inner = torch.bmm(outer, values[:, :end].transpose(1, 2))
            inner = torch.ops.aten._softmax_backward_data(inner, own, -1, own.dtype)
            torch.mul(torch.bmm(inner, keys[:, :end]), ctx.scale, out=queries_gradient[:, start:end])
            of_keys = torch.bmm(inner.transpose(1, 2), queries[:, start:end])
            of_values = torch.bmm(own.transpose(1, 2), outer)
            if keys_gradient is None or values_gradient is None:
                keys_gradient, values_gradient = of_keys.mul_(ctx.scale), of_values
            else:
                keys_gradient[:, :end].add_(of_keys, alpha=ctx.scale)
                values_gradient[:, :end] += of_values
        return queries_gradient, keys_gradient, values_gradient, None
