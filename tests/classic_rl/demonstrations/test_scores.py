"""Rows 45 to 47: closed-form scores against autograd."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces

from classic_rl.linear_policies import gaussian_score, network_score, softmax_probabilities, softmax_score
from classic_rl.networks import MLP, NetworkConfig
from classic_rl.policy import ActorCritic


def test_softmax_linear_score():
    """Row 45: phi(s, a) - E[phi(s, .)]."""
    generator = np.random.default_rng(0)
    theta, features = generator.normal(size=5), generator.normal(size=(3, 5))
    for action in range(3):
        weights = torch.tensor(theta, requires_grad=True)
        torch.log_softmax(torch.tensor(features) @ weights, dim=0)[action].backward()
        score = softmax_score(theta, features, action=action)
        np.testing.assert_allclose(score, weights.grad.numpy(), atol=1e-12)
    scores = np.stack([softmax_score(theta, features, action=action) for action in range(3)])
    np.testing.assert_allclose(softmax_probabilities(theta, features) @ scores, 0, atol=1e-12)


def test_gaussian_linear_score():
    """Row 46: (a - mu(s)) phi(s) / sigma^2."""
    generator = np.random.default_rng(1)
    theta, features = generator.normal(size=4), generator.normal(size=4)
    weights = torch.tensor(theta, requires_grad=True)
    torch.distributions.Normal(torch.tensor(features) @ weights, 0.7).log_prob(torch.tensor(1.3)).backward()
    score = gaussian_score(theta, features, action=1.3, std=0.7)
    np.testing.assert_allclose(score, weights.grad.numpy(), atol=1e-12)


def test_network_score():
    """Row 47, flag 15: df_a - E[df]; the bracket holds both terms before a credit multiplies them."""
    torch.manual_seed(0)
    network, x = MLP([3, 8, 4], kernel="torch"), torch.randn(3)
    parameters = list(network.parameters())

    def gradient(value):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, retain_graph=True)]).numpy()

    outputs = network(x)
    jacobian = np.stack([gradient(output) for output in outputs])
    probabilities = torch.softmax(outputs, dim=0).detach().numpy()
    for action in range(4):
        direct = gradient(torch.log_softmax(outputs, dim=0)[action])
        np.testing.assert_allclose(network_score(jacobian, probabilities, action=action), direct, atol=1e-6)


@pytest.mark.parametrize(
    ("space", "action"), [(spaces.Discrete(3), torch.tensor(2)), (spaces.Box(-9, 9, (1,)), torch.tensor([0.4]))]
)
def test_a_policy_without_hidden_layers_is_the_linear_policy(space, action):
    """Rows 45, 46: `network: {hidden_sizes: []}`; features are the observation, and 1 for the bias."""
    policy = ActorCritic(
        spaces.Box(-1, 1, (2,)), space, network=NetworkConfig(hidden_sizes=[], initial_log_std=math.log(0.5)), seed=0
    )
    observation = torch.tensor([0.3, -0.8])
    policy({"observations": observation}, action).log_probs.backward()
    layer = policy.actor.layers[0]
    found = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1).numpy()
    weights = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().numpy().astype(np.float64)
    phi = np.array([0.3, -0.8, 1.0])
    if isinstance(space, spaces.Discrete):
        features = np.stack([np.kron(np.eye(3)[a], phi) for a in range(3)])
        expected = softmax_score(weights.reshape(-1), features, action=2).reshape(3, 3)
    else:
        expected = gaussian_score(weights[0], phi, action=0.4, std=0.5)[None]
    np.testing.assert_allclose(found, expected, atol=1e-6)
