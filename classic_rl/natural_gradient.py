"""The natural policy gradient: steps of a given length in the space of policies, not of weights.

With the surrogate's gradient g and the Fisher information F of the policy, averaged over the visited states, the step
`sqrt(2 epsilon / (g^T F^-1 g)) F^-1 g` is the steepest one whose KL divergence is epsilon to second order; how the
policy is parameterised does not matter to first order. F is never built: conjugate gradients need products F v only.
Source: Kakade 2001, "A natural policy gradient"; Schulman et al. 2015, https://arxiv.org/abs/1502.05477, appendix C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classic_rl.divergence import deviation_fisher, fisher_metric
from classic_rl.networks import MLP
from classic_rl.policy import ActorCritic
from rlhf.core.masking import Reduce, identity
from rlhf.errors import ConfigError


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Tensor, *, iterations: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """Solve A x = b for a symmetric positive definite A that is known by its products.

    Starts at x = 0, so every iterate has b^T x > 0: even a rough solution of F x = g is a direction of ascent.
    Source: Hestenes and Stiefel 1952; Nocedal and Wright, "Numerical Optimization", algorithm 5.2.

    Args:
        product: v [D] -> A v [D].
        b: [D].
        iterations: At most this many products; D are enough in exact arithmetic.
        tolerance: Stops where the squared residual is below this share of b's squared norm.

    Returns:
        x [D].

    >>> matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradient(lambda v: matrix @ v, torch.tensor([1.0, 2.0]))  # (1/11, 7/11)
    tensor([0.0909, 0.6364])
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, square = residual.clone(), torch.dot(residual, residual)
    enough = tolerance * float(square)
    for _ in range(iterations):
        if float(square) <= enough:
            break
        moved = product(direction)
        alpha = square / torch.dot(direction, moved)
        x += alpha * direction
        residual -= alpha * moved
        before, square = square, torch.dot(residual, residual)
        direction = residual + (square / before) * direction
    return x


class FisherProduct:
    """v -> F v + damping v for an actor `MLP`, with the hidden layers kept between products.

    F = mean over states of J^T M J: J is the Jacobian of the network's outputs in its weights and M the Fisher
    information about the outputs (`classic_rl.divergence.fisher_metric`). J u goes forward through the layers, J^T w
    back through them; two matrix products per layer each, no graph, no second derivative. It equals the Hessian of the
    mean KL(old || new) at the old policy, because there the KL's gradient in the outputs is 0.
    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".

    Args:
        policy: Its actor and distribution are read; the order of v is `actor_parameters(policy)`.
        observations: [N, D] the states that F is a mean over.
        damping: Added to F's diagonal, so that directions without information stay short.
        reduce: Sums over processes; each has its own states.

    Raises:
        ConfigError: An actor that is no MLP, or a distribution without a closed form.
    """

    def __init__(
        self, policy: ActorCritic, observations: Tensor, *, damping: float = 0.0, reduce: Reduce = identity
    ) -> None:
        actor = _mlp(policy.actor)
        self.damping, self._reduce, self._relu = damping, reduce, actor.activation == "relu"
        self._weights = [layer.weight.detach() for layer in actor.layers]
        self._hidden, outputs = _hidden_layers(actor, observations)
        self._slopes = [(h > 0).to(h.dtype) if self._relu else 1 - h * h for h in self._hidden[1:]]
        self._metric = fisher_metric(policy.distribution, outputs)
        self._shapes = [parameter.shape for parameter in actor_parameters(policy)]
        self._deviations = deviation_fisher(policy.distribution, outputs)
        self._states = reduce(torch.tensor(float(len(observations)), device=observations.device)).item()

    def __call__(self, vector: Tensor) -> Tensor:
        """Multiply a vector [D]."""
        pieces = [p.view(s) for p, s in zip(vector.split([s.numel() for s in self._shapes]), self._shapes, strict=True)]
        layers = pieces[: 2 * len(self._weights)]
        back = self._backward(self._metric(self._forward(layers)) / self._states)
        if self._deviations is not None:
            back.append(self._deviations(pieces[-1]) / self._states)
        return self._reduce(torch.cat([piece.reshape(-1) for piece in back])) + self.damping * vector

    def _forward(self, tangents: list[Tensor]) -> Tensor:
        """J u: how the outputs [N, K] move when the weights move along `tangents` (weight, bias, weight, ...)."""
        moved: Tensor | None = None
        for index, (weight, below) in enumerate(zip(self._weights, self._hidden, strict=True)):
            change = torch.addmm(tangents[2 * index + 1], below, tangents[2 * index].T)
            if moved is not None:
                change = torch.addmm(change, moved * self._slopes[index - 1], weight.T)
            moved = change
        assert moved is not None
        return moved

    def _backward(self, gradient: Tensor) -> list[Tensor]:
        """J^T w: the chain rule back to the weights (weight, bias, weight, ...)."""
        gradients: list[Tensor] = []
        for index in reversed(range(len(self._weights))):
            gradients += [gradient.sum(0), gradient.T @ self._hidden[index]]
            if index:
                gradient = (gradient @ self._weights[index]) * self._slopes[index - 1]
        return gradients[::-1]


