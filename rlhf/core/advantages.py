"""Credit assignment: how much better an action was than expected.

All functions take and return [B, T], except the group functions, which take one score per row. Masked steps
(prompt, padding, tool tokens, the reset step of NEXT_STEP autoreset) get 0 and let credit pass through.
"""

from __future__ import annotations

from typing import Literal, assert_never

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.core.masking import Reduce, identity
from rlhf.errors import ConfigError

GroupScale = Literal["sample_std", "population_std", "batch_std", "mean", "none"]

CACHED_ELEMENTS = 1 << 18
"""Elements of a block of rows that a CPU core's cache holds together with the scan's temporaries: 1 MiB of float32."""


def discounted_scan(x: Float[Tensor, "B T"], decay: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Solve `y_t = x_t + decay_t * y_{t+1}` with `y_T = 0`, for all t at once.

    Recursive doubling: after round k, y_t holds the sum over the next 2^k steps. That is log2(T) passes over
    contiguous memory instead of T dependent ones. On a CPU rows go in blocks that stay in the cache between passes.

    Args:
        x: Increments.
        decay: Factors; a 0 cuts the recurrence.

    Returns:
        [B, T]

    >>> discounted_scan(torch.tensor([[1.0, 1.0, 1.0]]), torch.full((1, 3), 0.5))
    tensor([[1.7500, 1.5000, 1.0000]])
    """
    block = max(1, CACHED_ELEMENTS // max(1, x.shape[1]))
    if x.shape[0] > block and x.device.type == "cpu":
        return torch.cat([discounted_scan(*rows) for rows in zip(x.split(block), decay.split(block), strict=True)])
    y, span, steps = x.clone(), 1, x.shape[1]
    while span < steps:
        reach = steps - span
        y[:, :reach] += decay[:, :reach] * y[:, span:]
        decay = decay[:, : max(reach - span, 0)] * decay[:, span : max(reach, span)]
        span *= 2
    return y


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    *,
    next_values: Float[Tensor, "B T"],
    episode_ends: Bool[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    discount: float,
    gae_lambda: float | Float[Tensor, "B 1"],
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalized advantage estimation.

    `delta_t = r_t + discount * V(s_{t+1}) - V(s_t)`, `A_t = delta_t + discount * gae_lambda * A_{t+1}`, cut after an
    episode's end; a masked step hands `A_{t+1}` on unchanged. Returns are `A + V`, taken before any whitening.
    Source: Schulman et al. 2016, https://arxiv.org/abs/1506.02438, eq. 16.

    Args:
        rewards: Reward of each action.
        values: V(s_t).
        next_values: V(s_{t+1}): 0 where terminated, V of the true next state where truncated or cut.
        episode_ends: True where the episode ended after this action.
        mask: True where the action was the policy's own.
        discount: gamma in [0, 1].
        gae_lambda: lambda in [0, 1], one for all or one per row.

    Returns:
        Advantages and returns, both 0 where masked.

    >>> one_row = lambda *x: torch.tensor([x])
    >>> gae(one_row(0.0, 1.0), one_row(0.5, 0.5), next_values=one_row(0.5, 0.0), episode_ends=one_row(False, True),
    ...     mask=one_row(True, True), discount=1.0, gae_lambda=0.5)
    (tensor([[0.2500, 0.5000]]), tensor([[0.7500, 1.0000]]))
    """
    deltas = torch.where(mask, rewards + discount * next_values - values, 0.0)
    decay = torch.where(mask, discount * gae_lambda * (~episode_ends).to(values.dtype), 1.0)
    advantages = torch.where(mask, discounted_scan(deltas, decay), 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)


def length_adaptive_lambda(mask: Bool[Tensor, "B T"], *, alpha: float) -> Float[Tensor, "B 1"]:
    """`1 - 1 / (alpha * l)` for a row of l actions, so that the weights of the temporal differences sum to alpha * l.

    Never below 0, which rows shorter than 1 / alpha get.
    Source: VAPO, https://arxiv.org/abs/2504.05118 (alpha .05).

    Args:
        mask: True where the action was the policy's own.
        alpha: > 0.

    Returns:
        [B, 1]

    >>> length_adaptive_lambda(torch.ones(1, 100, dtype=torch.bool), alpha=0.05)
    tensor([[0.8000]])
    """
    lengths = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return (1 - 1 / (alpha * lengths)).clamp(min=0)


def next_own_step(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Index of the next unmasked step after t, or T where there is none.

    >>> next_own_step(torch.tensor([[True, False, True]]))
    tensor([[2, 2, 3]])
    """
    rows, steps = mask.shape
    own = torch.where(mask, torch.arange(steps, device=mask.device), steps)
    from_here = own.flip(1).cummin(dim=1).values.flip(1)
    return torch.cat([from_here[:, 1:], from_here.new_full((rows, 1), steps)], dim=1)


def carry_values(
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    episode_ends: Bool[Tensor, "B T"],
    bootstrap: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B T"]:
    """V(s_{t+1}) read off a row's own values: the value at the next unmasked step.

    Args:
        values: V(s_t).
        mask: True where the action was the policy's own; values elsewhere are not looked at.
        episode_ends: True where the episode ended after this action; the next value is 0 there.
        bootstrap: V of the state after the last step of each row; None means 0.

    Returns:
        [B, T]; meaningless (but finite) where masked.

    >>> carry_values(torch.tensor([[1.0, 9.0, 2.0]]), torch.tensor([[True, False, True]]),
    ...              episode_ends=torch.tensor([[False, False, True]]))
    tensor([[2., 2., 0.]])
    """
    last = values.new_zeros(values.shape[0]) if bootstrap is None else bootstrap
    extended = torch.cat([values, last.unsqueeze(1)], dim=1)
    return torch.where(episode_ends, 0.0, extended.gather(1, next_own_step(mask)))


def rewards_to_go(
    rewards: Float[Tensor, "B T"],
    *,
    episode_ends: Bool[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    discount: float,
    next_values: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Discounted sum of this reward and all later ones of its episode.

    `G_t = r_t + discount * G_{t+1}`; with `next_values`, an episode that was truncated, or a row that was cut, goes on
    with its bootstrap value. Source: Williams 1992, https://doi.org/10.1007/BF00992696.

    Args:
        rewards: Reward of each action.
        episode_ends: True where the episode ended after this action.
        mask: True where the action was the policy's own.
        discount: gamma in [0, 1].
        next_values: V(s_{t+1}), 0 where terminated; None adds nothing at the end.

    Returns:
        [B, T], 0 where masked.

    >>> rewards_to_go(torch.tensor([[1.0, 1.0, 1.0]]), episode_ends=torch.tensor([[False, True, False]]),
    ...               mask=torch.ones(1, 3, dtype=torch.bool), discount=0.5)
    tensor([[1.5000, 1.0000, 1.0000]])
    """
    gains = torch.where(mask, rewards, 0.0)
    if next_values is not None:
        is_last = next_own_step(mask) == mask.shape[1]
        gains = gains + torch.where(mask & (episode_ends | is_last), discount * next_values, 0.0)
    decay = torch.where(mask, discount * (~episode_ends).to(rewards.dtype), 1.0)
    return torch.where(mask, discounted_scan(gains, decay), 0.0)


def n_step_returns(
    rewards: Float[Tensor, "B T"],
    *,
    next_values: Float[Tensor, "B T"],
    episode_ends: Bool[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    discount: float,
    n: int,
) -> Float[Tensor, "B T"]:
    """Sum of up to n discounted rewards, then the bootstrap value.

    `G_t = r_t + ... + discount^(n-1) r_{t+n-1} + discount^n V(s_{t+n})`, shorter where the episode or the row ends.
    Source: Sutton 1988; Mnih et al. 2016, https://arxiv.org/abs/1602.01783.

    Args:
        rewards: Reward of each action.
        next_values: V(s_{t+1}), 0 where terminated.
        episode_ends: True where the episode ended after this action.
        mask: True where the action was the policy's own.
        discount: gamma in [0, 1].
        n: Number of rewards, at least 1.

    Returns:
        [B, T], 0 where masked.

    >>> n_step_returns(torch.tensor([[1.0, 2.0]]), next_values=torch.tensor([[10.0, 20.0]]), n=2, discount=0.5,
    ...                episode_ends=torch.zeros(1, 2, dtype=torch.bool), mask=torch.ones(1, 2, dtype=torch.bool))
    tensor([[ 7., 12.]])
    """
    following = next_own_step(mask)
    stops = episode_ends | (following == mask.shape[1])
    following = following.clamp(max=mask.shape[1] - 1)
    one_step = rewards + discount * next_values
    returns = one_step
    for _ in range(min(n, mask.shape[1]) - 1):
        returns = torch.where(stops, one_step, rewards + discount * returns.gather(1, following))
    return torch.where(mask, returns, 0.0)


def group_statistics(
    scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"], Float[Tensor, " B"], Int[Tensor, " B"]]:
    """Per row: size and mean of its group, deviation from the mean (exactly 0 where all are equal), group number.

    Raises:
        ConfigError: A group has fewer than two rows.

    >>> group_statistics(torch.tensor([3.0, 1.0]), torch.tensor([7, 7]))
    (tensor([2., 2.]), tensor([2., 2.]), tensor([ 1., -1.]), tensor([0, 0]))
    """
    _, index = torch.unique(group_ids, return_inverse=True)
    groups = int(index.max()) + 1 if len(index) else 0
    sizes = scores.new_zeros(groups).index_add_(0, index, torch.ones_like(scores))
    if (sizes < 2).any():
        raise ConfigError(
            "a group of one completion has nothing to be compared with",
            where="advantages",
            got=f"{int((sizes < 2).sum())} of {groups} groups with a single row",
            expected="at least 2 rows in every group",
            remedy="Raise group_size, or use rewards_to_go or gae.",
        )
    means = scores.new_zeros(groups).index_add_(0, index, scores) / sizes
    # The mean of equal floats may miss them by a rounding error; compare with one member of the group instead.
    member = torch.zeros_like(means).scatter_(0, index, scores)[index]
    differing = torch.zeros_like(means).index_add_(0, index, (scores != member).to(scores.dtype))
    deviations = torch.where((differing > 0)[index], scores - means[index], 0.0)
    return sizes[index], means[index], deviations, index


def group_relative(
    scores: Float[Tensor, " B"],
    group_ids: Int[Tensor, " B"],
    *,
    scale: GroupScale = "sample_std",
    epsilon: float = 1e-4,
    reduce: Reduce = identity,
) -> Float[Tensor, " B"]:
    """Score minus its group's mean, divided by a standard deviation.

    `A_i = (r_i - mean(r)) / (std(r) + epsilon)`; a group of equal scores gives exactly 0.
    Source: Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1.2; `none`: Liu et al. 2025,
    https://arxiv.org/abs/2503.20783; `batch_std`: Liu et al. 2025, https://arxiv.org/abs/2508.08221; `mean`, which
    weighs a prompt by one over its rate of success: Tajwar et al. 2026, https://arxiv.org/abs/2602.02710.

    Args:
        scores: One score per row.
        group_ids: Rows with one id are one group; whole groups lie on one process.
        scale: sample_std (n - 1, as torch and TRL), population_std (n), batch_std (sample std over all scores of
            all processes), mean (of the group) or none.
        epsilon: Added to what divides.
        reduce: Sums a tensor over processes; only batch_std calls it.

    Returns:
        [B]

    Raises:
        ConfigError: A group has fewer than two rows, or the scale is the mean and a score is negative.

    >>> group_relative(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64),
    ...                scale="population_std", epsilon=0.0)
    tensor([ 1., -1., -1.,  1.])
    """
    sizes, means, deviations, index = group_statistics(scores, group_ids)
    group_squares = torch.zeros_like(scores).index_add_(0, index, deviations**2)[index]
    match scale:
        case "none":
            return deviations
        case "mean":
            _refuse_negative(scores)
            return deviations / (means + epsilon).clamp(min=torch.finfo(scores.dtype).tiny)
        case "sample_std":
            variance = group_squares / (sizes - 1)
        case "population_std":
            variance = group_squares / sizes
        case "batch_std":
            total, count = reduce(torch.stack([scores.sum(), scores.new_tensor(float(len(scores)))]))
            variance = reduce(((scores - total / count) ** 2).sum()) / (count - 1)
        case _:
            assert_never(scale)
    # Where epsilon is 0 and all scores are equal, 0 / tiny is the 0 that 0 / 0 should be.
    return deviations / (variance.sqrt() + epsilon).clamp(min=torch.finfo(scores.dtype).tiny)


def leave_one_out(scores: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Score minus the mean of the other scores of its group.

    `A_i = r_i - mean_{j != i} r_j = n / (n - 1) * (r_i - mean(r))`.
    Source: Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740; Kool et al. 2019.

    Args:
        scores: One score per row.
        group_ids: Rows with one id are one group.

    Returns:
        [B]

    Raises:
        ConfigError: A group has fewer than two rows.

    >>> leave_one_out(torch.tensor([3.0, 1.0, 2.0]), torch.zeros(3, dtype=torch.int64))
    tensor([ 1.5000, -1.5000,  0.0000])
    """
    sizes, _, deviations, _ = group_statistics(scores, group_ids)
    return deviations * sizes / (sizes - 1)


def _refuse_negative(scores: Tensor) -> None:
    if (scores < 0).any():
        raise ConfigError(
            "a group's mean can only scale scores that are not negative: it stands for a rate of success",
            where="advantages.scale",
            got=f"a score of {scores.min().item():g}",
            remedy="Use a reward between 0 and 1, or scale: sample_std.",
        )
