"""Forward and backward of an `MLP` without autograd: the gradient goes straight into its place in one flat tensor.

The same arithmetic as `classic_rl.networks.MLP` (a test compares them). It leaves out what remains around it there: the
graph, a zeroed gradient, and the addition of each layer's gradient to that zero. On two layers of 256 and a batch of 64
these take as long as the arithmetic.
"""

from __future__ import annotations

import numpy as np

from classic_rl.networks import MLP, layers_backward, layers_forward


class DirectGradient:
    """An `MLP` on NumPy views of its parameters and of their gradients.

    Args:
        network: float32 on the CPU, its parameters and their gradients already flattened (`FlatNetwork`).
    """

    def __init__(self, network: MLP) -> None:
        self._activation = network.activation
        self._weights = [layer.weight.detach().numpy() for layer in network.layers]
        self._biases = [layer.bias.detach().numpy() for layer in network.layers]
        self._weight_gradients = [layer.weight.grad.numpy() for layer in network.layers]
        self._bias_gradients = [layer.bias.grad.numpy() for layer in network.layers]
        self._hidden: list[np.ndarray] = []

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Map [B, inputs] to [B, outputs] and keep what `backward` needs."""
        outputs, self._hidden = layers_forward(x, self._weights, self._biases, self._activation)
        return outputs

    def backward(self, gradient: np.ndarray) -> None:
        """Write the gradient of the parameters, given that of the last forward's outputs [B, outputs]."""
        layers_backward(
            gradient,
            self._hidden,
            self._weights,
            self._activation,
            weight_gradients=self._weight_gradients,
            bias_gradients=self._bias_gradients,
        )
