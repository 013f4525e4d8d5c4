"""The policy gradient from another policy's episodes, by importance sampling.

With rho_k = pi(a_k|s_k) / behaviour(a_k|s_k), and expectations over the behaviour policy's episodes:

| form | coefficient of d log pi(a_t given s_t) | expectation |
| --- | --- | --- |
| trajectory | (all rho) x (sum of all r) | the policy gradient |
| causal_rewards | (rho up to t) x sum over k >= t of r_k (rho from t + 1 to k) | the policy gradient |
| causal | (rho up to t) x sum over k >= t of r_k | pi's states, the *behaviour* policy's rewards to go |

Products are meant where several rho are named. Lectures often print `causal` and call it the policy gradient; without
the products on the rewards it is biased: it is the step of policy iteration, which improves on the behaviour policy's
values. Where they print the second product, it begins at t, which would count rho_t twice.
Source: Precup, Sutton, Singh 2000; Degris, White, Sutton 2012, https://arxiv.org/abs/1205.4839.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from classic_rl.policy import ActorCritic
from classic_rl.reinforce import mean_of_others
from classic_rl.rollout_learner import RolloutLearner, credited
from rlhf.config import Config
from rlhf.core.advantages import discounted_scan
from rlhf.core.algorithm import AlgorithmConfig, PolicyGradient, RewardsToGo, SequenceSum
from rlhf.core.types import Rollout
from rlhf.training.update_config import UpdateConfig


class OffPolicyGradient(Config):
    """Several steps on each rollout, weighed by the ratio to the policy that played it."""

    type: Literal["off_policy_gradient"] = "off_policy_gradient"
    ratio: Literal["trajectory", "causal", "causal_rewards"] = "causal"
    """Which ratios multiply an action's gradient; the table in this module's docstring says what they estimate."""
    baseline: Literal["none", "leave_one_out"] = "leave_one_out"
    """Subtracted from the returns; its expected contribution is 0 in every form."""
    discount: float = Field(1.0, ge=0, le=1)
    """gamma."""
    steps: int = Field(4, ge=1)
    """Gradient steps per rollout; the first has ratio 1, the others are off-policy."""
    max_weight: float | None = Field(None, gt=0)
    """Cap on each product of ratios: bounded variance for a bias. null never caps."""


def off_policy_coefficients(
    rewards: Tensor, log_ratio: Tensor, mask: Tensor, config: OffPolicyGradient
) -> tuple[Tensor, Tensor]:
    """What multiplies d log pi(a_t|s_t).

    Args:
        rewards: [B, T], one episode per row, from its first step on.
        log_ratio: [B, T] log pi - log behaviour.
        mask: [B, T] True on the episode's steps.
        config: The form.

    Returns:
        [B, T] coefficients, 0 where masked, and [B] the whole episodes' ratios.
    """
    rewards, log_ratio = torch.where(mask, rewards, 0.0), torch.where(mask, log_ratio, 0.0)
    so_far = log_ratio.cumsum(dim=1)
    whole = so_far[:, -1]
    decay = torch.full_like(rewards, config.discount)
    match config.ratio:
        case "trajectory":
            weights = whole.exp().unsqueeze(1).expand_as(rewards)
            returns = discounted_scan(rewards, decay)[:, :1].expand_as(rewards)
        case "causal":
            weights, returns = so_far.exp(), discounted_scan(rewards, decay)
        case "causal_rewards":
            # y_t = r_t + gamma rho_{t+1} y_{t+1}
            following = torch.cat([log_ratio[:, 1:], torch.zeros_like(log_ratio[:, :1])], dim=1).exp()
            weights, returns = so_far.exp(), discounted_scan(rewards, decay * following)
    if config.max_weight is not None:
        weights = weights.clamp(max=config.max_weight)
    if config.baseline == "leave_one_out":
        returns = returns - mean_of_others(returns)
    return torch.where(mask, weights * returns, 0.0), whole.exp()


class OffPolicyLearner(RolloutLearner):
    """`steps` gradient steps per rollout of whole episodes, the ratios measured anew before each.

    Args:
        policy: What learns.
        config: The form.
        update, accelerator, seed: See `RolloutLearner`.
    """

    def __init__(self, policy: ActorCritic, config: OffPolicyGradient, update: UpdateConfig, **shared: Any) -> None:
        algorithm = AlgorithmConfig(
            advantages=RewardsToGo(discount=config.discount), surrogate=PolicyGradient(), aggregation=SequenceSum()
        )
        super().__init__(policy, algorithm, update, **shared)
        self.config = config

    def update(self, rollout: Rollout, *, progress: float = 0.0, progress_step: float = 0.0) -> dict[str, float]:
        """Learn from one rollout.

        Returns:
            The shared learner's metrics of the last step; "effective_episodes", (sum w)^2 / sum w^2 of the whole
            episodes' ratios at the last step: how many episodes the weighted ones are worth.
        """
        metrics: dict[str, float] = {}
        for _ in range(self.config.steps):
            with torch.no_grad():
                log_probs = self.policy(rollout.inputs, rollout.actions).log_probs
            coefficients, whole = off_policy_coefficients(
                rollout.rewards, log_probs - rollout.old_log_probs, rollout.action_mask, self.config
            )
            metrics = self.learner.update(
                credited(rollout, coefficients), progress=progress, progress_step=progress_step
            )
            total, squares = self.reduce(torch.stack([whole.sum(), whole.square().sum()])).tolist()
            metrics["effective_episodes"] = total**2 / squares if squares else 0.0
        return metrics