class NaturalStep(NamedTuple):
    """A step in the actor's weights, and what it was made of."""

    step: Tensor
    """[D] whose KL is `max_kl` to second order."""
    predicted_gain: float
    """g^T step: the surrogate's growth to first order."""
    residual: float
    """|F x - g| / |g|: what conjugate gradients left unsolved."""


def natural_step(
    product: Callable[[Tensor], Tensor], gradient: Tensor, *, max_kl: float, iterations: int
) -> NaturalStep | None:
    """`sqrt(2 max_kl / (x^T F x)) x` with x = F^-1 g by conjugate gradients; None where the gradient is 0.

    Args:
        product: v -> F v, damped.
        gradient: [D] of the surrogate that is to grow.
        max_kl: Length of the step, nats.
        iterations: Of conjugate gradients.

    >>> natural_step(lambda v: 4 * v, torch.tensor([3.0, 4.0]), max_kl=0.5, iterations=2).step  # length sqrt(1 / 4)
    tensor([0.3000, 0.4000])
    """
    if not gradient.any():
        return None
    x = conjugate_gradient(product, gradient, iterations=iterations)
    moved = product(x)
    curvature = float(torch.dot(x, moved))
    step = math.sqrt(2 * max_kl / curvature) * x
    residual = float(torch.linalg.vector_norm(moved - gradient) / torch.linalg.vector_norm(gradient))
    return NaturalStep(step, float(torch.dot(gradient, step)), residual)


def actor_parameters(policy: ActorCritic) -> list[nn.Parameter]:
    """The weights that act, in the order of `FisherProduct`'s vectors: actor layers, then free deviations."""
    layers = [layer.get_parameter(name) for layer in _mlp(policy.actor).layers for name in ("weight", "bias")]
    return [*layers, *policy.distribution.parameters()]


def _hidden_layers(actor: MLP, observations: Tensor) -> tuple[list[Tensor], Tensor]:
    """The inputs of every layer, and the network's outputs [N, K] as `MLP.forward` has them; without gradients."""
    hidden = [observations]
    with torch.no_grad():
        for layer in actor.layers[:-1]:
            z = layer(hidden[-1])
            hidden.append(z.relu() if actor.activation == "relu" else z.tanh())
        outputs = actor.layers[-1](hidden[-1])
        return hidden, torch.cat([outputs, hidden[-1]], dim=-1) if actor.with_features else outputs


def _mlp(actor: nn.Module) -> MLP:
    if not isinstance(actor, MLP):
        raise ConfigError(
            "natural gradients are made for multilayer perceptrons",
            where="network",
            got=type(actor).__name__,
            remedy="Use flat observations and a feed-forward network, or PPO (`rlhf run on_policy`).",
        )
    return actor
