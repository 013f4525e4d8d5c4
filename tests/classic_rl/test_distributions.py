"""Log-probs and entropies against torch.distributions; draws against their probabilities."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Categorical, Independent, Normal
from torch.testing import assert_close

from classic_rl.distributions import make_distribution
from classic_rl.divergence import describe, kl_from
from classic_rl.networks import MLP
from classic_rl.policy import ActorCritic
from rlhf.core.types import Policy
from rlhf.errors import ConfigError


def test_discrete_against_torch():
    distribution = make_distribution(spaces.Discrete(5))
    logits, actions = torch.randn(3, 4, 5) * 3, torch.randint(5, (3, 4))
    log_probs, entropy = distribution.log_probs_and_entropy(logits, actions)
    oracle = Categorical(logits=logits)
    assert_close(log_probs, oracle.log_prob(actions))
    assert_close(entropy, oracle.entropy())


@pytest.mark.parametrize(
    "space", [spaces.MultiDiscrete([2, 3, 4]), spaces.MultiBinary(3), spaces.MultiDiscrete([[2, 3], [4, 2]])]
)
def test_independent_choices_against_torch(space):
    distribution = make_distribution(space)
    logits = torch.randn(3, 4, distribution.num_outputs)
    actions = torch.stack([torch.randint(size, (3, 4)) for size in distribution.sizes], dim=-1)
    log_probs, entropy = distribution.log_probs_and_entropy(logits, actions)
    parts = [Categorical(logits=part) for part in logits.split(distribution.sizes, dim=-1)]
    assert_close(log_probs, sum(part.log_prob(actions[..., index]) for index, part in enumerate(parts)))
    assert_close(entropy, sum(part.entropy() for part in parts))
    drawn = distribution.sample(logits[0].numpy(), distribution.noise(np.random.default_rng(0), (4,)))
    assert all(space.contains(action) for action in distribution.to_environment(drawn).astype(space.dtype))


def test_box_against_torch():
    distribution = make_distribution(spaces.Box(-1, 1, (2, 3)), initial_log_std=-0.5)
    means, actions = torch.randn(3, 4, 6), torch.randn(3, 4, 6)
    log_probs, entropy = distribution.log_probs_and_entropy(means, actions)
    oracle = Independent(Normal(means, distribution.log_std.exp()), 1)
    assert_close(log_probs, oracle.log_prob(actions))
    assert_close(entropy, oracle.entropy())
    accepted = distribution.to_environment(actions[0].numpy() * 10)
    assert accepted.shape == (4, 2, 3)
    assert np.abs(accepted).max() <= 1


def test_the_starts_of_discrete_spaces_are_restored():
    actions = make_distribution(spaces.Discrete(3, start=-1)).to_environment(np.array([0, 1, 2]))
    assert actions.tolist() == [-1, 0, 1]
    shifted = make_distribution(spaces.MultiDiscrete([2, 2], start=[5, 7])).to_environment(np.array([[0, 1]]))
    assert shifted.tolist() == [[5, 8]]


def test_draws_have_the_stated_frequencies():
    # softmax(log [.1, .2, .7]) = [.1, .2, .7]; 5 standard errors of 100,000 draws are at most .0079.
    distribution, probabilities = make_distribution(spaces.Discrete(3)), np.array([0.1, 0.2, 0.7])
    logits = np.log(np.tile(probabilities, (100_000, 1))).astype(np.float32)
    drawn = distribution.sample(logits, distribution.noise(np.random.default_rng(0), (100_000,)))
    assert np.abs(np.bincount(drawn) / 100_000 - probabilities).max() < 0.008
    gaussian = make_distribution(spaces.Box(-1, 1, (1,)), initial_log_std=0.5)
    values = gaussian.sample(
        np.full((100_000, 1), 2.0, np.float32), gaussian.noise(np.random.default_rng(1), (100_000,))
    )
    assert values.mean() == pytest.approx(2.0, abs=5 * np.exp(0.5) / 316)
    assert values.std() == pytest.approx(np.exp(0.5), rel=0.02)


@pytest.mark.parametrize(
    "space",
    [spaces.Discrete(5), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3), spaces.Box(-1, 1, (2,))],
    ids=["discrete", "multi_discrete", "multi_binary", "box"],
)
def test_entropy_and_kl_are_means_over_draws(space):
    # Stable-Baselines3's tests/test_distributions.py: over 50,000 draws, -mean log pi is the entropy within 5e-3, and
    # mean (log p - log q) is KL(p || q) within 5 %; both relative.
    draws = 200_000
    first, second = (make_distribution(space) for _ in "pq")
    generator = torch.Generator().manual_seed(0)
    here, there = (torch.randn(1, first.num_outputs, generator=generator) for _ in "pq")
    if isinstance(space, spaces.Box):
        with torch.no_grad():
            first.log_std += 0.3
            second.log_std -= 0.2
    rows = here.expand(draws, -1)
    drawn = first.sample(rows.numpy(), first.noise(np.random.default_rng(0), (draws,)))
    with torch.no_grad():
        actions = torch.as_tensor(drawn)
        log_p, entropy = first.log_probs_and_entropy(rows, actions)
        log_q, _ = second.log_probs_and_entropy(there.expand(draws, -1), actions)
        kl = kl_from(describe(first, here), second, there)
    assert -log_p.mean().item() == pytest.approx(entropy[0].item(), rel=5e-3)
    assert (log_p - log_q).mean().item() == pytest.approx(kl.item(), rel=0.05)


def test_greedy_is_the_most_probable():
    assert make_distribution(spaces.Discrete(3)).greedy(np.array([[0.0, 2.0, 1.0]])).tolist() == [1]
    both = make_distribution(spaces.MultiDiscrete([2, 3])).greedy(np.array([[0.0, 1.0, 3.0, 2.0, 1.0]]))
    assert both.tolist() == [[1, 0]]


def test_a_space_without_distribution_is_refused():
    with pytest.raises(ConfigError, match=r"no action distribution.*Text"):
        make_distribution(spaces.Text(3))


@pytest.mark.parametrize("action_space", [spaces.Discrete(2), spaces.MultiDiscrete([2, 3]), spaces.Box(-1, 1, (2,))])
@pytest.mark.parametrize("critic", [True, False])
def test_the_actor_critic_is_a_policy(action_space, critic):
    policy = ActorCritic(spaces.Box(-1, 1, (3,)), action_space, critic=critic, seed=0)
    assert isinstance(policy, Policy)
    shape = policy.distribution.action_shape
    actions = torch.zeros(4, 5, *shape, dtype=policy.distribution.action_dtype)
    output = policy({"observations": torch.randn(4, 5, 3)}, actions)
    assert output.log_probs.shape == output.entropy.shape == (4, 5)
    assert (output.values is not None) == critic
    if critic:
        assert output.values.shape == (4, 5)


def test_initial_weights_are_orthogonal_with_the_stated_gains():
    policy = ActorCritic(spaces.Box(-1, 1, (64,)), spaces.Discrete(4), seed=0)
    # W orthogonal with gain g: W W^T = g^2 I; gains sqrt 2 (hidden), 0.01 (actor), 1 (critic).
    hidden, actor, critic = policy.actor.layers[0], policy.actor.layers[-1], policy.critic.layers[-1]
    assert_close(hidden.weight @ hidden.weight.T, 2 * torch.eye(64), atol=1e-5, rtol=0)
    assert_close(actor.weight @ actor.weight.T, 1e-4 * torch.eye(4), atol=1e-9, rtol=0)
    assert_close(critic.weight @ critic.weight.T, torch.eye(1), atol=1e-5, rtol=0)
    assert all((layer.bias == 0).all() for layer in [*policy.actor.layers, *policy.critic.layers])


def test_a_seed_fixes_the_weights_and_leaves_torchs_generator_alone():
    before = torch.get_rng_state()
    first, second = (ActorCritic(spaces.Box(-1, 1, (3,)), spaces.Discrete(2), seed=7) for _ in range(2))
    assert torch.equal(first.actor.layers[0].weight, second.actor.layers[0].weight)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_numpy_kernel_has_torchs_outputs_and_gradients(activation):
    torch.manual_seed(0)
    fast = MLP([5, 16, 8, 3], activation=activation)
    plain = copy.deepcopy(fast)
    plain.kernel = "torch"
    x, weights = torch.randn(4, 6, 5), torch.randn(4, 6, 3)
    for network in (fast, plain):
        (network(x) * weights).sum().backward()
    assert_close(fast(x), plain(x))
    assert_close([p.grad for p in fast.parameters()], [p.grad for p in plain.parameters()], rtol=1e-5, atol=1e-5)
    # What the kernel cannot do goes torch's way: gradients of the input, other dtypes.
    x.requires_grad_()
    fast(x).sum().backward()
    assert x.grad is not None
    assert fast.double()(x.detach().double()).dtype == torch.float64
