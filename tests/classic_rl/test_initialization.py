"""Where networks start."""

from __future__ import annotations

import math

import torch

from classic_rl.networks import MLP


def test_orthogonal_layers_have_their_gain():
    layers = MLP([8, 8, 2], output_gain=0.01).layers
    torch.testing.assert_close(layers[0].weight @ layers[0].weight.T, 2 * torch.eye(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(layers[1].weight @ layers[1].weight.T, 1e-4 * torch.eye(2), atol=1e-6, rtol=0)


def test_uniform_layers_are_torchs():
    # torch's Linear: weights and biases uniform within +-1 / sqrt(inputs), so of standard deviation that / sqrt 3.
    layer = MLP([400, 300, 1], output_gain=0.01, initialization="uniform").layers[0]
    assert layer.weight.abs().max() <= 1 / math.sqrt(400)
    assert abs(layer.weight.std().item() - 1 / math.sqrt(400 * 3)) < 1e-3
    assert layer.bias.any()
