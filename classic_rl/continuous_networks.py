"""Networks of the off-policy agents: stacks of equal multilayer perceptrons, with forward and backward passes by hand.

A stack computes E networks of one shape in one batched product per layer: twin critics are a stack of two, an actor a
stack of one. `classic_rl.optimization.FlatNetwork` makes their parameters one flat tensor, so that Adam and the
target's moving average are one operation each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from classic_rl.networks import Activation
from rlhf.config import Config
from rlhf.training.linear import MIN_PRODUCTS, onednn_pays


class ContinuousNetworkConfig(Config):
    """Shape of the actor and of each critic; they share no layer."""

    hidden_sizes: list[int] = Field(default=[256, 256], min_length=1)
    """Width of each hidden layer."""
    activation: Activation = "relu"
    """Between the layers."""

    def make(self, inputs: int, outputs: int, *, members: int = 1, seed: int) -> StackedMLP:
        """Build networks of this shape."""
        return StackedMLP(
            [inputs, *self.hidden_sizes, outputs],
            members=members,
            activation=self.activation,
            generator=torch.Generator().manual_seed(seed),
        )


class StackedMLP(nn.Module):
    """E multilayer perceptrons of one shape, computed together.

    Weights and biases start uniform in +-1/sqrt(inputs), torch's default for linear layers, which the published results
    of DDPG, TD3 and SAC in PyTorch rest on (Stable-Baselines3, CleanRL, Spinning Up).

    Args:
        sizes: Inputs, hidden widths, outputs.
        members: E.
        activation: Between the layers.
        generator: Draws the initial weights; None uses torch's global one.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        members: int = 1,
        activation: Activation = "relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.sizes, self.members, self.activation = list(sizes), members, activation
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            bound = 1 / math.sqrt(inputs)
            for parameters, rows in ((self.weights, inputs), (self.biases, 1)):
                start = torch.empty(members, rows, outputs).uniform_(-bound, bound, generator=generator)
                parameters.append(nn.Parameter(start))

    def forward(self, *parts: Tensor, frozen: bool = False, first: bool = False) -> Tensor:
        """Map [B, inputs] to [E, B, outputs].

        Args:
            parts: The inputs, in pieces [B, ...] that are joined along the last axis; every member reads the same. Only
                pieces that need a gradient get one: a critic's actions, not its observations.
            frozen: True leaves the parameters out of the gradient.
            first: True computes the first member only, E = 1.
        """
        return _Stack.apply(self.activation, len(parts), *parts, *self._parameters_in_order(frozen, first))[0]

    def with_features(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the outputs [E, B, outputs] and the last hidden layer [E, B, H]; both carry gradients."""
        return _Stack.apply(self.activation, len(parts), *parts, *self._parameters_in_order(False, False))

    def _parameters_in_order(self, frozen: bool, first: bool) -> list[Tensor]:
        """Weight, bias, weight, bias, ..."""
        parameters: list[Tensor] = [part for pair in zip(self.weights, self.biases, strict=True) for part in pair]
        if frozen:
            parameters = [parameter.detach() for parameter in parameters]
        return [parameter[:1] for parameter in parameters] if first else parameters


class _Stack(torch.autograd.Function):
    """A whole `StackedMLP` as one node of autograd: h_i = f(h_{i-1} W_i + b_i), and its chain rule by hand.

    Beside the large products, most of an update's time is autograd's bookkeeping and products with a single column,
    which a matrix library does ten times slower than a weighted sum. On a CPU members run one after the other, since
    one member's layers stay in the cache and two members' do not; elsewhere all run in one batched product.
    """

    @staticmethod
    def forward(ctx: Any, activation: Activation, num_parts: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """`tensors` are the parts, then weight, bias, weight, bias, ...; returns outputs and the last hidden layer."""
        parts, weights, biases = tensors[:num_parts], tensors[num_parts::2], tensors[num_parts + 1 :: 2]
        x = parts[0] if num_parts == 1 else torch.cat(parts, dim=-1)
        members = weights[0].shape[0]
        ctx.groups = [slice(e, e + 1) for e in range(members)] if x.device.type == "cpu" else [slice(0, members)]
        saved, outputs = [], []
        for group in ctx.groups:
            hidden = [x.expand(group.stop - group.start, *x.shape)]
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                hidden.append(_layer(hidden[-1], weight[group], bias[group], activation))
            outputs.append(_times(hidden[-1], weights[-1][group]).add_(biases[-1][group]))
            saved += hidden
        ctx.activation, ctx.widths = activation, [part.shape[-1] for part in parts]
        ctx.save_for_backward(*saved, *weights)
        ctx.set_materialize_grads(False)
        layers = len(weights)
        features = [saved[layers - 1 + layers * index] for index in range(len(outputs))]
        return _joined(outputs), _joined(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, of_features: Tensor | None) -> tuple[Tensor | None, ...]:
        """dW_i = h_{i-1}^T g_i, db_i = sum of g_i, g_{i-1} = (g_i W_i^T) f'; relu' = [h > 0], tanh' = 1 - h^2."""
        layers = len(ctx.saved_tensors) // (len(ctx.groups) + 1)
        weights, first = ctx.saved_tensors[-layers:], 2 + len(ctx.widths)
        gradients: list[Tensor | None] = [None] * (first + 2 * layers)
        reached = layers if gradient is not None else layers - 1 if of_features is not None else 0
        for index in range(reached):
            if ctx.needs_input_grad[first + 2 * index]:
                weight = weights[index]
                gradients[first + 2 * index] = torch.empty_like(weight)
                gradients[first + 2 * index + 1] = weight.new_empty(weight.shape[0], 1, weight.shape[2])
        for number, group in enumerate(ctx.groups):
            hidden = ctx.saved_tensors[number * layers : (number + 1) * layers]
            g = None if gradient is None else gradient[group]
            for index in reversed(range(layers)):
                of_weight, of_bias = gradients[first + 2 * index : first + 2 * index + 2]
                if g is not None and of_weight is not None and of_bias is not None:
                    _outer(hidden[index], g, out=of_weight[group])
                    torch.sum(g, dim=1, keepdim=True, out=of_bias[group])
                if index == 0:
                    break
                g = None if g is None else _times(g, weights[index][group].transpose(1, 2))
                if index == layers - 1 and of_features is not None:
                    g = of_features[group] if g is None else g + of_features[group]
                g = None if g is None else _through_activation(g, hidden[index], ctx.activation)
            if g is not None:
                for part, weight in enumerate(weights[0][group].split(ctx.widths, dim=1)):
                    if ctx.needs_input_grad[2 + part]:
                        gradients[2 + part] = _of_shared_input(g, weight, gradients[2 + part])
        return tuple(gradients)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _layer(h: Tensor, weight: Tensor, bias: Tensor, activation: Activation) -> Tensor:
    """Return f(h @ weight + bias) for [E, B, I], [E, I, O] and [E, 1, O]."""
    if _suits_onednn(h, weight):
        return _onednn(h, weight, bias=bias[0, 0], activation=activation)
    h = torch.baddbmm(bias, h, weight)
    return h.relu_() if activation == "relu" else h.tanh_()


def _times(h: Tensor, weight: Tensor) -> Tensor:
    """Return h @ weight for [E, B, I] and [E, I, O]; with a single output, or a single input, by multiplication."""
    if weight.shape[2] == 1:
        return (h * weight.transpose(1, 2)).sum(dim=-1, keepdim=True)
    if weight.shape[1] == 1:
        return h * weight
    return _onednn(h, weight) if _suits_onednn(h, weight) else torch.bmm(h, weight)


def _outer(h: Tensor, g: Tensor, *, out: Tensor) -> None:
    """Write h^T @ g for [E, B, I] and [E, B, O]."""
    if g.shape[2] == 1:
        out.copy_(torch.bmm(g.transpose(1, 2), h).transpose(1, 2))
    elif _suits_onednn(h, g):
        out.copy_(_onednn(h.transpose(1, 2), g))
    else:
        torch.bmm(h.transpose(1, 2), g, out=out)


def _suits_onednn(h: Tensor, other: Tensor) -> bool:
    """Whether a product of [1, B, I] and 1 x B x O or I x O numbers is large enough for the faster library."""
    large = h.shape[0] == 1 and h.shape[1] * h.shape[2] * other.shape[2] >= MIN_PRODUCTS
    return large and h.is_cpu and h.dtype == torch.float32 and onednn_pays()


def _onednn(
    h: Tensor, weight: Tensor, *, bias: Tensor | None = None, activation: Literal["none", "relu", "tanh"] = "none"
) -> Tensor:
    """Return f(h @ weight + bias) of one member, in the float32 of `rlhf.training.linear`."""
    product = torch.ops.mkldnn._linear_pointwise(h[0], weight[0].t(), bias, activation, [], "")
    return product.unsqueeze(0)


def _of_shared_input(g: Tensor, weight: Tensor, total: Tensor | None) -> Tensor:
    """Add the sum over members of g @ weight^T, [B, I], to `total`: all members read the same input."""
    for own, of_member in zip(g, weight, strict=True):
        total = torch.mm(own, of_member.t()) if total is None else total.addmm_(own, of_member.t())
    assert total is not None
    return total


def _through_activation(g: Tensor, h: Tensor, activation: Activation) -> Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(g, h, 0)
    return torch.ops.aten.tanh_backward(g, h)


class StackedMirror:
    """The first member of a stack on NumPy views of its weights: for few rows, a fifth of torch's time."""

    def __init__(self, network: StackedMLP) -> None:
        self._network = network
        self.refresh()

    def refresh(self) -> None:
        """Fetch the views again, after parameters moved into other memory."""
        self._weights = [weight.detach().cpu().numpy()[0] for weight in self._network.weights]
        self._biases = [bias.detach().cpu().numpy()[0] for bias in self._network.biases]

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Map [N, inputs] float32 to outputs [N, outputs] and the last hidden layer [N, H]."""
        for weight, bias in zip(self._weights[:-1], self._biases[:-1], strict=True):
            x = x.dot(weight)
            x += bias
            x = np.maximum(x, 0, out=x) if self._network.activation == "relu" else np.tanh(x, out=x)
        return x.dot(self._weights[-1]) + self._biases[-1], x
