"""Q actor-critic (QAC): the critic learns Q(s, a), the actor climbs it.

    actor    theta <- theta + alpha d log pi(a|s) Q(s, a)
    critic   Q(s, a) <- Q(s, a) + beta (r + gamma E_{a' ~ pi} Q(s', a') - Q(s, a))

With a' from the policy the critic's rule is (expected) SARSA; a maximum over a' would be Q-learning, and would evaluate
another policy than the one whose gradient is wanted. Lecture notes that call the critic "Q-learning", or print its
target as `Q - r + Q(s', .)`, mean this: squared, discounted, with the target held fixed.
Source: Konda and Tsitsiklis 2000, Actor-Critic Algorithms; Sutton et al. 2000.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from classic_rl.collector import StepCollector, Steps
from classic_rl.distributions import Categorical
from classic_rl.networks import MLP
from classic_rl.policy import ActorCritic
from classic_rl.rollout_learner import RolloutLearner, credited
from rlhf.config import Config
from rlhf.core.algorithm import AlgorithmConfig, PolicyGradient, RewardsToGo, TokenMean
from rlhf.core.types import Rollout
from rlhf.errors import ConfigError
from rlhf.training.optimizer import PolicyOptimizer, build_optimizer
from rlhf.training.update_config import UpdateConfig


class QActorCritic(Config):
    """An actor and a critic with one output per action; Discrete actions."""

    type: Literal["q_actor_critic"] = "q_actor_critic"
    discount: float = Field(0.99, ge=0, le=1)
    """gamma."""
    next_action: Literal["expected", "sampled"] = "expected"
    """a' of the critic's target: averaged over the policy (expected SARSA), or drawn from it (SARSA)."""
    subtract_value: bool = True
    """Climb Q(s, a) - sum_b pi(b|s) Q(s, b) instead of Q(s, a): the same expected gradient, less variance."""
    critic_learning_rate: float = Field(1e-3, gt=0)
    """Of Adam on the critic."""
    critic_steps: int = Field(4, ge=1)
    """Adam's steps per rollout, each on all of it; the target is computed anew before each."""
    entropy_coef: float = Field(0.0, ge=0)
    """Entropy bonus per action."""


class TransitionCollector(StepCollector):
    """Fixed numbers of steps, with s' and whether the episode goes on beside each."""

    def rollout(self, steps: Steps, *, metrics: dict[str, float], group_ids: Tensor | None = None) -> Rollout:
        """Add `next_observations` [N, T, D], and `goes_on` [N, T]: 0 where terminated, 1 where truncated or running."""
        rollout = super().rollout(steps, metrics=metrics, group_ids=group_ids)
        device = rollout.rewards.device
        following = torch.from_numpy(steps.observations[:, 1:]).to(device)
        goes_on = torch.from_numpy(~steps.terminated).to(device, torch.float32)
        return replace(rollout, inputs={**rollout.inputs, "next_observations": following, "goes_on": goes_on})


