"""REINFORCE in five forms: what each log-probability's gradient is multiplied by.

    g = 1/N sum over episodes, sum over t of  d log pi(a_t | s_t) x credit_t

| form | credit_t | source |
| --- | --- | --- |
| trajectory | sum over all k of gamma^k r_k | Williams 1992 |
| baseline | the same, minus a baseline that does not depend on a_t | Williams 1992 |
| reward_to_go | sum over k >= t of gamma^(k - t) r_k: an action cannot change what was before it | Sutton et al. 2000 |
| discounted | gamma^t x reward to go: the unbiased gradient of the discounted return | Thomas 2014 |
| average_reward | sum over k >= t of (r_k - rho), rho the reward per step | Sutton et al. 2000 |

Without its gamma^t, which libraries leave out, discounted reward to go is the gradient of no objective (Nota and Thomas
2020, https://arxiv.org/abs/1906.07073); with it, late steps hardly count. Both are here to be compared.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from classic_rl.policy import ActorCritic
from classic_rl.rollout_learner import RolloutLearner, credited
from rlhf.config import Config
from rlhf.core.advantages import rewards_to_go
from rlhf.core.algorithm import AlgorithmConfig, PolicyGradient, RewardsToGo, SequenceSum, SquaredValueLoss, TokenMean
from rlhf.core.corrections import state_weights
from rlhf.core.estimate import standardize_advantages
from rlhf.core.masking import Reduce, identity, masked_sum
from rlhf.core.types import Experience, Rollout, present
from rlhf.errors import ConfigError
from rlhf.training.update_config import UpdateConfig


class Reinforce(Config):
    """Which credit, minus which baseline, with which weight. `FORMS` names the five usual combinations."""

    type: Literal["reinforce"] = "reinforce"
    credit: Literal["trajectory", "reward_to_go", "average_reward"] = "reward_to_go"
    """What stands beside each action's log-probability, before the baseline."""
    baseline: Literal["none", "leave_one_out", "value"] = "none"
    """leave_one_out: the mean of the other episodes' credit at the same time (0 where they have ended); value: a
    critic's V(s_t). Both leave the expectation as it is, E[d log pi(a|s) b(s)] = 0; the batch's own mean would not."""
    discount: float = Field(1.0, ge=0, le=1)
    """gamma; with credit average_reward only 1 makes sense."""
    discounted_state_weight: bool = False
    """Multiply by gamma^t, which makes discounted reward to go the gradient of the discounted return."""
    standardize: bool = False
    """Bring credits of a rollout to mean 0 and standard deviation 1; helps optimizers, and is no longer unbiased."""

    @model_validator(mode="after")
    def _refuse_combinations_without_meaning(self) -> Self:
        if self.credit == "average_reward" and (self.discount != 1 or self.baseline != "none"):
            raise ValueError("credit: average_reward subtracts the average reward and has discount 1 and no baseline")
        if self.discounted_state_weight and self.credit != "reward_to_go":
            raise ValueError("discounted_state_weight belongs to credit: reward_to_go; the others have no gamma^t")
        return self


FORMS: dict[str, Reinforce] = {
    "trajectory": Reinforce(credit="trajectory"),
    "baseline": Reinforce(credit="trajectory", baseline="leave_one_out"),
    "reward_to_go": Reinforce(credit="reward_to_go"),
    "discounted": Reinforce(credit="reward_to_go", discount=0.99, discounted_state_weight=True),
    "average_reward": Reinforce(credit="average_reward"),
}


def shared_algorithm(config: Reinforce) -> AlgorithmConfig:
    """Express what the shared core does of it: log pi x credit, summed over an episode, averaged over episodes.

    The average reward rho = E[return] / E[length] is a quotient; its gradient, `E[sum d log pi (G_t - rho L_t)] /
    E[length]`, divides by actions instead of episodes.
    """
    needs_critic = config.baseline == "value"
    return AlgorithmConfig(
        advantages=RewardsToGo(discount=config.discount, baseline="value" if needs_critic else "none"),
        surrogate=PolicyGradient(),
        aggregation=TokenMean() if config.credit == "average_reward" else SequenceSum(),
        value_loss=SquaredValueLoss(coefficient=1.0) if needs_critic else None,
        discounted_state_weight=config.discounted_state_weight,
    )


