"""Stacked networks with a backward pass by hand, against separate torch networks and autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from classic_rl import continuous_networks
from classic_rl.continuous_networks import ContinuousNetworkConfig, StackedMirror, StackedMLP


def separate(stack: StackedMLP) -> list[nn.Sequential]:
    """The members as torch's own layers with equal weights."""
    networks = []
    for member in range(stack.members):
        layers = []
        for weight, bias in zip(stack.weights, stack.biases, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[2])
            linear.weight.data, linear.bias.data = weight[member].detach().t().clone(), bias[member, 0].detach().clone()
            layers += [linear, nn.ReLU() if stack.activation == "relu" else nn.Tanh()]
        networks.append(nn.Sequential(*layers[:-1]))
    return networks


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(("members", "outputs"), [(1, 3), (2, 1), (3, 4)])
def test_outputs_and_gradients_are_those_of_separate_networks(activation, members, outputs):
    torch.manual_seed(0)
    stack = StackedMLP([5, 16, 8, outputs], members=members, activation=activation)
    networks = separate(stack)
    first, second = torch.randn(7, 3), torch.randn(7, 2)
    parts = [(first.clone(), second.clone().requires_grad_()) for _ in range(2)]
    weights = torch.randn(members, 7, outputs)
    own = stack(*parts[0])
    theirs = torch.stack([network(torch.cat(parts[1], dim=-1)) for network in networks])
    assert_close(own, theirs)
    (own * weights).sum().backward()
    (theirs * weights).sum().backward()
    for layer, (weight, bias) in enumerate(zip(stack.weights, stack.biases, strict=True)):
        for member, network in enumerate(networks):
            assert_close(weight.grad[member], network[2 * layer].weight.grad.t(), rtol=1e-4, atol=1e-5)
            assert_close(bias.grad[member, 0], network[2 * layer].bias.grad, rtol=1e-4, atol=1e-5)
    assert parts[0][0].grad is None
    assert_close(parts[0][1].grad, parts[1][1].grad, rtol=1e-4, atol=1e-5)


def test_frozen_networks_pass_the_gradient_through_and_keep_none():
    torch.manual_seed(0)
    stack = StackedMLP([3, 8, 1], members=2)
    x = torch.randn(4, 3, requires_grad=True)
    stack(x, frozen=True).sum().backward()
    assert all(parameter.grad is None for parameter in stack.parameters())
    twin = x.detach().clone().requires_grad_()
    sum(network(twin).sum() for network in separate(stack)).backward()
    assert_close(x.grad, twin.grad)
    assert_close(stack(x, first=True)[0], separate(stack)[0](x))
    assert stack(x, first=True).shape == (1, 4, 1)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("outputs_too", [True, False])
def test_features_are_the_last_hidden_layer_and_carry_gradients(activation, outputs_too):
    torch.manual_seed(0)
    stack = StackedMLP([3, 6, 5, 2], activation=activation)
    (network,) = separate(stack)
    x = torch.randn(4, 3)
    outputs, features = stack.with_features(x)
    hidden = network[:-1](x)
    assert_close(features[0], hidden)
    scale = 1.0 if outputs_too else 0.0
    loss = features.square().sum() + (outputs.sum() if outputs_too else 0.0)
    loss.backward()
    (hidden.square().sum() + scale * network[-1](hidden).sum()).backward()
    assert_close(stack.weights[0].grad[0], network[0].weight.grad.t(), rtol=1e-4, atol=1e-5)
    if outputs_too:
        assert_close(stack.weights[2].grad[0], network[4].weight.grad.t(), rtol=1e-4, atol=1e-5)
    else:
        assert stack.weights[2].grad is None


def test_weights_start_as_torchs_linear_layers_do():
    # nn.Linear: uniform in +-1/sqrt(inputs), weights and biases alike; its standard deviation is the bound / sqrt 3.
    stack = ContinuousNetworkConfig(hidden_sizes=[400]).make(100, 2, members=2, seed=0)
    bound = 1 / math.sqrt(100)
    assert stack.weights[0].abs().max() <= bound
    assert stack.weights[0].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert stack.biases[1].abs().max() <= 1 / math.sqrt(400)
    assert not torch.equal(stack.weights[0][0], stack.weights[0][1])
    again = ContinuousNetworkConfig(hidden_sizes=[400]).make(100, 2, members=2, seed=0)
    assert torch.equal(stack.weights[0], again.weights[0])


def test_the_mirror_is_the_first_member_and_sees_steps():
    torch.manual_seed(0)
    stack = StackedMLP([3, 8, 2], members=2)
    mirror, x = StackedMirror(stack), torch.randn(4, 3)
    for _ in range(2):
        outputs, features = mirror(x.numpy())
        expected, hidden = stack.with_features(x)
        np.testing.assert_allclose(outputs, expected[0].detach().numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(features, hidden[0].detach().numpy(), rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            stack.weights[0].mul_(2)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_large_layers_through_the_other_library_give_the_same(activation, monkeypatch):
    """Products of 130 x 160 x 160 numbers and more; the library is asked for on any processor."""
    monkeypatch.setattr(continuous_networks, "onednn_pays", lambda: True)
    torch.manual_seed(0)
    stack = StackedMLP([5, 160, 160, 1], members=2, activation=activation)
    x, results = torch.randn(130, 5), []
    weights = torch.randn(2, 130, 1)
    for limit in (0, 2**40):  # every product, and none
        monkeypatch.setattr(continuous_networks, "MIN_PRODUCTS", limit)
        inputs = x.clone().requires_grad_()
        stack.zero_grad()
        output = stack(inputs)
        (output * weights).sum().backward()
        results.append([output, inputs.grad, *(parameter.grad.clone() for parameter in stack.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
