"""Losses of the DQN family against published vectors, and their closed-form gradients against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from classic_rl.distributional import (
    CategoricalValues,
    QuantileValues,
    ScalarValues,
    categorical_loss,
    expected_values,
    project,
    quantile_loss,
    scalar_loss,
)
from classic_rl.dqn import target_of

ATOMS = CategoricalValues(atoms=3, low=0.5, high=1.5)
SUPPORT = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)

# trfl's CategoricalDistQLearningTest; the numbers were computed anew in float64 with plain NumPy.
LOGITS = torch.tensor(
    [
        [[1, 1, 1], [0, 9, 9], [0, 9, 0], [0, 0, 0]],
        [[9, 9, 0], [9, 0, 9], [0, 0, 0], [9, -9, 0]],
        [[1, 1, 1], [0, 9, 9], [0, 0, 0], [0, 9, 0]],
        [[9, 9, 0], [9, 0, 9], [0, 0, 0], [9, -9, 0]],
        [[9, 9, 0], [9, 0, 9], [0, 0, 0], [9, -9, 0]],
    ],
    dtype=torch.float64,
)
NEXT_LOGITS = torch.tensor(
    [
        [[1, 1, 1], [9, 0, 9], [1, 0, 0], [0, 0, 9]],
        [[9, 9, 0], [9, 0, 0], [1, 1, 1], [9, -9, 0]],
        [[1, 1, 1], [9, 0, 9], [0, 0, 9], [1, 0, 0]],
        [[9, 9, 0], [9, 0, 0], [1, 1, 1], [9, -9, 0]],
        [[9, 9, 0], [9, 0, 0], [0, 9, 9], [9, -9, 0]],
    ],
    dtype=torch.float64,
)
ACTIONS = torch.tensor([2, 1, 3, 0, 1])
REWARDS = torch.tensor([0.5, 0.0, 0.5, 0.8, -0.1], dtype=torch.float64)
DISCOUNTS = torch.tensor([0.8, 1.0, 0.8, 0.0, 1.0], dtype=torch.float64)
SELECTOR = torch.tensor([[1, 0, 0, 9], [9, 0, 1, 1], [1, 9, 1, 1], [0, 1, 0, 9], [1, 1, 1, 9]], dtype=torch.float64)


def c51(chooser):
    chosen = NEXT_LOGITS[torch.arange(5), chooser.argmax(dim=1)]
    target = target_of(ATOMS, chosen, rewards=REWARDS, discounts=DISCOUNTS)
    return target, categorical_loss(LOGITS, ACTIONS, target, support=SUPPORT)


def test_the_projected_target_is_trfls():
    target, _ = c51(expected_values(NEXT_LOGITS, ATOMS))
    expected = [
        [2.467587032869004e-05, 0.00014805522197214029, 0.9998272689076992],
        [1 / 3, 1 / 3, 1 / 3],
        [2.467587032869004e-05, 0.00014805522197214029, 0.9998272689076992],
        [0.4, 0.6, 0.0],
        [0.10005553098530497, 0.4999691494526084, 0.39997531956208654],
    ]
    assert target.tolist() == [pytest.approx(row, abs=1e-9) for row in expected]


def test_the_categorical_loss_is_rlaxs():
    _, loss = c51(expected_values(NEXT_LOGITS, ATOMS))
    expected = [8.998914292155476, 3.6932088835583192, 8.998914292155476, 0.6932088835583193, 5.192931228631795]
    assert loss.losses.tolist() == pytest.approx(expected, rel=1e-9)


def test_the_double_categorical_loss_is_rlaxs():
    _, loss = c51(SELECTOR)
    expected = [8.998914292155476, 5.192931228631796, 5.400246789153225, 0.6932088835583192, 0.6934311034340339]
    assert loss.losses.tolist() == pytest.approx(expected, rel=1e-9)


def test_projection_keeps_mass_everywhere_and_the_mean_inside_the_support():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(50, 51, generator=generator, dtype=torch.float64).softmax(dim=1)
    support = torch.linspace(-10, 10, 51, dtype=torch.float64)
    atoms = torch.rand(50, 51, generator=generator, dtype=torch.float64) * 18 - 9
    projected = project(probabilities, atoms, support)
    assert projected.sum(dim=1).tolist() == pytest.approx([1.0] * 50)
    assert (projected @ support).tolist() == pytest.approx((probabilities * atoms).sum(dim=1).tolist())
    # Atoms that fall onto the support's own lose nothing (the l == u trap), and those outside are put on its ends.
    assert torch.allclose(project(probabilities, support.expand(50, -1), support), probabilities, atol=1e-12)
    outside = project(probabilities, atoms + 100, support)
    assert outside[:, -1].tolist() == pytest.approx([1.0] * 50)


@pytest.mark.parametrize(("huber", "expected"), [(None, [2.0, 2.2]), (2.0, [2.5, 2.8333333333333335])])
def test_quantile_regression_is_rlaxs(huber, expected):
    """Rlax leaves Huber's loss undivided by kappa; QR-DQN's equation 10 divides: 2.5 / 2 and 2.8333 / 2."""
    quantiles = torch.tensor([[[-1.0, 3.0]], [[-1.0, 3.0]]])
    levels = torch.tensor([[0.2, 0.7], [0.0, 0.4]])
    targets = torch.tensor([[-3.0, 4.0, 2.0]]).expand(2, -1)
    loss = quantile_loss(quantiles, torch.zeros(2, dtype=torch.int64), targets, levels=levels, huber=huber)
    assert loss.losses.tolist() == pytest.approx([value / (huber or 1.0) for value in expected])


@pytest.mark.parametrize(("huber", "expected"), [(1.0, 0.25), (None, 0.5)])
def test_one_quantile_is_half_the_absolute_error(huber, expected):
    """M = 1: tau = 1/2. u = 1: Huber gives 1/2 x 1/2, plain regression 1/2 x 1."""
    loss = quantile_loss(torch.zeros(1, 1, 1), torch.tensor([0]), torch.ones(1, 1), huber=huber)
    assert loss.losses.item() == pytest.approx(expected)


def test_the_scalar_loss_by_hand():
    """Delta = -0.5, 3: half squares .125 and 4.5; Huber at 1: .125 and 1 x (3 - .5) = 2.5."""
    outputs = torch.tensor([[[0.5], [9.0]], [[9.0], [4.0]]])
    actions, targets = torch.tensor([0, 1]), torch.tensor([1.0, 1.0])
    assert scalar_loss(outputs, actions, targets).losses.tolist() == pytest.approx([0.125, 2.5])
    assert scalar_loss(outputs, actions, targets, huber=None).losses.tolist() == pytest.approx([0.125, 4.5])
    assert scalar_loss(outputs, actions, targets).errors.tolist() == pytest.approx([0.5, 3.0])
    assert scalar_loss(outputs, actions, targets).predictions.tolist() == [0.5, 4.0]


@pytest.mark.parametrize("huber", [1.0, None])
@pytest.mark.parametrize("weighted", [False, True])
def test_arrays_and_tensors_have_one_scalar_loss(huber, weighted):
    random = np.random.default_rng(0)
    outputs, targets, weights = (
        random.normal(size=shape, scale=2).astype(np.float32) for shape in ((16, 3, 1), 16, 16)
    )
    arrays = (outputs, random.integers(3, size=16), targets)
    found = scalar_loss(*arrays, weights=weights if weighted else None, huber=huber)
    tensors = [torch.from_numpy(array) for array in arrays]
    expected = scalar_loss(*tensors, weights=torch.from_numpy(weights) if weighted else None, huber=huber)
    for own, other in zip(found, expected, strict=True):
        assert own.dtype == np.float32
        np.testing.assert_allclose(own, other.numpy(), rtol=1e-6)


def plain(kind, huber):
    """The loss of one batch, written for autograd with torch's own functions."""

    def scalar(outputs, actions, target):
        chosen = outputs[torch.arange(len(actions)), actions, 0]
        if huber is None:
            return 0.5 * (chosen - target) ** 2
        return torch.nn.functional.huber_loss(chosen, target, delta=huber, reduction="none")

    def categorical(outputs, actions, target):
        chosen = outputs[torch.arange(len(actions)), actions]
        return torch.nn.functional.cross_entropy(chosen, target, reduction="none")

    def quantile(outputs, actions, target):
        theta = outputs[torch.arange(len(actions)), actions]
        difference = target[:, None, :] - theta[:, :, None]
        levels = (torch.arange(theta.shape[1], dtype=theta.dtype) + 0.5) / theta.shape[1]
        side = (levels[None, :, None] - (difference.detach() < 0).to(theta.dtype)).abs()
        if huber is None:
            return (side * difference.abs()).mean(dim=2).sum(dim=1)
        cost = torch.nn.functional.huber_loss(difference, torch.zeros_like(difference), delta=huber, reduction="none")
        return (side * cost / huber).mean(dim=2).sum(dim=1)

    return {"scalar": scalar, "categorical": categorical, "quantile": quantile}[kind]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("huber", [1.0, 0.3, None])
