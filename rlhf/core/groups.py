"""Credit from comparing the rows of a group, beyond the plain mean: OPO, pass@k, and several rewards at once (GDPO)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.core.advantages import group_relative, group_statistics
from rlhf.core.masking import Reduce, identity


def length_weighted(
    scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"], *, mask: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    """Score minus the mean of its group's scores weighted by the rows' lengths.

    `A_i = r_i - sum_j(l_j r_j) / sum_j(l_j)`: the baseline of least variance where the squared gradient of a row's
    log-prob grows with its length. Source: Hao et al. 2025 (OPO), https://arxiv.org/abs/2505.23585.

    Args:
        scores: One score per row.
        group_ids: Rows with one id are one group.
        mask: True where the action was the policy's own; a row's length is its number of own actions.

    Returns:
        [B]; exactly 0 in a group of equal scores.

    Raises:
        ConfigError: A group has fewer than two rows.

    >>> mask = torch.tensor([[True, True, True], [True, False, False]])
    >>> length_weighted(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), mask=mask)
    tensor([ 0.2500, -0.7500])
    """
    _, _, deviations, index = group_statistics(scores, group_ids)
    lengths = mask.sum(dim=1).to(scores.dtype)
    zeros = torch.zeros_like(scores)
    weighted = zeros.index_add(0, index, lengths * deviations)[index] / zeros.index_add(0, index, lengths)[index]
    # Deviations from the plain mean stand for the scores, so that equal scores give exactly 0; a group of rows
    # without any action has nothing to weigh by, and none of its rows is learnt from.
    return torch.where(weighted.isfinite(), deviations - weighted, 0.0)


def best_of_group(scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """The lead of a group's best row over its second best; 0 for all others, and for everyone where the best tie.

    `A_i = max_j r_j - max_{j != i} r_j`: what the row adds to the best of its group (max@k, and for 0/1 scores
    pass@k, with k the group's size). Source: Tang et al. 2025, https://arxiv.org/abs/2503.19595.

    Args:
        scores: One score per row.
        group_ids: Rows with one id are one group.

    Returns:
        [B], not negative.

    Raises:
        ConfigError: A group has fewer than two rows.

    >>> best_of_group(torch.tensor([0.5, 3.0, 1.0]), torch.zeros(3, dtype=torch.int64))
    tensor([0., 2., 0.])
    """
    index = group_statistics(scores, group_ids)[3]
    groups = int(index.max()) + 1 if len(index) else 0

    def best(values: Tensor) -> Tensor:
        lowest = values.new_full((groups,), -torch.inf)
        return lowest.scatter_reduce(0, index, values, "amax")[index]

    leads = scores == best(scores)
    leaders = torch.zeros_like(scores).index_add(0, index, leads.to(scores.dtype))[index]
    second = best(torch.where(leads, -torch.inf, scores))
    return torch.where(leads & (leaders == 1), scores - second, 0.0)


def group_relative_parts(
    parts: Float[Tensor, "B P"],
    group_ids: Int[Tensor, " B"],
    *,
    weights: Sequence[float],
    epsilon: float = 1e-4,
    reduce: Reduce = identity,
) -> Float[Tensor, " B"]:
    """Centre and scale every part of the reward in its group by itself, sum, then scale the sum over the rollout.

    `S_i = sum_k w_k (r_ik - mean_k) / (std_k + epsilon)`, `A_i = (S_i - mean(S)) / (std(S) + epsilon)`. Where parts are
    summed first (GRPO), different combinations of parts can get one advantage; here they stay apart.
    Source: GDPO, https://arxiv.org/abs/2601.05242; sample standard deviations as in TRL.

    Args:
        parts: One score per row and part; NaN where a part does not apply to a row, which then counts as average.
        group_ids: Rows with one id are one group; whole groups lie on one process.
        weights: P factors.
        epsilon: Added to every standard deviation.
        reduce: Sums a tensor over processes; called twice.

    Returns:
        [B]

    Raises:
        ConfigError: A group has fewer than two rows.

    >>> parts = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> group_relative_parts(parts, torch.tensor([0, 0]), weights=[2.0, 1.0], epsilon=0.0)
    tensor([ 0.7071, -0.7071])
    """
    total = torch.zeros_like(parts[:, 0])
    for part, weight in zip(parts.unbind(1), weights, strict=True):
        total = total + weight * _applicable_relative(part, group_ids, epsilon=epsilon)
    summed, count = reduce(torch.stack([total.sum(), total.new_tensor(float(len(total)))]))
    mean = summed / count
    variance = reduce(((total - mean) ** 2).sum()) / (count - 1).clamp(min=1)
    # Where epsilon is 0 and all are equal, 0 / tiny is the 0 that 0 / 0 should be.
    return (total - mean) / (variance.sqrt() + epsilon).clamp(min=torch.finfo(total.dtype).tiny)


def _applicable_relative(part: Tensor, group_ids: Tensor, *, epsilon: float) -> Tensor:
    """`group_relative` over the rows that have a score; the others, and rows alone in having one, get 0."""
    scored = ~part.isnan()
    if scored.all():
        return group_relative(part, group_ids, epsilon=epsilon)
    _, index = torch.unique(group_ids, return_inverse=True)
    scored &= torch.zeros_like(index).index_add(0, index, scored.long())[index] > 1
    relative = torch.zeros_like(part)
    relative[scored] = group_relative(part[scored], group_ids[scored], epsilon=epsilon)
    return relative