class QActorCriticLearner(RolloutLearner):
    """One actor step per rollout through the shared learner, and the critic's regression.

    Args:
        policy: The actor.
        config: How the critic learns.
        update, accelerator, seed: See `RolloutLearner`; of the actor.

    Attributes:
        critic: From [..., D] to [..., A].
    """

    def __init__(
        self, policy: ActorCritic, config: QActorCritic, update: UpdateConfig, *, seed: int = 0, **shared: Any
    ) -> None:
        """Build the critic beside the actor, of the same shape.

        Raises:
            ConfigError: Actions that are not Discrete, or several processes.
        """
        if not isinstance(policy.distribution, Categorical):
            raise ConfigError(
                "a critic with one output per action needs Discrete actions",
                where="environment.id",
                got=str(policy.action_space),
                remedy="Use algorithm: {type: reinforce}, or sac and td3 of the recipe off_policy.",
            )
        algorithm = AlgorithmConfig(
            advantages=RewardsToGo(discount=config.discount),
            surrogate=PolicyGradient(),
            aggregation=TokenMean(),
            entropy_coef=config.entropy_coef,
        )
        super().__init__(policy, algorithm, update, seed=seed, **shared)
        accelerator = self.learner.accelerator
        if accelerator.num_processes > 1:
            raise ConfigError("the Q actor-critic runs in one process", got=accelerator.num_processes)
        self.config = config
        self.critic = _critic_like(policy, seed=seed + 1).to(accelerator.device)
        adam = UpdateConfig(learning_rate=config.critic_learning_rate, optimizer="adam")
        named = list(self.critic.named_parameters())
        self._optimizer = PolicyOptimizer(build_optimizer(self.critic.parameters(), adam), named_parameters=named)
        self._generator = torch.Generator().manual_seed(seed)

    def update(self, rollout: Rollout, *, progress: float = 0.0, progress_step: float = 0.0) -> dict[str, float]:
        """Learn from one rollout of a `TransitionCollector`: the critic first, then the actor by what it says.

        Returns:
            The shared learner's metrics of the actor, "critic_loss" before the last critic step, "q_mean".

        Raises:
            ConfigError: A network with convolutions or a memory, or masks of valid actions.
        """
        self.policy.require_plain(rollout.inputs)
        loss = 0.0
        for _ in range(self.config.critic_steps):
            loss = self._critic_step(rollout)
        credits, q = self._credits(rollout)
        experience = replace(
            credited(rollout, torch.where(rollout.action_mask, credits, 0.0)),
            inputs={"observations": rollout.inputs["observations"]},
        )
        metrics = self.learner.update(experience, progress=progress, progress_step=progress_step)
        return metrics | {"critic_loss": loss, "q_mean": q[rollout.action_mask].mean().item()}

    @torch.no_grad()
    def targets(self, rollout: Rollout) -> Tensor:
        """`r + gamma E_{a' ~ pi} Q(s', a')`, [B, T]; nothing is bootstrapped where the episode terminated."""
        following = rollout.inputs["next_observations"]
        probabilities = torch.softmax(self.policy.actor(following), dim=-1)
        next_values = self.critic(following)
        if self.config.next_action == "sampled":
            drawn = torch.multinomial(probabilities.flatten(0, 1).cpu(), 1, generator=self._generator)
            next_value = next_values.gather(-1, drawn.to(next_values.device).view(*next_values.shape[:-1], 1)).squeeze(
                -1
            )
        else:
            next_value = (probabilities * next_values).sum(dim=-1)
        return rollout.rewards + self.config.discount * rollout.inputs["goes_on"] * next_value

    def _critic_step(self, rollout: Rollout) -> float:
        """One step on half the mean squared error, with the target held fixed."""
        targets = self.targets(rollout)
        self._optimizer.zero_grad()
        predicted = self.critic(rollout.inputs["observations"]).gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
        loss = 0.5 * (predicted - targets)[rollout.action_mask].square().mean()
        loss.backward()
        self._optimizer.step(norm=self._optimizer.gradient_norm(), max_norm=None)
        return loss.item()

    @torch.no_grad()
    def _credits(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        observations = rollout.inputs["observations"]
        values = self.critic(observations)
        taken = values.gather(-1, rollout.actions.unsqueeze(-1)).squeeze(-1)
        if not self.config.subtract_value:
            return taken, taken
        return taken - (torch.softmax(self.policy.actor(observations), dim=-1) * values).sum(dim=-1), taken

    def state_dict(self) -> dict[str, Any]:
        """Actor, critic, optimizers, generator."""
        return {
            "actor": super().state_dict(),
            "critic": {name: tensor.clone() for name, tensor in self.critic.state_dict().items()},
            "optimizer": self._optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        super().load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["generator"])


def _critic_like(policy: ActorCritic, *, seed: int) -> MLP:
    """Return a network of the actor's shape with one output per action."""
    sizes = [layer.in_features for layer in policy.actor.layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MLP(
            [*sizes, policy.distribution.num_outputs],
            activation=policy.network_config.activation,
            kernel=policy.network_config.kernel,
        )