@pytest.mark.parametrize("kind", ["scalar", "categorical", "quantile"])
def test_closed_form_gradients_are_autograds(kind, huber, weighted):
    torch.manual_seed(0)
    size = 1 if kind == "scalar" else 7
    outputs = torch.randn(16, 3, size, dtype=torch.float64, requires_grad=True)
    actions = torch.randint(3, (16,))
    weights = torch.rand(16, dtype=torch.float64) if weighted else None
    if kind == "scalar":
        target = torch.randn(16, dtype=torch.float64)
        found = scalar_loss(outputs, actions, target, weights=weights, huber=huber)
    elif kind == "categorical":
        target = torch.randn(16, size, dtype=torch.float64).softmax(dim=1)
        found = categorical_loss(outputs, actions, target, support=torch.ones(7).double(), weights=weights)
    else:
        target = torch.randn(16, 5, dtype=torch.float64)
        found = quantile_loss(outputs, actions, target, weights=weights, huber=huber)
    losses = plain(kind, huber)(outputs, actions, target)
    (losses * (1.0 if weights is None else weights)).mean().backward()
    assert torch.allclose(found.losses, losses.detach())
    assert torch.allclose(found.gradient, outputs.grad, atol=1e-12)


@pytest.mark.parametrize("huber", [1.0, None])
def test_quantile_sums_keep_float32s_precision_far_from_zero(huber):
    """Returns of some hundreds and quantiles closer than kappa: differences of sums of squares must not show."""
    generator = torch.Generator().manual_seed(0)
    outputs = 400 + torch.randn(4, 2, 50, generator=generator, dtype=torch.float64)
    target = 400 + torch.randn(4, 50, generator=generator, dtype=torch.float64)
    target[:, :5] = outputs[:, 0, :5]  # u = 0
    outputs, target = outputs.float().double().requires_grad_(), target.float().double()
    actions = torch.tensor([0, 0, 1, 0])
    losses = plain("quantile", huber)(outputs, actions, target)
    losses.mean().backward()
    found = quantile_loss(outputs.float(), actions, target.float(), huber=huber)
    torch.testing.assert_close(found.losses.double(), losses.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.gradient.double(), outputs.grad, rtol=1e-5, atol=1e-8)


