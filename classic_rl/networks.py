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

from rlhf.config import Config

Activation = Literal["tanh", "relu"]


class NetworkConfig(Config):
    """Separate actor and critic trunks of one shape."""

    hidden_sizes: list[int] = Field(default=[64, 64])
    """Width of each hidden layer."""
    activation: Activation = "tanh"
    initial_log_std: float = 0.0
    """Box actions: where the free log standard deviations start; 0 is a standard deviation of 1."""


class MLP(nn.Module):
    """Linear layers with an activation between them.

    Weights start orthogonal with gain sqrt 2 (hidden) and `output_gain`, biases at 0: 0.01 for an actor gives
    nearly equal probabilities, 1 suits a critic (Engstrom et al. 2020, https://arxiv.org/abs/2005.12729; Andrychowicz
    et al. 2021, https://arxiv.org/abs/2006.05990).

    Args:
        sizes: Inputs, hidden widths, outputs.
        activation: Between the layers.
        output_gain: Gain of the last layer.
    """

    def __init__(self, sizes: Sequence[int], *, activation: Activation = "tanh", output_gain: float = 1.0) -> None:
        super().__init__()
        self.activation = activation
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes))
        gains = [math.sqrt(2)] * (len(self.layers) - 1) + [output_gain]
        for layer, gain in zip(self.layers, gains, strict=True):
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        activation = torch.tanh if self.activation == "tanh" else torch.relu
        for layer in self.layers[:-1]:
            x = activation(layer(x))
        return self.layers[-1](x)


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
        self._weights = [layer.weight.detach().cpu().numpy().T for layer in self.network.layers]
        self._biases = [layer.bias.detach().cpu().numpy() for layer in self.network.layers]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Map [N, inputs] float32 to [N, outputs] float32."""
        last = len(self._weights) - 1
        for index, (weight, bias) in enumerate(zip(self._weights, self._biases, strict=True)):
            x = x.dot(weight)
            x += bias
            if index < last:
                if self.network.activation == "tanh":
                    np.tanh(x, out=x)
                else:
                    np.maximum(x, 0, out=x)
        return x
