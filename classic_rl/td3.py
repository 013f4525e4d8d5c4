"""Twin delayed DDPG: DDPG with three repairs against overestimation.

    twin critics      y = R + discount x min_i Q'_i(s', a')
    target smoothing  a' = clip(mu'(s') + clip(noise, -c, c), -1, 1)
    delayed actor     actor and targets move after every second critic step

    critics  loss = sum_i mean (Q_i(s, a) - y)^2,  y constant        actor  loss = - mean Q_1(s, mu(s))

Source: Fujimoto, van Hoof and Meger 2018, https://arxiv.org/abs/1802.09477, algorithm 1.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from classic_rl.continuous_agent import DeterministicAgent, DeterministicAgentConfig
from classic_rl.continuous_policy import load_deterministic_policy

load_policy = load_deterministic_policy


class TD3Config(DeterministicAgentConfig):
    """Twin delayed DDPG."""

    type: Literal["td3"] = "td3"
    policy_delay: int = Field(2, ge=1)
    """Critic steps per step of the actor and the targets."""
    target_noise: float = Field(0.2, ge=0)
    """Standard deviation of the noise on target actions, for actions in [-1, 1]."""
    target_noise_clip: float = Field(0.5, ge=0)
    """That noise's bound, c."""


def smoothed(actions: Tensor, noise: Tensor, *, clip: float) -> Tensor:
    """Return target actions with clipped noise: similar actions shall have similar values.

    >>> smoothed(torch.tensor([0.8, 0.0, -0.9]), torch.tensor([0.1, 0.7, -0.3]), clip=0.5)
    tensor([ 0.9000,  0.5000, -1.0000])
    """
    return (actions + noise.clamp(-clip, clip)).clamp(-1.0, 1.0)


class TD3(DeterministicAgent):
    """The agent of `classic_rl.off_policy.learn_off_policy`; arguments as `DeterministicAgent`, with two critics."""

    config: TD3Config

    def __init__(self, config: TD3Config, **shared: Any) -> None:
        super().__init__(config, kind="td3", members=2, **shared)
        self.updates = 0

    def update(self, *, env_steps: int) -> dict[str, Any]:
        """One step of the critics; after every `policy_delay` of them, one of the actor and the targets."""
        batch, config = self.batch(), self.config
        rows = len(batch.rewards)

        with torch.no_grad():
            noise = config.target_noise * self.normals(rows, self.num_actions)
            next_actions = self.target_actor.network(batch.next_observations)
            next_actions = smoothed(next_actions, noise, clip=config.target_noise_clip)
            following = self.target_critics.network(batch.next_observations, next_actions)[..., 0].amin(dim=0)
            target = batch.rewards + batch.discounts * following
        values = self.critics.network(batch.observations, batch.actions)
        errors = values.detach() - target[:, None]
        # d/dQ of mean (Q - y)^2, for both critics
        self.descend(self.critics, values, errors * (2 / rows), env_steps=env_steps)

        self.updates += 1
        if self.updates % config.policy_delay == 0:
            actions = self.actor.network(batch.observations)
            worth = self.critics.network(batch.observations, actions, frozen=True, first=True)
            # d/dQ of -mean Q_1
            self.descend(self.actor, worth, torch.full_like(worth, -1 / rows), env_steps=env_steps)
            self.follow()
        return {"critic_loss": errors.square().mean(), "q_mean": values.detach().mean()}

    def state_dict(self) -> dict[str, Any]:
        """With the count of critic steps."""
        return {**super().state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        super().load_state_dict(state)
        self.updates = state["updates"]