def test_the_categorical_error_is_the_divergence():
    """KL(m || p) is 0 where prediction and target agree, though their cross-entropy is not."""
    target = torch.tensor([[0.2, 0.3, 0.5]])
    loss = categorical_loss(target.log()[:, None], torch.tensor([0]), target, support=torch.arange(3.0))
    assert loss.errors.item() == pytest.approx(0.0, abs=1e-6)
    assert loss.losses.item() > 1.0
    assert loss.predictions.item() == pytest.approx(1.3)  # .3 + 2 x .5


def test_expected_values():
    assert expected_values(torch.tensor([[[1.5], [2.5]]]), ScalarValues()).tolist() == [[1.5, 2.5]]
    assert expected_values(torch.tensor([[[1.0, 3.0]]]), QuantileValues(quantiles=2)).tolist() == [[2.0]]
    # softmax(0, 0, ln 2) = 1/4, 1/4, 1/2 on .5, 1, 1.5.
    logits = torch.tensor([[[0.0, 0.0, 2.0]]]).log1p() * torch.tensor(2.0).log() / torch.tensor(3.0).log()
    assert expected_values(logits, ATOMS).item() == pytest.approx(1.125)


def test_targets():
    """R + discount x following, and discount 0 where the episode terminated."""
    rewards, discounts = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])
    following = torch.tensor([[4.0], [100.0]])
    assert target_of(ScalarValues(), following, rewards=rewards, discounts=discounts).tolist() == [3.0, 2.0]
    pair = torch.tensor([[4.0, 6.0], [1.0, 1.0]])
    found = target_of(QuantileValues(quantiles=2), pair, rewards=rewards, discounts=discounts)
    assert found.tolist() == [[3.0, 4.0], [2.0, 2.0]]


def test_an_empty_support_is_refused():
    with pytest.raises(ValueError, match="must be below"):
        CategoricalValues(low=1.0, high=1.0)
