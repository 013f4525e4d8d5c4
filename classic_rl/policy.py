"""The actor-critic: a `rlhf.core.types.Policy` for gymnasium's spaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from gymnasium import spaces
from torch import Tensor, nn

from classic_rl.distributions import MASKED, make_distribution
from classic_rl.encoders import make_encoder
from classic_rl.fused_policy import FusedPolicy, suits_fusion
from classic_rl.networks import MLP, NetworkConfig
from classic_rl.spaces import observation_size
from classic_rl.state_dependent_exploration import StateDependentGaussian
from rlhf.core.types import PolicyOutput
from rlhf.errors import ConfigError
from rlhf.training.optimizer import FlatParameters


class ActorCritic(nn.Module):
    """Two separate trunks: action parameters, and V(s) where a critic is wanted.

    Images and a memory come first, in an `encoder` that both share (`classic_rl.encoders`).

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
        own = self.network_config
        settings = {"activation": own.activation, "kernel": own.kernel, "initialization": own.initialization}
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.encoder = make_encoder(observation_space, own)
            inputs = observation_size(observation_space) if self.encoder is None else self.encoder.num_features
            sizes = [inputs, *own.hidden_sizes]
            exploration = self.network_config.state_dependent
            if exploration is None:
                self.distribution = make_distribution(action_space, initial_log_std=self.network_config.initial_log_std)
            else:
                self.distribution = StateDependentGaussian(action_space, config=exploration, num_features=sizes[-1])
            outputs, with_features = self.distribution.num_outputs, exploration is not None
            self.actor = MLP([*sizes, outputs], output_gain=0.01, with_features=with_features, **settings)
            self.critic = MLP([*sizes, 1], output_gain=1.0, **settings) if critic else None
        self.fused: FusedPolicy | None = None

    def attach_flat(self, flat: FlatParameters) -> None:
        """Compute forward and backward as one operation from now on, where that is possible (`FusedPolicy`).

        Args:
            flat: Of the parameters; their gradient then arrives in it as a whole.
        """
        self.fused = FusedPolicy(self, flat) if suits_fusion(self, flat) else None

    def by_hand(
        self, inputs: Mapping[str, Tensor], actions: Tensor
    ) -> tuple[PolicyOutput, Callable[[Sequence[Tensor | None]], Tensor]] | None:
        """As a call, without autograd.

        Returns:
            The output, and a function from the loss's gradients with respect to its three tensors (None where there is
            none) to the gradient of the flat parameters; None where autograd has to do it.
        """
        fused = self.fused
        if fused is None or "action_masks" in inputs or not fused.fits(inputs["observations"]):
            return None
        output, scored = fused.score(inputs["observations"], actions)
        return output, lambda slopes: fused.gradient(scored, slopes)

    @property
    def needs_rows(self) -> bool:
        """Whether it must be given whole rows: a memory reads what came before."""
        return self.encoder is not None and self.encoder.memory is not None

    def features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the trunks read, [B, T, F].

        Args:
            inputs: "observations" [B, T, ...]; with a memory also "starts" [B, T] and "memory" [B, K], its state before
                the first observation.
        """
        if self.encoder is None:
            return inputs["observations"]
        return self.encoder(inputs["observations"], starts=inputs.get("starts"), state=inputs.get("memory"))

    def outputs(self, inputs: Mapping[str, Tensor], *, features: Tensor | None = None) -> Tensor:
        """Parameters [B, T, K] of the distribution; "action_masks" [B, T, K] give invalid actions probability 0."""
        outputs = self.actor(self.features(inputs) if features is None else features)
        masks = inputs.get("action_masks")
        return outputs if masks is None else outputs.masked_fill(~masks, MASKED)

    def forward(self, inputs: Mapping[str, Tensor], actions: Tensor) -> PolicyOutput:
        """Score actions [B, T, ...] taken at `inputs["observations"]` [B, T, D]; outputs [B, T]."""
        if self.fused is not None and "action_masks" not in inputs and self.fused.fits(inputs["observations"]):
            return self.fused(inputs["observations"], actions)
        features = self.features(inputs)
        outputs = self.outputs(inputs, features=features)
        log_probs, entropy = self.distribution.log_probs_and_entropy(outputs, actions)
        return PolicyOutput(log_probs, entropy, self.values_of(features))

    def values(self, observations: Tensor) -> Tensor | None:
        """V(s) for observations [..., D], shape [...]; None without a critic."""
        return self.values_of(self.features({"observations": observations}))

    def values_of(self, features: Tensor) -> Tensor | None:
        """V for features [..., F], shape [...]; None without a critic."""
        return None if self.critic is None else self.critic(features).squeeze(-1)

    def require_plain(self, inputs: Mapping[str, Tensor] | None = None) -> None:
        """Raise ConfigError where more than two trunks on vectors, or invalid actions, would have to be understood."""
        what = None
        if self.encoder is not None:
            what = "a memory" if self.encoder.memory is not None else "convolutions"
        elif inputs is not None and "action_masks" in inputs:
            what = "masks of valid actions"
        if what is not None:
            raise ConfigError(
                "this method reads the actor's layers directly",
                where="network" if self.encoder is not None else "environment",
                got=what,
                expected="observations that are vectors, and every action valid",
                remedy="Use a preset of `rlhf run on_policy`, such as ppo or a2c.",
            )
