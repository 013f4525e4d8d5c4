"""Multilayer perceptrons with orthogonal initialization, and their NumPy mirror for acting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from classic_rl.distributions import StateDependentExploration
from rlhf.config import Config
from rlhf.training.linear import MIN_PRODUCTS, onednn_pays

Activation = Literal["tanh", "relu"]
Initialization = Literal["orthogonal", "uniform"]


class MemoryConfig(Config):
    """What a recurrent policy remembers of its episode."""

    cell: Literal["lstm", "gru"] = "lstm"
    """LSTM or GRU, in one layer."""
    size: int = Field(64, ge=1)
    """Hidden units."""


class NetworkConfig(Config):
    """Separate actor and critic trunks of one shape, after what they share: convolutions and a memory."""

    hidden_sizes: list[int] = Field(default=[64, 64])
    """Width of each hidden layer."""
    activation: Activation = "tanh"
    kernel: Literal["auto", "torch"] = "auto"
    """auto runs forward and backward in NumPy where everything is float32 on the CPU: less than half of torch's time on
    small networks, which is mostly the cost of single operations; the layer after convolutions goes through
    `rlhf.training.linear`. torch leaves all to torch, higher derivatives too."""
    state_dependent: StateDependentExploration | None = None
    """Box actions: exploration noise as a function of the state (gSDE), in place of independent noise."""
    initial_log_std: float = 0.0
    """Box actions: where the free log standard deviations start; 0 is a standard deviation of 1."""
    convolutions: Literal["nature", "minatar", "none"] = "none"
    """Of image observations: nature is Mnih et al. 2015's for 4 x 84 x 84 frames, minatar Young and Tian 2019's for
    10 x 10 x channels. Actor and critic share them."""
    image_features: int = Field(512, ge=1)
    """Width of the shared layer after the convolutions."""
    memory: MemoryConfig | None = None
    """A recurrent policy: an LSTM or GRU that actor and critic share, before their own layers. Updates keep whole rows
    (update.shuffle: rows)."""
    initialization: Initialization = "orthogonal"
    """orthogonal starts weights orthogonal and the actor's last layer 100 times smaller; uniform is torch's default."""


class MLP(nn.Module):
    """Linear layers with an activation between them.

    Weights start orthogonal with gain sqrt 2 (hidden) and `output_gain`, biases at 0: 0.01 for an actor gives
    nearly equal probabilities, 1 suits a critic (Engstrom et al. 2020, https://arxiv.org/abs/2005.12729; Andrychowicz
    et al. 2021, https://arxiv.org/abs/2006.05990). Or they start as torch's `Linear` does, uniform within
    +-1 / sqrt(inputs) (ortho_init=False of Stable-Baselines3).

    Args:
        sizes: Inputs, hidden widths, outputs.
        activation: Between the layers.
        output_gain: Gain of the last layer.
        kernel: See `NetworkConfig.kernel`.
        initialization: See `NetworkConfig.initialization`.
        with_features: Append the last hidden layer to the outputs, without gradient: `StateDependentGaussian` reads it.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        activation: Activation = "tanh",
        output_gain: float = 1.0,
        kernel: Literal["auto", "torch"] = "auto",
        initialization: Initialization = "orthogonal",
        with_features: bool = False,
    ) -> None:
        super().__init__()
        self.activation, self.kernel, self.with_features = activation, kernel, with_features
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))
        if initialization == "uniform":
            return
        gains = [math.sqrt(2)] * (len(self.layers) - 1) + [output_gain]
        for layer, gain in zip(self.layers, gains, strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        layers = self.layers
        if self.kernel == "auto" and _suits_numpy(x) and _suits_numpy(layers[0].weight) and not x.requires_grad:
            # nn.Module's attribute look-up would cost as much as the arithmetic.
            parameters = [tensor for layer in layers for tensor in layer._parameters.values()]
            rows = _NumpyKernel.apply(x.reshape(-1, x.shape[-1]), self.activation, self.with_features, *parameters)
            return rows.view(*x.shape[:-1], -1)
        activation = torch.tanh if self.activation == "tanh" else torch.relu
        for layer in layers[:-1]:
            x = activation(layer(x))
        outputs = layers[-1](x)
        return torch.cat([outputs, x.detach()], dim=-1) if self.with_features else outputs


def _suits_numpy(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_cpu


class _NumpyKernel(torch.autograd.Function):
    """A whole `MLP` as one node of autograd: h_i = f(h_{i-1} W_i^T + b_i), and its chain rule by hand.

    Gives the gradient of the parameters only, once; `MLP.forward` takes torch's own path for anything else.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, activation: Activation, with_features: bool, *parameters: Tensor
    ) -> Tensor:
        """Map [N, inputs] to [N, outputs (+ features)]; `parameters` are weight, bias, weight, bias, ..."""
        arrays = [parameter.detach().numpy() for parameter in parameters]
        outputs, hidden = layers_forward(x.numpy(), arrays[::2], arrays[1::2], activation)
        ctx.activation, ctx.hidden, ctx.weights = activation, hidden, arrays[::2]
        return torch.from_numpy(np.concatenate([outputs, hidden[-1]], axis=1) if with_features else outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the parameters, in their order."""
        g = gradient.numpy()[:, : len(ctx.weights[-1])]  # features carry none
        weights = [np.empty(weight.shape, dtype=np.float32) for weight in ctx.weights]
        biases = [np.empty(len(weight), dtype=np.float32) for weight in ctx.weights]
        layers_backward(g, ctx.hidden, ctx.weights, ctx.activation, weight_gradients=weights, bias_gradients=biases)
        pairs = (torch.from_numpy(array) for pair in zip(weights, biases, strict=True) for array in pair)
        return None, None, None, *pairs


def layers_forward(
    x: np.ndarray, weights: Sequence[np.ndarray], biases: Sequence[np.ndarray], activation: Activation
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Map [N, inputs] to outputs [N, outputs], and the inputs of every layer, which `layers_backward` needs."""
    hidden = [x]
    for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
        hidden.append(_layer(hidden[-1], weight, bias, activation))
    return _layer(hidden[-1], weights[-1], biases[-1], "none"), hidden


def layers_backward(
    g: np.ndarray,
    hidden: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    activation: Activation,
    *,
    weight_gradients: Sequence[np.ndarray],
    bias_gradients: Sequence[np.ndarray],
) -> None:
    """Write dW_i = g_i^T h_{i-1}, db_i = sum of g_i, g_{i-1} = (g_i W_i) f'; tanh' = 1 - h^2, relu' = [h > 0].

    Args:
        g: [N, outputs], the gradient of the outputs.
        hidden: The inputs of every layer.
        weights: Of every layer, [outputs, inputs].
        activation: f.
        weight_gradients: Written.
        bias_gradients: Written.
    """
    ones = np.ones(len(g), dtype=np.float32)
    for index in reversed(range(len(weights))):
        below = hidden[index]
        np.dot(ones, g, out=bias_gradients[index])  # five times as fast as a sum over rows
        if g.size * below.shape[1] >= MIN_PRODUCTS and onednn_pays():
            weight_gradients[index][...] = _onednn(g.T, below.T)
        else:
            np.dot(g.T, below, out=weight_gradients[index])
        if index:
            weight = weights[index]
            large = g.size * weight.shape[1] >= MIN_PRODUCTS and onednn_pays()
            g = _onednn(g, weight.T) if large else g.dot(weight)
            if activation == "tanh":
                slope = below * below
                np.subtract(1, slope, out=slope)
                g *= slope
            else:
                g *= below > 0


def _layer(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, activation: Literal["none", "tanh", "relu"]
) -> np.ndarray:
    """Return f(x W^T + b)."""
    if x.size * len(weight) >= MIN_PRODUCTS and onednn_pays():  # faster than NumPy's library, as it is than torch's
        return _onednn(x, weight, bias=bias, activation=activation)
    x = x.dot(weight.T)
    x += bias
    if activation == "none":
        return x
    return np.tanh(x, out=x) if activation == "tanh" else np.maximum(x, 0, out=x)


def _onednn(
    x: np.ndarray,
    weight: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    activation: Literal["none", "tanh", "relu"] = "none",
) -> np.ndarray:
    """Return f(x W^T + b) in the float32 of `rlhf.training.linear`, without gradient."""
    shift = None if bias is None else torch.from_numpy(bias)
    with torch.no_grad():
        product = torch.ops.mkldnn._linear_pointwise(
            torch.from_numpy(x), torch.from_numpy(weight), shift, activation, [], ""
        )
    return product.numpy()


class NumpyMirror:
    """An `MLP` on NumPy views of the parameters' own memory: a forward pass of few rows costs a fifth of torch's.

    The views show every in-place optimizer step. An optimizer that moves parameters into other memory
    (flattening, `load_state_dict(assign=True)`) leaves them stale, so collectors call `refresh` once per rollout.
    """

    def __init__(self, network: MLP) -> None:
        self.network = network
        self.refresh()

    def refresh(self) -> None:
        """Fetch the views again; parameters on another device are copied."""
        self._weights = [layer.weight.detach().cpu().numpy() for layer in self.network.layers]
        self._biases = [layer.bias.detach().cpu().numpy() for layer in self.network.layers]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Map [N, inputs] float32 to [N, outputs] float32."""
        outputs, hidden = layers_forward(x, self._weights, self._biases, self.network.activation)
        return np.concatenate([outputs, hidden[-1]], axis=1) if self.network.with_features else outputs
