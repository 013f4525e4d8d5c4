"""Q networks: dueling forms, noisy layers, images, and the NumPy gradient against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from classic_rl.direct import DirectGradient
from classic_rl.noisy import ROWS_TO_BUILD, NoisyLinear, resample_noise, silence_noise
from classic_rl.optimization import FlatNetwork, OptimizerConfig
from classic_rl.q_networks import DuelingConfig, QNetwork, QNetworkConfig, aggregate
from rlhf.errors import ConfigError

VECTOR = spaces.Box(-1, 1, (4,), np.float32)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("max", [0.9, 0.3, 1.5]), ("mean", [1.5, 0.9, 2.1]), ("naive", [1.7, 1.1, 2.3])],
)
def test_dueling_forms(aggregation, expected):
    """V = 1.5, A = .2, -.4, .8: mean A = .2, max A = .8."""
    found = aggregate(torch.full((1, 1, 1), 1.5), torch.tensor([[[0.2], [-0.4], [0.8]]]), aggregation=aggregation)
    assert found.flatten().tolist() == pytest.approx(expected)


def dueling(aggregation, **more):
    config = QNetworkConfig(hidden_sizes=[8, 8], dueling=DuelingConfig(aggregation=aggregation, **more))
    return QNetwork(VECTOR, 3, config=config, seed=0)


def test_the_value_stream_is_what_each_form_says():
    """max: V = max_a Q. mean: V = mean_a Q. naive: neither (the pair cannot be told apart)."""
    x = torch.randn(5, 4)
    for aggregation, reduced in (("max", torch.amax), ("mean", torch.mean)):
        network = dueling(aggregation)
        values, _ = network.streams(x)
        assert torch.allclose(values[:, 0], reduced(network(x), dim=1), atol=1e-6)


@pytest.mark.parametrize(("aggregation", "same"), [("max", True), ("mean", True), ("naive", False)])
def test_a_constant_moved_between_the_streams_changes_naive_only(aggregation, same):
    """(V, A + c) gives the same Q exactly where the form subtracts A's level: identifiability."""
    network, x = dueling(aggregation), torch.randn(5, 4)
    before = network(x)
    with torch.no_grad():
        network.advantage[-1].bias += 3.0
    assert torch.allclose(network(x), before, atol=1e-5) == same


def test_the_trunk_gradient_can_be_rescaled():
    x, gradients = torch.randn(5, 4), []
    for rescale in (False, True):
        network = dueling("mean", rescale_trunk_gradient=rescale)
        network(x).sum().backward()
        gradients.append((network.trunk[0].weight.grad, network.value[0].weight.grad))
    assert torch.allclose(gradients[1][0], gradients[0][0] * 0.5**0.5)
    assert torch.allclose(gradients[1][1], gradients[0][1])


@pytest.mark.parametrize("rows", [1, ROWS_TO_BUILD])
def test_the_noisy_layer_is_the_papers_formula(rows):
    """Equations 9 to 11 with the noise matrix written out, and the gradient of every parameter."""
    layer = NoisyLinear(5, 3)
    resample_noise([layer], torch.Generator().manual_seed(0))
    noise = torch.outer(layer.noise_out, layer.noise_in)
    x, slope = torch.randn(rows, 5), torch.randn(rows, 3)
    outputs = layer(x)
    outputs.backward(slope)
    with torch.no_grad():
        weight, bias = layer.weight + layer.weight_sigma * noise, layer.bias + layer.bias_sigma * layer.noise_out
    assert torch.allclose(outputs, torch.nn.functional.linear(x, weight, bias), atol=1e-6)
    assert torch.allclose(layer.weight.grad, slope.t() @ x, atol=1e-6)
    assert torch.allclose(layer.weight_sigma.grad, (slope.t() @ x) * noise, atol=1e-6)
    assert torch.allclose(layer.bias.grad, slope.sum(dim=0), atol=1e-6)
    assert torch.allclose(layer.bias_sigma.grad, slope.sum(dim=0) * layer.noise_out, atol=1e-6)
    assert layer.weight_sigma.unique().item() == pytest.approx(0.5 / 5**0.5)
    assert layer.weight.abs().max() <= 1 / 5**0.5


def test_noise_is_f_of_a_normal():
    """f(x) = sign(x) sqrt|x|, so f^2 is |x|: mean sqrt(2/pi) = .798, standard error of 40,000 draws .003."""
    layer = NoisyLinear(40_000, 1)
    resample_noise([layer], torch.Generator().manual_seed(1))
    assert (layer.noise_in**2).mean().item() == pytest.approx(0.7979, abs=0.015)
    assert layer.noise_in.mean().item() == pytest.approx(0.0, abs=0.025)


