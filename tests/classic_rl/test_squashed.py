"""The tanh-Gaussian's log-probability against torch.distributions, and where that one runs out of digits."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.testing import assert_close

from classic_rl.squashed import log_tanh_slope, squash, squashed_log_prob


def oracle(mean, std):
    return Independent(TransformedDistribution(Normal(mean, std), TanhTransform(cache_size=1)), 1)


def test_log_probs_are_those_of_the_transformed_distribution():
    torch.manual_seed(0)
    mean, log_std, noise = (0.5 * torch.randn(3, 50, 4, dtype=torch.float64)).unbind()
    actions, log_probs = squash(mean, log_std, noise=noise)
    distribution = oracle(mean, log_std.exp())
    assert_close(actions, torch.tanh(mean + log_std.exp() * noise))
    assert_close(log_probs, distribution.log_prob(actions), rtol=1e-7, atol=1e-7)
    u = mean + log_std.exp() * noise
    assert_close(squashed_log_prob(u, mean, log_std.exp()), log_probs)


def test_gradients_are_those_of_the_reparameterized_draw():
    torch.manual_seed(0)
    mean, log_std, noise = (0.5 * torch.randn(3, 20, 2, dtype=torch.float64)).unbind()
    gradients = []
    for own in (True, False):
        leaves = [mean.clone().requires_grad_(), log_std.clone().requires_grad_()]
        if own:
            actions, log_probs = squash(*leaves, noise=noise)
        else:
            distribution = oracle(leaves[0], leaves[1].exp())
            u = leaves[0] + leaves[1].exp() * noise
            actions = torch.tanh(u)
            # The chain rule once more, with the slope written out instead of the transform's own formula.
            normal = Independent(Normal(leaves[0], leaves[1].exp()), 1).log_prob(u)
            log_probs = normal - torch.log(1 - actions.square()).sum(-1)
            assert_close(distribution.log_prob(actions), log_probs, rtol=1e-6, atol=1e-6)
        (0.3 * log_probs + actions.square().sum(-1)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("u", [-40.0, -12.0, 0.5, 12.0, 40.0])
def test_the_slope_keeps_its_digits_where_tanh_is_one(u):
    # 1 - tanh(u)^2 = 4 / (e^u + e^-u)^2, whose logarithm is 2 log 2 - 2 log(e^u + e^-u).
    exact = 2 * math.log(2) - 2 * (abs(u) + math.log1p(math.exp(-2 * abs(u))))
    assert log_tanh_slope(torch.tensor(u)).item() == pytest.approx(exact, rel=1e-6)


def test_the_density_integrates_to_one():
    # Squashing keeps all of the mass inside (-1, 1); a normal cut at the bounds would not add up.
    edges = torch.linspace(-1, 1, 400_001, dtype=torch.float64)
    middle = (edges[1:] + edges[:-1]) / 2
    mean, std = torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    density = squashed_log_prob(torch.atanh(middle)[:, None], mean, std).exp()
    assert (density.sum() * 2 / 400_000).item() == pytest.approx(1.0, abs=1e-5)
