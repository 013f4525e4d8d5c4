"""From facts to credit: Rollout -> Experience."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor

from rlhf.core.advantages import (
    carry_values,
    gae,
    group_relative,
    leave_one_out,
    length_adaptive_lambda,
    n_step_returns,
    rewards_to_go,
)
from rlhf.core.aggregation import denominator
from rlhf.core.algorithm import (
    AlgorithmConfig,
    BestOfGroup,
    Gae,
    GreedyBaseline,
    GroupRelative,
    GroupRelativeParts,
    KlInReward,
    LeaveOneOut,
    NStep,
    RewardsToGo,
)
from rlhf.core.corrections import correction_weights, state_weights
from rlhf.core.groups import best_of_group, group_relative_parts, length_weighted
from rlhf.core.kl import kl_estimate
from rlhf.core.masking import Reduce, identity, standardize
from rlhf.core.types import Experience, Rollout, present
from rlhf.errors import ConfigError


@torch.no_grad()
def estimate(
    rollout: Rollout, algorithm: AlgorithmConfig, *, kl_coef: float = 0.0, reduce: Reduce = identity
) -> Experience:
    """Assign credit to every action of a rollout.

    Folds an in-reward KL penalty into the rewards, computes advantages and returns, and standardizes advantages over
    the whole rollout where the algorithm says so. Nothing crosses processes except through `reduce`. The rollout's
    masked steps may hold anything, NaN included; the experience's hold 0.

    Args:
        rollout: What a collector saw.
        algorithm: The row of settings.
        kl_coef: Current coefficient of an in-reward KL penalty.
        reduce: Sums a tensor over all processes.

    Returns:
        Experience with advantages [B, T], and returns [B, T] where there is a critic.

    Raises:
        ConfigError: The rollout lacks what the algorithm needs (values, reference, groups, sampling log-probs).
    """
    _require(rollout, algorithm)
    rollout = _blank_masked(rollout)
    rewards = rollout.rewards
    if isinstance(algorithm.kl, KlInReward):
        penalty = kl_estimate(rollout.old_log_probs, present(rollout.ref_log_probs), estimator=algorithm.kl.estimator)
        rewards = rewards - kl_coef * penalty
    if algorithm.whiten_rewards:
        rewards = standardize(rewards, rollout.action_mask, reduce=reduce, keep_mean=True)
    advantages, returns = _advantages(rollout, rewards, algorithm, reduce)
    experience = Experience(
        inputs=rollout.inputs,
        actions=rollout.actions,
        action_mask=rollout.action_mask,
        old_log_probs=rollout.old_log_probs,
        advantages=advantages,
        returns=returns if algorithm.needs_critic else None,
        old_values=rollout.values if algorithm.needs_critic else None,
        live_log_probs=rollout.live_log_probs,
        live_entropy=rollout.live_entropy,
        live_values=rollout.live_values if algorithm.needs_critic else None,
        ref_log_probs=rollout.ref_log_probs,
        weights=_weights(rollout, algorithm),
        imitation=_imitation(rollout, algorithm, reduce),
        behaviour_log_probs=_behaviour(rollout) if algorithm.off_policy_threshold is not None else None,
        on_policy=rollout.on_policy,
    )
    if getattr(algorithm.advantages, "standardize", "none") == "batch":
        return standardize_advantages(experience, reduce=reduce)
    return experience


def standardize_advantages(experience: Experience, *, reduce: Reduce = identity) -> Experience:
    """Return the experience with advantages of mean 0 and standard deviation 1 over its unmasked actions.

    Args:
        experience: A whole minibatch or rollout, before it is cut into microbatches.
        reduce: Sums a tensor over all processes.
    """
    return replace(experience, advantages=standardize(experience.advantages, experience.counted, reduce=reduce))


def _blank_masked(rollout: Rollout) -> Rollout:
    """Put 0 wherever the mask is False.

    Done once here, because in a loss it would be too late: where a masked NaN meets the policy's output, 0 * NaN is
    NaN in the gradient, although the loss itself leaves it out.
    """
    names = ("rewards", "old_log_probs", "values", "next_values", "ref_log_probs", "sampling_log_probs")
    given = {name: getattr(rollout, name) for name in names if getattr(rollout, name) is not None}
    return replace(rollout, **{name: torch.where(rollout.action_mask, value, 0.0) for name, value in given.items()})


def _advantages(
    rollout: Rollout, rewards: Tensor, algorithm: AlgorithmConfig, reduce: Reduce
) -> tuple[Tensor, Tensor | None]:
    """Advantages and, where a critic is trained, returns."""
    mask, ends = rollout.action_mask, rollout.episode_ends
    match algorithm.advantages:
        case Gae() as axis:
            return _gae(rollout, rewards, axis)
        case NStep(n=n, discount=discount):
            returns = n_step_returns(
                rewards, next_values=_next_values(rollout), episode_ends=ends, mask=mask, discount=discount, n=n
            )
            return torch.where(mask, returns - present(rollout.values), 0.0), returns
        case RewardsToGo(discount=discount, baseline=baseline):
            tail = _next_values(rollout) if baseline == "value" else None
            returns = rewards_to_go(rewards, episode_ends=ends, mask=mask, discount=discount, next_values=tail)
            return (
                torch.where(mask, returns - present(rollout.values), 0.0) if baseline == "value" else returns
            ), returns
        case GreedyBaseline():
            returns = rewards_to_go(rewards, episode_ends=ends, mask=mask, discount=1.0)
            return torch.where(mask, returns - present(rollout.baselines).unsqueeze(1), 0.0), None
        case GroupRelative() | GroupRelativeParts() | LeaveOneOut() | BestOfGroup():
            by_row = _compared(rollout, rewards.sum(1), algorithm.advantages, reduce)
            return torch.where(mask, by_row.unsqueeze(1), 0.0), None
        case _:
            assert_never(algorithm.advantages)


def _gae(rollout: Rollout, rewards: Tensor, axis: Gae) -> tuple[Tensor, Tensor]:
    """Advantages, and returns, which may have a lambda of their own."""

    def run(gae_lambda: float | Tensor) -> tuple[Tensor, Tensor]:
        return gae(
            rewards,
            present(rollout.values),
            next_values=_next_values(rollout),
            episode_ends=rollout.episode_ends,
            mask=rollout.action_mask,
            discount=axis.discount,
            gae_lambda=gae_lambda,
        )

    own = axis.gae_lambda
    if axis.length_adaptive is not None:
        own = length_adaptive_lambda(rollout.action_mask, alpha=axis.length_adaptive).to(rewards.dtype)
    advantages, returns = run(own)
    return advantages, returns if axis.critic_lambda is None else run(axis.critic_lambda)[1]


def _compared(
    rollout: Rollout,
    scores: Tensor,
    axis: GroupRelative | GroupRelativeParts | LeaveOneOut | BestOfGroup,
    reduce: Reduce,
) -> Tensor:
    """[B]: one advantage per row, from the rows of its group."""
    group_ids = present(rollout.group_ids)
    match axis:
        case GroupRelative(baseline="length_weighted"):
            return length_weighted(scores, group_ids, mask=rollout.action_mask)
        case GroupRelative(scale=scale, epsilon=epsilon):
            return group_relative(scores, group_ids, scale=scale, epsilon=epsilon, reduce=reduce)
        case GroupRelativeParts(epsilon=epsilon):
            parts, weights = present(rollout.reward_parts).to(scores.dtype), rollout.part_weights
            return group_relative_parts(parts, group_ids, weights=weights, epsilon=epsilon, reduce=reduce)
        case LeaveOneOut():
            return leave_one_out(scores, group_ids)
        case BestOfGroup():
            return best_of_group(scores, group_ids)
        case _:
            assert_never(axis)


def _next_values(rollout: Rollout) -> Tensor:
    if rollout.next_values is not None:
        return rollout.next_values
    return carry_values(present(rollout.values), rollout.action_mask, episode_ends=rollout.episode_ends)


def _behaviour(rollout: Rollout) -> Tensor:
    return rollout.old_log_probs if rollout.sampling_log_probs is None else rollout.sampling_log_probs


def _weights(rollout: Rollout, algorithm: AlgorithmConfig) -> Tensor | None:
    """What multiplies the surrogate at each action; None where nothing does."""
    weights = None
    if algorithm.rollout_correction is not None:
        weights = correction_weights(
            rollout.old_log_probs,
            present(rollout.sampling_log_probs),
            rollout.action_mask,
            correction=algorithm.rollout_correction,
        )
    if algorithm.discounted_state_weight:
        discount = getattr(algorithm.advantages, "discount", 1.0)
        by_time = state_weights(rollout.action_mask, episode_ends=rollout.episode_ends, discount=discount)
        weights = by_time if weights is None else weights * by_time
    return weights


def _imitation(rollout: Rollout, algorithm: AlgorithmConfig, reduce: Reduce) -> Tensor | None:
    """What the log-likelihood of each action counts: coefficient x all / successes, so that successes are averaged."""
    if algorithm.imitation is None:
        return None
    mask, succeeded = rollout.action_mask, rollout.scores > algorithm.imitation.above
    counts = torch.stack([denominator(rows, algorithm.aggregation) for rows in (mask, mask[succeeded])])
    everything, successes = reduce(counts).unbind()
    factor = algorithm.imitation.coefficient * everything / successes.clamp(min=1)
    return torch.where(mask & succeeded[:, None], factor, 0.0)


def _require(rollout: Rollout, algorithm: AlgorithmConfig) -> None:
    """Refuse a rollout that lacks what the algorithm reads."""
    measured = None if rollout.on_policy else rollout.old_log_probs
    needs = [
        (
            algorithm.needs_old_log_probs,
            measured,
            "old_log_probs",
            "Collect with this algorithm, or with collector.old_log_probs=recompute.",
        ),
        (algorithm.wants_values, rollout.values, "values", "Give the policy a critic, or use group advantages."),
        (
            algorithm.needs_reference,
            rollout.ref_log_probs,
            "ref_log_probs",
            "Give the collector a reference policy, or set kl to {type: none}.",
        ),
        (algorithm.needs_groups, rollout.group_ids, "group_ids", "Collect several rows per prompt or start state."),
        (
            isinstance(algorithm.advantages, GreedyBaseline),
            rollout.baselines,
            "baselines",
            "Only a prompt collector scores greedy completions; with gymnasium use rloo or reinforce.",
        ),
        (
            isinstance(algorithm.advantages, GroupRelativeParts),
            rollout.reward_parts,
            "reward_parts",
            "Give a list of rewards, or use group_relative.",
        ),
        (
            algorithm.rollout_correction is not None,
            rollout.sampling_log_probs,
            "sampling_log_probs",
            "Use a generator that reports them, or set rollout_correction to null.",
        ),
    ]
    for needed, value, name, remedy in needs:
        if needed and value is None:
            raise ConfigError(f"the algorithm needs {name}, which the rollout lacks", where="estimate", remedy=remedy)
