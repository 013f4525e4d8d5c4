"""State-dependent exploration: its density, its gradient, its noise, and Stable-Baselines3's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.testing import assert_close

from classic_rl.collector import CollectSteps
from classic_rl.continuous_networks import ContinuousNetworkConfig
from classic_rl.environments import EnvironmentConfig
from classic_rl.episodes import make_collector
from classic_rl.networks import MLP, NetworkConfig, NumpyMirror
from classic_rl.policy import ActorCritic
from classic_rl.saving import load, save
from classic_rl.state_dependent_exploration import (
    HeldMatrices,
    StateDependentActor,
    StateDependentExploration,
    StateDependentGaussian,
    marginal_std,
)
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError


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


# --- on-policy --------------------------------------------------------------------------------------------------------


def policy_with(config, *, action_space=None):
    network = NetworkConfig(hidden_sizes=[8, 4], state_dependent=config)
    return ActorCritic(spaces.Box(-1, 1, (3,)), action_space or spaces.Box(-2, 2, (1,)), network=network, seed=0)


def test_networks_append_features_without_gradient():
    torch.manual_seed(0)
    fast = MLP([3, 8, 4, 2], with_features=True)
    plain = MLP([3, 8, 4, 2], with_features=True, kernel="torch")
    plain.load_state_dict(fast.state_dict())
    x, weights = torch.randn(5, 3), torch.randn(5, 6)
    hidden = torch.tanh(fast.layers[1](torch.tanh(fast.layers[0](x))))
    for network in (fast, plain):
        outputs = network(x)
        assert_close(outputs[:, 2:], hidden)
        (outputs * weights).sum().backward()
    assert_close([p.grad for p in fast.parameters()], [p.grad for p in plain.parameters()], rtol=1e-4, atol=1e-5)
    assert (fast.layers[2].bias.grad - weights[:, :2].sum(0)).abs().max() < 1e-5
    np.testing.assert_allclose(NumpyMirror(fast)(x.numpy()), fast(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_collected_actions_share_a_matrix_and_are_scored_by_their_marginal():
    policy = policy_with(StateDependentExploration(sample_every=4))
    algorithm = ALGORITHMS["a2c"]
    environment = EnvironmentConfig(id="Pendulum-v1", num_envs=2)
    collector = make_collector(CollectSteps(steps=8), policy, environment, algorithm, seed=0)
    rollout = collector.collect()
    collector.close()
    parameters = policy.actor(rollout.inputs["observations"]).detach()
    mean, features = parameters.split([1, 4], dim=-1)
    noise = rollout.actions - mean
    std = torch.exp(torch.tensor(-2.0))
    spread = (features.square().sum(-1, keepdim=True) * std**2 + 1e-6).sqrt()
    assert_close(rollout.old_log_probs, Normal(mean, spread).log_prob(rollout.actions)[..., 0], rtol=1e-4, atol=1e-4)
    drawn = policy.distribution.noise(np.random.default_rng((0, 0, 0)), (8, 2))
    expected = np.einsum("nth,tnha->nta", features.numpy(), drawn * std.item())
    np.testing.assert_allclose(noise.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_a_saved_policy_comes_back(tmp_path):
    policy = policy_with(StateDependentExploration(initial_log_std=-1.0))
    save(tmp_path, policy)
    loaded, observation = load(tmp_path), np.array([0.1, 0.2, 0.3], dtype=np.float32)
    mean = policy.actor(torch.from_numpy(observation)[None])[0, :1].detach().numpy()
    np.testing.assert_allclose(loaded.predict(observation), np.clip(mean, -2, 2), rtol=1e-5)
    assert loaded.predict(observation, deterministic=False) != loaded.predict(observation, deterministic=False)


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ConfigError, match=r"network\.state_dependent"):
        policy_with(StateDependentExploration(), action_space=spaces.Discrete(2))