def test_silence_leaves_the_mean_weights():
    network = QNetwork(VECTOR, 3, config=QNetworkConfig(hidden_sizes=[8, 8], noisy=True), seed=0)
    x = torch.randn(5, 4)
    silent = network(x)
    resample_noise(network.noisy_layers, torch.Generator().manual_seed(0))
    assert not torch.allclose(network(x), silent)
    silence_noise(network.noisy_layers)
    assert torch.equal(network(x), silent)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_direct_gradient_is_autograds(activation):
    config = QNetworkConfig(hidden_sizes=[16, 12], activation=activation, kernel="torch")
    holder = FlatNetwork(QNetwork(VECTOR, 3, size=2, config=config, seed=0), OptimizerConfig())
    x, slope = torch.randn(9, 4), torch.randn(9, 3, 2)
    outputs = holder.network(x)
    holder.zero_grad()
    outputs.backward(slope)
    expected = holder.flat.gradient.clone()
    holder.flat.gradient.fill_(7.0)  # whatever stood there is replaced
    direct = DirectGradient(holder.network.plain)
    found = direct.forward(x.numpy())
    assert found.reshape(9, 3, 2) == pytest.approx(outputs.detach().numpy(), abs=1e-6)
    direct.backward(slope.numpy().reshape(9, 6))
    assert torch.allclose(holder.flat.gradient, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("convolutions", "shape", "features"),
    [("nature", (4, 84, 84), 3136), ("nature", (84, 84, 4), 3136), ("minatar", (10, 10, 6), 1024)],
)
def test_convolutions_have_the_papers_sizes(convolutions, shape, features):
    """Nature: 7 x 7 x 64 features; MinAtar: 8 x 8 x 16."""
    space = spaces.Box(0, 255, shape, np.uint8)
    config = QNetworkConfig(hidden_sizes=[32], convolutions=convolutions)
    network = QNetwork(space, 6, config=config, seed=0)
    images = torch.from_numpy(np.stack([space.sample() for _ in range(2)]))
    assert network.plain.layers[0].in_features == features
    assert network(images).shape == (2, 6, 1)


def test_bytes_are_scaled_for_nature():
    """255 is 1: the network sees x / 255, as bytes or as floats."""
    space = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    network = QNetwork(space, 2, config=QNetworkConfig(hidden_sizes=[8], convolutions="nature"), seed=0)
    white = network.convolutions[0](torch.full((1, 4, 84, 84), 255, dtype=torch.uint8))
    assert torch.allclose(white, torch.ones(1, 4, 84, 84))


@pytest.mark.parametrize(
    ("space", "convolutions", "message"),
    [
        (spaces.Box(0, 255, (4, 84, 84), np.uint8), "none", "need convolutions"),
        (VECTOR, "nature", "vectors need no"),
        (spaces.Box(0, 255, (4, 20, 20), np.uint8), "nature", "too small"),
    ],
)
def test_misfits_are_told(space, convolutions, message):
    with pytest.raises(ConfigError, match=message):
        QNetwork(space, 2, config=QNetworkConfig(convolutions=convolutions))


def test_soft_and_hard_copies():
    one, other = (FlatNetwork(QNetwork(VECTOR, 2, seed=seed)) for seed in (0, 1))
    before = one.vector.clone()
    one.move_towards(other, rate=0.25)
    assert torch.allclose(one.vector, 0.75 * before + 0.25 * other.vector)
    one.copy_from(other)
    assert torch.equal(one.network(torch.ones(1, 4)), other.network(torch.ones(1, 4)))


@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd"])
def test_a_flat_step_is_torchs_own_over_separate_parameters(name):
    """The same gradient through torch's optimizers over a list of parameters, clipped by torch's function."""
    config = OptimizerConfig(name=name, learning_rate=0.01, momentum=0.5 if name != "adam" else 0.0, max_grad_norm=0.5)
    holder = FlatNetwork(QNetwork(VECTOR, 2, config=QNetworkConfig(kernel="torch"), seed=0), config)
    twin = QNetwork(VECTOR, 2, config=QNetworkConfig(kernel="torch"), seed=0)
    optimizer = {
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-8),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.95, eps=1e-8, momentum=0.5, centered=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5),
    }[name](list(twin.parameters()))
    for _ in range(3):
        x = torch.randn(5, 4)
        holder.zero_grad()
        (3 * holder.network(x) ** 2).sum().backward()
        norm = holder.step()
        optimizer.zero_grad()
        (3 * twin(x) ** 2).sum().backward()
        assert norm == pytest.approx(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5).item(), rel=1e-5)
        optimizer.step()
    for mine, theirs in zip(holder.network.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 84, 84), (84, 84, 4)])
def test_frames_are_convolved_as_torch_does(shape):
    """Values and gradients of the Nature network against its formula in float64, channels first or last."""
    space = spaces.Box(0, 255, shape, np.uint8)
    network = QNetwork(space, 3, config=QNetworkConfig(convolutions="nature", hidden_sizes=[512]), seed=0)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, *shape), dtype=np.uint8))
    found = network(frames)
    slope = torch.randn_like(found)
    found.backward(slope)
    exact = [parameter.detach().double().requires_grad_() for parameter in network.parameters()]
    x = frames.double() / 255 if shape[0] == 4 else frames.double().permute(0, 3, 1, 2) / 255
    for index, stride in enumerate((4, 2, 1)):
        x = torch.nn.functional.conv2d(x, *exact[2 * index : 2 * index + 2], stride=stride).relu()
    hidden = torch.nn.functional.linear(x.flatten(1), *exact[6:8]).relu()
    expected = torch.nn.functional.linear(hidden, *exact[8:10])[..., None]
    expected.backward(slope.double())
    assert torch.allclose(found.double(), expected, atol=1e-5)
    for parameter, gradient in zip(network.parameters(), (leaf.grad for leaf in exact), strict=True):
        # A unit within rounding of 0 may be on one side only.
        assert (parameter.grad.double() - gradient).norm() < 1e-3 * gradient.norm()
