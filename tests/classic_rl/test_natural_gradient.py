"""Conjugate gradients, Fisher-vector products and natural steps against explicit matrices."""

from __future__ import annotations

import doctest
import math

import gymnasium
import numpy as np
import pytest
import torch
from torch.func import functional_call

import classic_rl.natural_gradient
from classic_rl.distributions import Categorical, StateDependentExploration
from classic_rl.divergence import describe, fisher_metric, kl_from
from classic_rl.natural_gradient import FisherProduct, actor_parameters, conjugate_gradient, natural_step
from classic_rl.networks import NetworkConfig
from classic_rl.policy import ActorCritic
from rlhf.errors import ConfigError

SPACES = {
    "discrete": gymnasium.spaces.Discrete(3),
    "multi_discrete": gymnasium.spaces.MultiDiscrete([2, 3]),
    "multi_binary": gymnasium.spaces.MultiBinary(2),
    "box": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
    "box_state_dependent": gymnasium.spaces.Box(-1, 1, (2,), np.float32),
}


def make_policy(kind, *, activation="tanh", hidden=(4, 3)):
    """A small policy in float64, whose weights are not near their start, and six states."""
    exploration = StateDependentExploration(initial_log_std=-0.3) if kind == "box_state_dependent" else None
    network = NetworkConfig(
        hidden_sizes=list(hidden), activation=activation, initial_log_std=-0.3, state_dependent=exploration
    )
    policy = ActorCritic(gymnasium.spaces.Box(-1, 1, (3,)), SPACES[kind], network=network, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in actor_parameters(policy):
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return policy, torch.randn(6, 3, generator=generator, dtype=torch.float64)


def explicit_fisher(policy, observations, kind):
    """F = E_s E_a [score score^T]: the definition, by enumeration; for Box by Gauss-Hermite quadrature, exact here."""
    parameters = actor_parameters(policy)
    size = sum(parameter.numel() for parameter in parameters)
    fisher = torch.zeros(size, size, dtype=torch.float64)
    for observation in observations:
        for action, probability in actions_and_probabilities(policy, observation, kind):
            log_prob = policy.distribution.log_probs_and_entropy(policy.actor(observation[None]), action[None])[0]
            gradients = torch.autograd.grad(log_prob.sum(), parameters)
            score = torch.cat([gradient.reshape(-1) for gradient in gradients])
            fisher += probability * torch.outer(score, score) / len(observations)
    return fisher


def actions_and_probabilities(policy, observation, kind):
    outputs = policy.actor(observation[None])
    if kind.startswith("box"):
        # The scores are polynomials of degree 2 in the noise, their products of degree 4; 5 nodes are exact to 9.
        nodes, weights = np.polynomial.hermite_e.hermegauss(5)
        weights = weights / math.sqrt(2 * math.pi)
        mean, std = normal_of(policy, outputs[0].detach())
        for i, x in enumerate(nodes):
            for j, y in enumerate(nodes):
                action = mean + std * torch.tensor([x, y])
                yield action, weights[i] * weights[j]
        return
    if kind == "discrete":
        choices = [torch.tensor(a) for a in range(3)]
    else:
        choices = [torch.tensor([a, b]) for a in range(2) for b in range(3 if kind == "multi_discrete" else 2)]
    for action in choices:
        log_prob = policy.distribution.log_probs_and_entropy(outputs, action[None])[0]
        yield action, log_prob.exp().item()


def normal_of(policy, outputs):
    """Mean and standard deviation; with state-dependent exploration sqrt(sum_h z_h^2 std_h^2 + 1e-6)."""
    log_std = policy.distribution.log_std.detach()
    if log_std.ndim == 1:
        return outputs, log_std.exp()
    mean, features = outputs[..., :2], outputs[..., 2:]
    return mean, (features[..., None] ** 2 * log_std.exp() ** 2).sum(-2).add(1e-6).sqrt()


def test_the_doctests():
    assert doctest.testmod(classic_rl.natural_gradient).failed == 0


def test_conjugate_gradients_solve_a_positive_definite_system():
    # sb3-contrib's tests/test_utils.py solves random systems A A^T in the same way; numpy's LU is the judge.
    generator = np.random.default_rng(0)
    for size in (1, 4, 10):
        root = generator.normal(size=(size, size))
        matrix, b = torch.from_numpy(root @ root.T + np.eye(size)), torch.from_numpy(generator.normal(size=size))
        x = conjugate_gradient(lambda v, matrix=matrix: matrix @ v, b, iterations=2 * size, tolerance=1e-24)
        np.testing.assert_allclose(x, np.linalg.solve(matrix.numpy(), b.numpy()), rtol=1e-8, atol=1e-10)


def test_conjugate_gradients_stop_early_and_count_products():
    # The identity is solved by its first product, whatever b is.
    products = []
    x = conjugate_gradient(lambda v: products.append(v) or v, torch.tensor([3.0, -2.0, 1.0]), iterations=10)
    assert x.tolist() == [3.0, -2.0, 1.0]
    assert len(products) == 1


def test_rough_conjugate_gradients_still_ascend():
    # b^T x > 0 after any number of iterations (Nocedal and Wright, theorem 5.3: each step grows b^T x - x^T A x / 2).
    diagonal = torch.logspace(-3, 3, 20, dtype=torch.float64)
    b = torch.ones(20, dtype=torch.float64)
    for iterations in (1, 2, 5):
        x = conjugate_gradient(lambda v: diagonal * v, b, iterations=iterations)
        assert torch.dot(b, x) > 0
        assert torch.dot(b, x) > 0.5 * torch.dot(x, diagonal * x)


@pytest.mark.parametrize("kind", sorted(SPACES))
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_the_fisher_product_is_that_of_the_explicit_matrix(kind, activation):
    policy, observations = make_policy(kind, activation=activation)
    fisher = explicit_fisher(policy, observations, kind)
    product = FisherProduct(policy, observations)
    columns = torch.stack([product(unit) for unit in torch.eye(len(fisher), dtype=torch.float64)], dim=1)
    torch.testing.assert_close(columns, fisher, rtol=1e-9, atol=1e-12)
    assert fisher.abs().max() > 0.01
    damped = FisherProduct(policy, observations, damping=0.25)
    vector = torch.linspace(-1, 1, len(fisher), dtype=torch.float64)
    torch.testing.assert_close(damped(vector), fisher @ vector + 0.25 * vector)


@pytest.mark.parametrize("kind", sorted(SPACES.keys() - {"box_state_dependent"}))  # whose features count as constants
def test_the_fisher_matrix_is_the_hessian_of_the_kl(kind):
    # The other definition: KL(old || theta) = 1/2 d^T F d + O(d^3). Both directions of KL share F; see below.
    policy, observations = make_policy(kind)
    old = describe(policy.distribution, policy.actor(observations))
    vector = torch.randn(sum(p.numel() for p in actor_parameters(policy)), generator=torch.Generator().manual_seed(2))
    vector = vector.double() / torch.linalg.vector_norm(vector)
    expected = 0.5 * float(torch.dot(vector, FisherProduct(policy, observations)(vector)))
    size, start = 1e-3, [parameter.detach().clone() for parameter in actor_parameters(policy)]
    with torch.no_grad():
        for sign in (1, -1):
            pieces = vector.split([parameter.numel() for parameter in start])
            for parameter, base, piece in zip(actor_parameters(policy), start, pieces, strict=True):
                parameter.copy_(base + sign * size * piece.view_as(base))
            kl = kl_from(old, policy.distribution, policy.actor(observations)).mean().item()
            assert kl / size**2 == pytest.approx(expected, rel=1e-2)


def test_the_old_policy_comes_first_in_the_kl():
    # p = (.5, .5) old, q = (.9, .1) new: KL(p || q) = .5 ln(.5/.9) + .5 ln(.5/.1) = .5108; the other way .3681.
    distribution = Categorical(2)
    old = describe(distribution, torch.tensor([[0.5, 0.5]]).log())
    assert kl_from(old, distribution, torch.tensor([[0.9, 0.1]]).log()).item() == pytest.approx(0.5108, abs=1e-4)


@pytest.mark.parametrize("kind", ["multi_discrete", "box", "box_state_dependent"])
def test_the_kl_equals_torch_distributions(kind):
    policy, observations = make_policy(kind)
    other, _ = make_policy(kind, hidden=(5,))
    if kind.startswith("box"):
        with torch.no_grad():
            other.distribution.log_std += torch.tensor([0.7, -0.4])
    p, q = policy.actor(observations), other.actor(observations)
    kl = kl_from(describe(policy.distribution, p), other.distribution, q)
    if kind.startswith("box"):
        normals = [torch.distributions.Normal(*normal_of(pol, outputs)) for outputs, pol in ((p, policy), (q, other))]
        expected = torch.distributions.kl_divergence(*normals).sum(-1)
    else:
        parts = [
            torch.distributions.kl_divergence(
                *(torch.distributions.Categorical(logits=x[:, start:stop]) for x in (p, q))
            )
            for start, stop in ((0, 2), (2, 5))
        ]
        expected = sum(parts)
    torch.testing.assert_close(kl, expected)


def test_a_natural_step_has_the_length_it_was_asked_for():
    policy, observations = make_policy("discrete")
    fisher = explicit_fisher(policy, observations, "discrete") + 0.01 * torch.eye(
        sum(p.numel() for p in actor_parameters(policy)), dtype=torch.float64
    )
    gradient = torch.randn(len(fisher), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    product = FisherProduct(policy, observations, damping=0.01)
    step = natural_step(product, gradient, max_kl=0.02, iterations=200)
    solved = torch.linalg.solve(fisher, gradient)
    expected = math.sqrt(2 * 0.02 / torch.dot(gradient, solved).item()) * solved
    torch.testing.assert_close(step.step, expected, rtol=1e-4, atol=1e-6)
    assert 0.5 * torch.dot(step.step, fisher @ step.step).item() == pytest.approx(0.02, rel=1e-6)
    assert step.predicted_gain == pytest.approx(torch.dot(gradient, step.step).item())
    assert step.residual < 1e-3
    assert natural_step(product, torch.zeros_like(gradient), max_kl=0.02, iterations=5) is None


def test_the_natural_direction_does_not_depend_on_the_parameterisation():
    """One linear layer, written as W and as W = A^-1 W': natural steps give one policy, plain gradients two."""
    policy, observations = make_policy("discrete", hidden=())
    observations = observations[:3]
    torch.manual_seed(0)
    # New coordinates: observations are mapped by a matrix, so that W' x' = W x.
    mixing = torch.randn(3, 3, dtype=torch.float64) + 2 * torch.eye(3, dtype=torch.float64)
    other, _ = make_policy("discrete", hidden=())
    with torch.no_grad():
        layer, moved_layer = policy.actor.layers[0], other.actor.layers[0]
        moved_layer.weight.copy_(layer.weight @ torch.linalg.inv(mixing))
        moved_layer.bias.copy_(layer.bias)
    inputs = (observations, observations @ mixing.T)
    torch.testing.assert_close(policy.actor(inputs[0]), other.actor(inputs[1]))
    natural, plain = [], []
    for model, states in zip((policy, other), inputs, strict=True):
        parameters = actor_parameters(model)
        # The mean log-probability of action 2 shall grow.
        gain = torch.log_softmax(model.actor(states), -1)[:, 2].mean()
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(gain, parameters)])
        # Logits have a direction without information (adding a constant), which only damping holds still.
        product = FisherProduct(model, states, damping=1e-9)
        step = natural_step(product, gradient, max_kl=1e-4, iterations=500).step
        for moves, direction in ((natural, step), (plain, 1e-3 * gradient)):
            pieces = direction.split([p.numel() for p in parameters])
            shifted = {
                name: p + piece.view_as(p)
                for (name, p), piece in zip(model.actor.named_parameters(), pieces, strict=True)
            }
            moves.append(torch.softmax(functional_call(model.actor, shifted, (states,)), -1))
    before = torch.softmax(policy.actor(inputs[0]), -1)
    torch.testing.assert_close(natural[0], natural[1], atol=1e-6, rtol=0)
    assert (natural[0] - before).abs().max() > 1e-3
    assert (plain[0] - plain[1]).abs().max() > 0.2 * (plain[0] - before).abs().max()


def test_other_distributions_are_refused():
    with pytest.raises(ConfigError, match="exact KL"):
        fisher_metric(torch.nn.Identity(), torch.zeros(1, 2))
    with pytest.raises(ConfigError, match="exact KL"):
        kl_from(describe(Categorical(2), torch.zeros(1, 2)), torch.nn.Identity(), torch.zeros(1, 2))


def test_shares_of_several_processes_add_up():
    """Two halves with a sum over both are the whole: what `reduce` does across processes."""
    policy, observations = make_policy("box")
    whole = FisherProduct(policy, observations, damping=0.1)
    vector = torch.linspace(-1, 1, sum(p.numel() for p in actor_parameters(policy)), dtype=torch.float64)
    totals = iter([torch.tensor(6.0), torch.tensor(6.0)])
    parts = [FisherProduct(policy, half, reduce=lambda _: next(totals)) for half in observations.split([2, 4])]
    for part in parts:
        part._reduce = lambda tensor: tensor
    torch.testing.assert_close(parts[0](vector) + parts[1](vector) + 0.1 * vector, whole(vector))
