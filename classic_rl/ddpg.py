"""Deep deterministic policy gradient: Q-learning for continuous actions, with an actor in place of the maximum.

    critic   y = R + discount x Q'(s', mu'(s')),   loss = mean (Q(s, a) - y)^2,  y constant
    actor    loss = - mean Q(s, mu(s)),  gradient  mean grad_theta mu(s) grad_a Q(s, a)|_{a = mu(s)}
    targets  theta' <- (1 - rate) theta' + rate theta,  for both networks

Source: Lillicrap et al. 2016, https://arxiv.org/abs/1509.02971, algorithm 1 (the policy gradient: Silver et al. 2014).
The gradient holds mu itself: "grad log mu grad_a Q", as it is at times printed, mixes it up with the stochastic one.
Networks and rates are those of Fujimoto et al. 2018, as everywhere today: no batch norm, no L2 penalty.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from classic_rl.continuous_agent import DeterministicAgent, DeterministicAgentConfig
from classic_rl.continuous_policy import load_deterministic_policy

load_policy = load_deterministic_policy


class DDPGConfig(DeterministicAgentConfig):
    """Deep deterministic policy gradient."""

    type: Literal["ddpg"] = "ddpg"


class DDPG(DeterministicAgent):
    """The agent of `classic_rl.off_policy.learn_off_policy`; arguments as `DeterministicAgent`, with one critic."""

    def __init__(self, config: DDPGConfig, **shared: Any) -> None:
        super().__init__(config, kind="ddpg", members=1, **shared)

    def update(self, *, env_steps: int) -> dict[str, Any]:
        """One step of the critic, the actor and the targets."""
        batch = self.batch()
        rows = len(batch.rewards)

        with torch.no_grad():
            next_actions = self.target_actor.network(batch.next_observations)
            following = self.target_critics.network(batch.next_observations, next_actions)[0, :, 0]
            target = batch.rewards + batch.discounts * following
        values = self.critics.network(batch.observations, batch.actions)
        errors = values.detach() - target[:, None]
        # d/dQ of mean (Q - y)^2
        self.descend(self.critics, values, errors * (2 / rows), env_steps=env_steps)

        actions = self.actor.network(batch.observations)
        worth = self.critics.network(batch.observations, actions, frozen=True)
        # d/dQ of -mean Q
        self.descend(self.actor, worth, torch.full_like(worth, -1 / rows), env_steps=env_steps)
        self.follow()
        return {"critic_loss": errors.square().mean(), "q_mean": worth.detach().mean()}
