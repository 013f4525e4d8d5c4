"""State-dependent exploration: its density, its gradient, its noise, and Stable-Baselines3's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.testing import assert_close

from classic_rl.continuous_networks import ContinuousNetworkConfig
from classic_rl.state_dependent_exploration import (
    HeldMatrices,
    StateDependentActor,
    StateDependentExploration,
    StateDependentGaussian,
    marginal_std,
)


def gaussian(features, actions, **settings):
    config = StateDependentExploration(**settings)
    return StateDependentGaussian(spaces.Box(-1, 1, (actions,)), config=config, num_features=features)


def test_the_gradient_of_the_log_probability_is_the_papers():
    # tests/test_sde.py of Stable-Baselines3: with s_j^2 = sum_i z_i^2 std_ij^2 and n_j = a_j - mean_j,
    # d log pi / d std_ij = (n_j^2 - s_j^2) / s_j^3 x z_i^2 std_ij / s_j, and d std / d log std = std.
    torch.manual_seed(0)
    distribution = gaussian(3, 4).double()
    distribution.log_std.data = 0.5 * torch.randn(3, 4, dtype=torch.float64)
    features, mean, noise = (torch.rand(5, size, dtype=torch.float64) for size in (3, 4, 4))
    log_probs, _ = distribution.log_probs_and_entropy(torch.cat([mean, features], -1), mean + noise)
    log_probs.sum().backward()
    std = distribution.log_std.detach().exp()
    s = (features.square() @ std.square()).sqrt()
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for row in range(5):
        for i in range(3):
            for j in range(4):
                slope = (noise[row, j] ** 2 - s[row, j] ** 2) / s[row, j] ** 3
                expected[i, j] += slope * features[row, i] ** 2 * std[i, j] / s[row, j] * std[i, j]
    assert_close(distribution.log_std.grad, expected, rtol=1e-4, atol=1e-5)


def test_log_probs_and_entropy_are_stable_baselines3s():
    sb3 = pytest.importorskip("stable_baselines3.common.distributions")
    torch.manual_seed(0)
    distribution = gaussian(6, 2)
    theirs = sb3.StateDependentNoiseDistribution(2, full_std=True, use_expln=False, squash_output=False)
    _, log_std = theirs.proba_distribution_net(6, log_std_init=-0.7, latent_sde_dim=6)
    distribution.log_std.data.copy_(log_std.data)
    mean, features, actions = torch.randn(9, 2), torch.randn(9, 6), torch.randn(9, 2)
    theirs.proba_distribution(mean, log_std, features)
    log_probs, entropy = distribution.log_probs_and_entropy(torch.cat([mean, features], -1), actions)
    assert_close(log_probs, theirs.log_prob(actions))
    assert_close(entropy, theirs.entropy())


def test_features_are_not_shaped_by_exploration():
    distribution = gaussian(3, 2)
    parameters = torch.randn(4, 5, requires_grad=True)
    log_probs, entropy = distribution.log_probs_and_entropy(parameters, torch.randn(4, 2))
    (log_probs + entropy).sum().backward()
    assert (parameters.grad[:, 2:] == 0).all()
    assert (parameters.grad[:, :2] != 0).all()


def test_noise_is_held_and_differs_between_environments():
    distribution = gaussian(3, 2, sample_every=4)
    noise = distribution.noise(np.random.default_rng(0), (10, 2))
    assert noise.shape == (10, 2, 3, 2)
    for start, stop in [(0, 4), (4, 8), (8, 10)]:
        assert (noise[start:stop] == noise[start]).all()
    assert not np.array_equal(noise[3], noise[4])
    assert not np.array_equal(noise[0, 0], noise[0, 1])
    held = gaussian(3, 2).noise(np.random.default_rng(0), (10, 2))  # null: one matrix for the whole rollout
    assert (held == held[0]).all()
    assert distribution.noise(np.random.default_rng(0), (5,)).shape == (5, 3, 2)


def test_draws_have_the_marginal_spread():
    # z = (3, 4), std = e^-1 everywhere: variance 25 e^-2; four standard errors of 40,000 draws' variance are 3 percent.
    distribution = gaussian(2, 1, initial_log_std=-1.0)
    parameters = np.tile(np.array([[0.5, 3.0, 4.0]], dtype=np.float32), (40_000, 1))
    drawn = distribution.sample(parameters, distribution.noise(np.random.default_rng(0), (40_000,)))
    assert drawn.mean() == pytest.approx(0.5, abs=4 * 5 * np.exp(-1) / 200)
    assert drawn.var() == pytest.approx(25 * np.exp(-2), rel=0.03)
    assert distribution.greedy(parameters[:2]).tolist() == [[0.5], [0.5]]


def test_the_squashed_actor_scores_its_marginal():
    torch.manual_seed(0)
    config = StateDependentExploration(initial_log_std=-1.0)
    actor = StateDependentActor(3, 2, network=ContinuousNetworkConfig(hidden_sizes=[8]), config=config, seed=0)
    observations, noise = torch.randn(6, 3), torch.randn(8, 2)
    actions, log_probs = actor(observations, noise)
    outputs, features = actor.trunk.with_features(observations)
    mean = outputs[0].clamp(-2, 2)
    assert_close(actions, torch.tanh(mean + features[0] @ (noise * np.exp(-1.0))))
    std = (features[0].square().sum(-1, keepdim=True) * np.exp(-2.0) + 1e-6).sqrt().expand(6, 2)
    oracle = Independent(TransformedDistribution(Normal(mean, std), TanhTransform(cache_size=1)), 1)
    assert_close(log_probs, oracle.log_prob(actions), rtol=1e-4, atol=1e-4)
    log_probs.sum().backward()
    assert all(parameter.grad is not None for parameter in actor.parameters())
    assert_close(marginal_std(features[0], actor.log_std), std)


def test_held_matrices_are_renewed_on_time_and_travel():
    config = StateDependentExploration(sample_every=3)
    actor = StateDependentActor(3, 2, network=ContinuousNetworkConfig(hidden_sizes=[8]), config=config, seed=0)
    held, generator = HeldMatrices(actor, num_envs=2), np.random.default_rng(0)
    seen = [held(generator).copy() for _ in range(5)]
    assert np.array_equal(seen[0], seen[2])
    assert not np.array_equal(seen[2], seen[3])
    assert np.array_equal(seen[3], seen[4])
    other = HeldMatrices(actor, num_envs=2)
    other.load_state_dict(held.state_dict())
    state = generator.bit_generator.state
    following = [held(generator).copy() for _ in range(3)]
    generator.bit_generator.state = state
    assert all(np.array_equal(other(generator), own) for own in following)
