"""The actor-critic: a `rlhf.core.types.Policy` for gymnasium's spaces."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gymnasium import spaces
from torch import Tensor, nn

from classic_rl.distributions import make_distribution
from classic_rl.networks import MLP, NetworkConfig
from classic_rl.spaces import observation_size
from classic_rl.state_dependent_exploration import StateDependentGaussian
from rlhf.core.types import PolicyOutput


class ActorCritic(nn.Module):
    """Two separate trunks: action parameters, and V(s) where a critic is wanted.

    Args:
        observation_space: Space of one observation; observations arrive flattened (`classic_rl.spaces`).
        action_space: Space of one action.
        network: Shape of both trunks.
        critic: Whether to predict values.
        seed: Seeds the initial weights without touching torch's global generator; None uses that one.
    """

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *,
        network: NetworkConfig | None = None,
        critic: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.network_config = network or NetworkConfig()
        self.observation_space, self.action_space = observation_space, action_space
        sizes = [observation_size(observation_space), *self.network_config.hidden_sizes]
        own = self.network_config
        settings = {"activation": own.activation, "kernel": own.kernel, "initialization": own.initialization}
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            exploration = self.network_config.state_dependent
            if exploration is None:
                self.distribution = make_distribution(action_space, initial_log_std=self.network_config.initial_log_std)
            else:
                self.distribution = StateDependentGaussian(action_space, config=exploration, num_features=sizes[-1])
            outputs, with_features = self.distribution.num_outputs, exploration is not None
            self.actor = MLP([*sizes, outputs], output_gain=0.01, with_features=with_features, **settings)
            self.critic = MLP([*sizes, 1], output_gain=1.0, **settings) if critic else None

    def forward(self, inputs: Mapping[str, Tensor], actions: Tensor) -> PolicyOutput:
        """Score actions [B, T, ...] taken at `inputs["observations"]` [B, T, D]; outputs [B, T]."""
        observations = inputs["observations"]
        log_probs, entropy = self.distribution.log_probs_and_entropy(self.actor(observations), actions)
        return PolicyOutput(log_probs, entropy, self.values(observations))

    def values(self, observations: Tensor) -> Tensor | None:
        """V(s) for observations [..., D], shape [...]; None without a critic."""
        return None if self.critic is None else self.critic(observations).squeeze(-1)
