"""A small actor-critic as one node of autograd: both networks and the distribution in NumPy, their gradient by hand.

    forward   (log pi(a|s), H(pi(.|s)), V(s)) of given actions
    backward  from the gradients of these three to the gradient of all parameters, one flat vector

On two layers of 64 units and a minibatch of 128 the arithmetic takes a sixth of what torch and autograd need around it.
The loss stays `rlhf.core.objective`'s: only what lies below the policy's three outputs is computed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from classic_rl.distributions import Categorical, DiagonalGaussian
from classic_rl.networks import MLP, NetworkConfig, layers_backward, layers_forward
from rlhf.core.types import PolicyOutput
from rlhf.training.optimizer import FlatParameters


class FusiblePolicy(Protocol):
    """What is read of an `ActorCritic`."""

    network_config: NetworkConfig
    encoder: Any
    distribution: Any
    actor: MLP
    critic: MLP | None

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is trained."""
        ...


class Scored(NamedTuple):
    """What the way back needs of the way there."""

    distribution: tuple[Any, ...]
    """Of its `score`, for its `slope`."""
    actor: list[np.ndarray]
    """The inputs of its layers."""
    critic: list[np.ndarray]
    """The inputs of its layers; empty without a critic."""


class FusedPolicy:
    """Scores actions by NumPy views of a policy's flattened parameters.

    A copy of the policy has other memory, so copying and pickling leave this out.

    Args:
        policy: `suits_fusion` says that it fits.
        flat: Of its parameters.
    """

    def __init__(self, policy: FusiblePolicy, flat: FlatParameters) -> None:
        self.flat, self.distribution = flat, policy.distribution
        self.activation = policy.network_config.activation
        self._memory = flat.parameter.data_ptr()
        parameters = [parameter for _, parameter in flat.named]
        self.shapes = [tuple(parameter.shape) for parameter in parameters]
        self.bounds = np.cumsum([0, *(parameter.numel() for parameter in parameters)]).tolist()
        self._first = parameters[0]
        places = {id(parameter): index for index, parameter in enumerate(parameters)}
        self.actor, self.critic = _views(policy.actor), _views(policy.critic)
        self.actor_places, self.critic_places = _places(policy.actor, places), _places(policy.critic, places)
        self._gradient = np.empty(self.bounds[-1], dtype=np.float32)
        self._gradient_tensor, self._pieces = torch.from_numpy(self._gradient), self.pieces(self._gradient)
        self.log_std_place = places.get(id(getattr(policy.distribution, "log_std", None)))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def fits(self, observations: Tensor) -> bool:
        """Whether the parameters are still where they were, and the observations are what NumPy reads here."""
        return (
            observations.dtype == torch.float32
            and observations.is_cpu
            and not observations.requires_grad
            and self._first.data_ptr() == self._memory
        )

    def __call__(self, observations: Tensor, actions: Tensor) -> PolicyOutput:
        """Score actions [B, T, ...] at observations [B, T, D]."""
        log_probs, entropy, values = _Fused.apply(self.flat.parameter, observations, actions, self)
        return PolicyOutput(log_probs, entropy, values)

    def score(self, observations: Tensor, actions: Tensor) -> tuple[PolicyOutput, Scored]:
        """As a call, without autograd; what `gradient` needs comes with it."""
        shape = observations.shape[:2]
        x = observations.reshape(-1, observations.shape[-1]).numpy()
        outputs, hidden = layers_forward(x, *self.actor, self.activation)
        log_probs, entropy, scores = self.distribution.score(outputs, actions.flatten(0, 1).numpy())
        values, of_critic = None, []
        if self.critic is not None:
            values, of_critic = layers_forward(x, *self.critic, self.activation)
        arrays = (log_probs, entropy, values)
        output = PolicyOutput(*(None if one is None else torch.from_numpy(one).view(shape) for one in arrays))  # type: ignore[arg-type]
        return output, Scored(scores, hidden, of_critic)

    def gradient(self, scored: Scored, slopes: Sequence[Tensor | None]) -> Tensor:
        """Return the flat gradient, given the loss's with respect to log-probs, entropy and values (None is 0).

        The next call overwrites it.
        """
        of_log_probs, of_entropy, of_values = (None if g is None else g.reshape(-1).numpy() for g in slopes)
        pieces = self._pieces
        of_outputs, of_log_std = self.distribution.slope(scored.distribution, of_log_probs, of_entropy)
        if self.log_std_place is not None:
            pieces[self.log_std_place][:] = 0.0 if of_log_std is None else of_log_std
        _network_backward(of_outputs, scored.actor, self.actor, self, [pieces[i] for i in self.actor_places])
        if self.critic is not None:
            slope = None if of_values is None else of_values[:, None]
            _network_backward(slope, scored.critic, self.critic, self, [pieces[i] for i in self.critic_places])
        return self._gradient_tensor

    def pieces(self, vector: np.ndarray) -> list[np.ndarray]:
        """Views of a flat vector, one per parameter."""
        bounds = self.bounds
        return [vector[bounds[i] : bounds[i + 1]].reshape(shape) for i, shape in enumerate(self.shapes)]


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: Tensor, observations: Tensor, actions: Tensor, fused: FusedPolicy) -> tuple[Any, ...]:
        """Returns log-probs, entropy and values (None without a critic), each [B, T]."""
        del flat  # its memory is what the views show
        ctx.fused = fused
        ctx.set_materialize_grads(False)
        output, ctx.scored = fused.score(observations, actions)
        return tuple(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        return ctx.fused.gradient(ctx.scored, slopes).clone(), None, None, None


def _network_backward(
    slope: np.ndarray | None, hidden: list[np.ndarray], views: Any, fused: FusedPolicy, out: list[np.ndarray]
) -> None:
    if slope is None:
        for piece in out:
            piece[...] = 0.0
        return
    layers_backward(slope, hidden, views[0], fused.activation, weight_gradients=out[::2], bias_gradients=out[1::2])


def suits_fusion(policy: FusiblePolicy, flat: FlatParameters) -> bool:
    """Whether a policy can be fused.

    It can where it is plain networks on vectors, in float32 on the CPU, all of it in the flat tensor, and where its
    distribution brings `score` and `slope`.
    """
    config = policy.network_config
    return (
        policy.encoder is None
        and config.kernel == "auto"
        and not policy.actor.with_features
        and type(policy.distribution) in (Categorical, DiagonalGaussian)
        and flat.parameter.is_cpu
        and flat.parameter.dtype == torch.float32
        and len(flat.named) == len(list(policy.parameters()))
    )


def _views(network: MLP | None) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    if network is None:
        return None
    layers = network.layers
    return [layer.weight.detach().numpy() for layer in layers], [layer.bias.detach().numpy() for layer in layers]


def _places(network: MLP | None, places: dict[int, int]) -> list[int]:
    if network is None:
        return []
    return [places[id(parameter)] for layer in network.layers for parameter in (layer.weight, layer.bias)]
