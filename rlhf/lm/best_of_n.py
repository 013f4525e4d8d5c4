"""Best-of-n sampling: what the best of n answers by a proxy is worth, and how far that is from the sampled policy.

Best-of-n optimizes a reward model without any training, so it is the second way, beside RL, of seeing what happens when
a proxy is optimized too far. One set of N answers a prompt estimates all n <= N at once, without bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rlhf.errors import DataError


def best_of_n_kl(n: int) -> float:
    r"""KL(best-of-n || the policy that is sampled), in nats: log n - (n - 1) / n.

    It depends on nothing but n. Exact where no two answers tie (a density); with ties, as among texts of high
    probability that are drawn twice, an upper bound. Source: Stiennon et al. 2020 (arXiv 2009.01325), as used by
    Gao et al. 2023 (arXiv 2210.10760); the bound: Beirami et al. 2024 (arXiv 2401.01879).

    Args:
        n: Answers drawn, at least 1.

    >>> best_of_n_kl(1)
    0.0
    >>> round(best_of_n_kl(2), 4)  # log 2 - 1/2
    0.1931
    """
    if n < 1:
        raise DataError("best-of-n draws one answer or more", where="best_of_n_kl", got=n)
    return math.log(n) - (n - 1) / n


def best_of_n_weights(total: int, n: int) -> Tensor:
    r"""How often each of N ranked answers is the best of n of them, drawn without replacement.

    w_i = C(i - 1, n - 1) / C(N, n): the answer of rank i is the best where the other n - 1 rank below it.

    Args:
        total: N.
        n: 1 <= n <= N.

    Returns:
        [N] float64, the worst answer first; sums to 1.

    Raises:
        DataError: n is not in that range.

    >>> best_of_n_weights(4, 2) * 6  # of the 6 pairs, 3 have the best answer, 2 the second, 1 the third
    tensor([0., 1., 2., 3.], dtype=torch.float64)
    """
    if not 1 <= n <= total:
        raise DataError(
            "the best of n can be estimated from at least n answers a prompt",
            where="best_of_n_weights",
            got=f"n = {n} of {total} answers",
            remedy="Draw more answers, or lower n.",
        )
    weights = torch.zeros(total, dtype=torch.float64)
    weight = n / total  # w_N; downwards w_{i-1} = w_i (i - n) / (i - 1), which never overflows as C(N, n) does
    for rank in range(total, n - 1, -1):
        weights[rank - 1] = weight
        weight *= (rank - n) / max(rank - 1, 1)
    return weights


def best_of_n_mean(proxy: Tensor, values: Tensor, n: int) -> Tensor:
    r"""Unbiased estimate of the expected value of the best of n answers, per prompt, from N >= n answers to each.

    The mean of `values` over all C(N, n) subsets of n answers, each represented by its answer of highest proxy; equal
    proxies share their place, as if ties were broken at random. With `values = proxy` it is the expected proxy.
    Source: the estimator of Nakano et al. 2021 (WebGPT, arXiv 2112.09332), as used by Gao et al. 2023
    (arXiv 2210.10760).

    Args:
        proxy: [P, N] what chooses.
        values: [P, N] what is reported of the chosen answer, such as the gold score.
        n: 1 <= n <= N.

    Returns:
        [P] float64.

    Raises:
        DataError: n is not in that range.

    >>> best_of_n_mean(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.0, 6.0, 3.0]]), 2)  # (0 + 0 + 3) / 3
    tensor([1.], dtype=torch.float64)
    """
    weights = best_of_n_weights(proxy.shape[1], n)
    return torch.stack([_ordered(*pair) @ weights for pair in zip(proxy, values, strict=True)])


def _ordered(proxy: Tensor, values: Tensor) -> Tensor:
    """[N] values by rising proxy, those of equal proxy replaced by their mean."""
    _, group, counts = proxy.unique(return_inverse=True, return_counts=True)  # groups are sorted by proxy
    sums = torch.zeros(len(counts), dtype=torch.float64).index_add_(0, group, values.double())
    return (sums / counts).repeat_interleave(counts)
