"""Forward and backward of an `MLP` without autograd: the gradient goes straight into its place in one flat tensor.

The same arithmetic as `classic_rl.networks.MLP` (a test compares them). It leaves out what remains around it there: the
graph, a zeroed gradient, and the addition of each layer's gradient to that zero. On two layers of 256 and a batch of 64
these take as long as the arithmetic.
"""

from __future__ import annotations

import numpy as np

from classic_rl.networks import MLP


class DirectGradient:
    """An `MLP` on NumPy views of its parameters and of their gradients.

    Args:
        network: float32 on the CPU, its parameters and their gradients already flattened (`FlatNetwork`).
    """

    def __init__(self, network: MLP) -> None:
        self._relu = network.activation == "relu"
        self._weights = [layer.weight.detach().numpy() for layer in network.layers]
        self._biases = [layer.bias.detach().numpy() for layer in network.layers]
        self._weight_gradients = [layer.weight.grad.numpy() for layer in network.layers]
        self._bias_gradients = [layer.bias.grad.numpy() for layer in network.layers]
        self._hidden: list[np.ndarray] = []

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Map [B, inputs] to [B, outputs] and keep what `backward` needs."""
        self._hidden = [x]
        for weight, bias in zip(self._weights[:-1], self._biases[:-1], strict=True):
            x = x.dot(weight.T)
            x += bias
            x = np.maximum(x, 0, out=x) if self._relu else np.tanh(x, out=x)
            self._hidden.append(x)
        x = x.dot(self._weights[-1].T)
        x += self._biases[-1]
        return x

    def backward(self, gradient: np.ndarray) -> None:
        """Write the gradient of the parameters, given that of the last forward's outputs [B, outputs]."""
        for index in reversed(range(len(self._weights))):
            below = self._hidden[index]
            np.dot(gradient.T, below, out=self._weight_gradients[index])
            gradient.sum(axis=0, out=self._bias_gradients[index])
            if index:
                gradient = gradient.dot(self._weights[index])
                gradient *= below > 0 if self._relu else 1 - below * below