@torch.no_grad()
def credit(rollout: Rollout, config: Reinforce, *, reduce: Reduce = identity) -> Experience:
    """Turn whole episodes into credits.

    Args:
        rollout: One episode per row, from its first step on.
        config: The form.
        reduce: Sums a tensor over processes; the average reward is that of all of them.

    Returns:
        Experience whose `advantages` x `weights` (where there are any) multiply the log-probabilities.

    Raises:
        ConfigError: leave_one_out with a single episode.
    """
    mask, rewards = rollout.action_mask, torch.where(rollout.action_mask, rollout.rewards, 0.0)
    total, actions = reduce(torch.stack([rewards.sum(), mask.sum().to(rewards.dtype)])).unbind()
    if config.credit == "average_reward":
        rewards = torch.where(mask, rewards - total / actions, 0.0)
    to_go = rewards_to_go(rewards, episode_ends=rollout.episode_ends, mask=mask, discount=config.discount)
    credits = to_go if config.credit != "trajectory" else to_go[:, :1].expand_as(to_go)
    match config.baseline:
        case "leave_one_out":
            credits = credits - mean_of_others(torch.where(mask, credits, 0.0) if credits is to_go else credits)
        case "value":
            credits = credits - present(rollout.values)
    experience = replace(
        credited(rollout, torch.where(mask, credits, 0.0)),
        returns=to_go if config.baseline == "value" else None,
        old_values=rollout.values if config.baseline == "value" else None,
        weights=state_weights(mask, episode_ends=rollout.episode_ends, discount=config.discount)
        if config.discounted_state_weight
        else None,
    )
    return standardize_advantages(experience, reduce=reduce) if config.standardize else experience


def mean_of_others(credits: Tensor) -> Tensor:
    """[B, T]: at each time, the mean over the other rows.

    >>> mean_of_others(torch.tensor([[1.0], [3.0], [8.0]])).squeeze().tolist()
    [5.5, 4.5, 2.0]
    """
    rows = credits.shape[0]
    if rows < 2:
        raise ConfigError(
            "a baseline from the other episodes needs others",
            where="algorithm.baseline",
            got=f"leave_one_out with {rows} episode",
            remedy="Raise environment.num_envs.",
        )
    return (credits.sum(dim=0, keepdim=True) - credits) / (rows - 1)


class ReinforceLearner(RolloutLearner):
    """One step of the shared learner per rollout of whole episodes.

    Args:
        policy: What learns; with a critic where the baseline is its value.
        config: The form.
        update, accelerator, seed: See `RolloutLearner`.
    """

    def __init__(self, policy: ActorCritic, config: Reinforce, update: UpdateConfig, **shared: Any) -> None:
        super().__init__(policy, shared_algorithm(config), update, **shared)
        self.config = config

    def update(self, rollout: Rollout, *, progress: float = 0.0, progress_step: float = 0.0) -> dict[str, float]:
        """Learn from one rollout; returns the shared learner's metrics, and "credit_std" over actions."""
        experience = credit(rollout, self.config, reduce=self.reduce)
        spread = experience.advantages[experience.action_mask].std(correction=0).item()
        metrics = self.learner.update(experience, progress=progress, progress_step=progress_step)
        return metrics | {"credit_std": spread}


def gradient_coefficients(experience: Experience) -> Tensor:
    """[B, T] what multiplies each log-probability's gradient: credits times their weights, 0 where masked."""
    weighed = experience.advantages if experience.weights is None else experience.advantages * experience.weights
    return torch.where(experience.action_mask, weighed, 0.0)


def episode_surrogates(log_probs: Tensor, experience: Experience) -> Tensor:
    """[B] whose gradients are the episodes' own estimates of the policy gradient: `sum_t log pi_t x coefficient_t`."""
    return masked_sum(log_probs * gradient_coefficients(experience), experience.action_mask, dim=1)
