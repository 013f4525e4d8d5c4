"""What a Q network's outputs mean, and the losses that train them, each with its gradient in closed form.

Outputs are [B, A, M]: M = 1 value, M logits over atoms (C51), or M quantiles (QR-DQN). The gradient with respect to the
outputs is a few vector operations, so the network's backward pass is all that autograd has to do.
"""

from __future__ import annotations

from typing import Annotated, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from rlhf.config import Config


class ScalarValues(Config):
    """One value per action: Q(s, a)."""

    type: Literal["scalar"] = "scalar"
    huber: float | None = Field(1.0, gt=0)
    """Errors beyond this count linearly (1 is Mnih et al.'s error clipping); null squares all."""


class CategoricalValues(Config):
    """A distribution over fixed atoms: C51 (Bellemare et al. 2017, https://arxiv.org/abs/1707.06887)."""

    type: Literal["categorical"] = "categorical"
    atoms: int = Field(51, ge=2)
    """How many, equally spaced."""
    low: float = -10.0
    """The least return."""
    high: float = 10.0
    """The greatest return."""

    @model_validator(mode="after")
    def _in_order(self) -> CategoricalValues:
        if self.low >= self.high:
            raise ValueError(f"low = {self.low} must be below high = {self.high}")
        return self


class QuantileValues(Config):
    """Quantiles of the return at fixed levels: QR-DQN (Dabney et al. 2018, https://arxiv.org/abs/1710.10044)."""

    type: Literal["quantile"] = "quantile"
    quantiles: int = Field(200, ge=1)
    """How many, at the levels (i + 1/2) / quantiles."""
    huber: float | None = Field(1.0, gt=0)
    """kappa of the quantile Huber loss; null is plain quantile regression."""


Values = Annotated[ScalarValues | CategoricalValues | QuantileValues, Field(discriminator="type")]


Array = TypeVar("Array", Tensor, np.ndarray)


class LossAndGradient(NamedTuple, Generic[Array]):
    """Of a batch."""

    losses: Array
    """[B], unweighted."""
    gradient: Array
    """[B, A, M], of mean_b w_b loss_b with respect to the outputs."""
    errors: Array
    """[B] >= 0, what prioritized replay takes as |delta|."""
    predictions: Array
    """[B], Q(s, a) of the taken actions."""


def outputs_per_action(values: Values) -> int:
    """Return M."""
    match values:
        case ScalarValues():
            return 1
        case CategoricalValues():
            return values.atoms
        case QuantileValues():
            return values.quantiles


def expected_values(outputs: Tensor, values: Values) -> Tensor:
    """Return Q(s, a) [B, A] of outputs [B, A, M]."""
    match values:
        case ScalarValues():
            return outputs.squeeze(-1)
        case CategoricalValues():
            return outputs.softmax(dim=-1) @ support_of(values, like=outputs)
        case QuantileValues():
            return outputs.mean(dim=-1)


def support_of(values: CategoricalValues, *, like: Tensor) -> Tensor:
    """Return the atoms z [M]."""
    return torch.linspace(values.low, values.high, values.atoms, dtype=like.dtype, device=like.device)


def project(probabilities: Tensor, atoms: Tensor, support: Tensor) -> Tensor:
    """Project a distribution on moved atoms onto the fixed support: C51's operator Phi.

    m_i = sum_j [1 - |clip(z'_j, z_1, z_M) - z_i| / dz]_0^1 p_j (equation 7): each atom's mass is shared by its two
    neighbours, in proportion to their nearness.

    >>> support = torch.tensor([0.5, 1.0, 1.5])
    >>> project(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([[0.0, 0.8, 0.0]]), support)
    tensor([[0.4000, 0.6000, 0.0000]])

    Args:
        probabilities: [B, M], mass of each moved atom.
        atoms: [B, M], z' = r + discount x z.
        support: [M], equally spaced.

    Returns:
        [B, M], rows sum to 1.
    """
    size = len(support)
    spacing = (support[-1] - support[0]) / (size - 1)
    place = ((atoms - support[0]) / spacing).clamp(0, size - 1)
    lower = place.floor().clamp(max=size - 2)
    above = place - lower  # share of the upper neighbour
    index = lower.long()
    projected = torch.zeros_like(probabilities).scatter_add_(1, index, probabilities * (1 - above))
    return projected.scatter_add_(1, index + 1, probabilities * above)


def scalar_loss(
    outputs: Array, actions: Array, targets: Array, *, weights: Array | None = None, huber: float | None = 1.0
) -> LossAndGradient[Array]:
    """L_b = 1/2 delta^2 with delta = Q(s, a) - target, linear beyond `huber`: h (|delta| - h / 2).

    The semi-gradient: targets are constants. Source: Mnih et al. 2015; the weight is prioritized replay's omega of
    1/2 omega (r + gamma max Q - Q)^2 (Schaul et al. 2016, https://arxiv.org/abs/1511.05952).

    >>> scalar_loss(torch.tensor([[[3.0], [0.0]]]), torch.tensor([0]), torch.tensor([1.0])).losses
    tensor([1.5000])

    Tensors, or NumPy arrays, which cost half as much on so few numbers.

    Args:
        outputs: [B, A, 1].
        actions: [B] int64.
        targets: [B].
        weights: [B]; None is 1.
        huber: Where the loss becomes linear; None nowhere.
    """
    batch, count, _ = outputs.shape
    if isinstance(outputs, Tensor):
        outputs, gradient = outputs.detach(), torch.zeros_like(outputs)
    else:
        gradient = np.zeros_like(outputs)
    places = _places(actions, count)
    predictions = outputs.reshape(-1)[places]
    delta = predictions - targets
    slope = delta if huber is None else delta.clip(-huber, huber)
    losses = slope * (delta - 0.5 * slope)  # both pieces: delta^2 / 2, and h |delta| - h^2 / 2
    gradient.reshape(-1)[places] = slope / batch if weights is None else slope * (weights / batch)
    return LossAndGradient(losses, gradient, abs(delta), predictions)  # type: ignore[return-value]


def categorical_loss(
    outputs: Tensor, actions: Tensor, target: Tensor, *, support: Tensor, weights: Tensor | None = None
) -> LossAndGradient:
    """Cross-entropy -sum_i m_i log p_i(s, a), gradient p - m; the error is KL(m || p), which Rainbow prioritizes by.

    Args:
        outputs: [B, A, M] logits.
        actions: [B] int64.
        target: [B, M], the projected distribution.
        support: [M], the atoms.
        weights: [B]; None is 1.
    """
    log_probabilities = taken(outputs, actions).log_softmax(dim=-1)
    probabilities = log_probabilities.exp()
    losses = -(target * log_probabilities).sum(dim=-1)
    gradient = _spread(outputs, actions, probabilities - target, weights)
    divergence = losses + torch.xlogy(target, target).sum(dim=-1)
    return LossAndGradient(losses, gradient, divergence.clamp(min=0), probabilities @ support)


def quantile_loss(
    outputs: Tensor,
    actions: Tensor,
    target: Tensor,
    *,
    levels: Tensor | None = None,
    weights: Tensor | None = None,
    huber: float | None = 1.0,
) -> LossAndGradient:
    """Quantile regression: sum_i mean_j |tau_i - 1{u < 0}| L(u) / kappa with u = target_j - theta_i.

    L is Huber's loss with threshold kappa (equation 10 of QR-DQN), or |u| without it. Its slope with respect to theta_i
    is -mean_j |tau_i - 1{u < 0}| clip(u, -kappa, kappa) / kappa.

    Pairs (i, j) are never formed: see `_quantile_sums`.

    Args:
        outputs: [B, A, M] quantiles theta.
        actions: [B] int64.
        target: [B, K] samples or quantiles of the target distribution.
        levels: tau, [M] or [B, M]; None is (i + 1/2) / M.
        weights: [B]; None is 1.
        huber: kappa; None is plain quantile regression.
    """
    quantiles = taken(outputs, actions)
    if levels is None:
        size = quantiles.shape[1]
        levels = (torch.arange(size, dtype=quantiles.dtype, device=quantiles.device) + 0.5) / size
    slope, cost = _quantile_sums(quantiles, target, levels.to(quantiles.dtype), huber=huber)
    losses = cost.sum(dim=-1) / target.shape[1]
    gradient = _spread(outputs, actions, -slope / target.shape[1], weights)
    predictions = quantiles.mean(dim=-1)
    errors = (target.mean(dim=-1) - predictions).abs()
    return LossAndGradient(losses, gradient, errors, predictions)


def _quantile_sums(quantiles: Tensor, target: Tensor, levels: Tensor, *, huber: float | None) -> tuple[Tensor, Tensor]:
    """Sums over j of |tau_i - 1{u < 0}| times clip(u) / kappa, and times L(u) / kappa, with u = target_j - theta_i.

    As functions of target_j both are polynomials between theta_i - kappa, theta_i, theta_i + kappa. So with the targets
    in order, their number and the sums of their powers up to each of the three bounds are enough: M log K + K log K
    steps a row in place of M K (`benchmarks/quantile_loss.py`: a twentieth of the time with 170 quantiles, more than
    twice with 10, where both are a small part of an update). In float64, where differences of these sums lose nothing
    that float32 would keep.

    Args:
        quantiles: theta, [B, M].
        target: [B, K].
        levels: tau, [M] or [B, M].
        huber: kappa; None is L(u) = |u|, whose slope is the sign.

    Returns:
        Slopes and costs, each [B, M] in the quantiles' precision.
    """
    theta, ordered = quantiles.double(), target.double().sort(dim=1).values
    powers = ordered.new_zeros(3, len(ordered), ordered.shape[1] + 1)  # of the first 0, 1, ..., K targets
    powers[0] = torch.arange(powers.shape[2], device=theta.device)
    torch.cumsum(ordered, dim=1, out=powers[1, :, 1:])
    torch.cumsum(ordered.square(), dim=1, out=powers[2, :, 1:])
    if huber is None:
        # The slope is the sign, 0 where u = 0.
        below, up_to = (torch.searchsorted(ordered, theta, right=right) for right in (False, True))
        below, up_to = (powers.gather(2, places.expand(3, -1, -1)) for places in (below, up_to))
        above = powers[:, :, -1:] - up_to
        negative_slope, positive_slope = -below[0], above[0]
        negative_cost, positive_cost = below[0] * theta - below[1], above[1] - above[0] * theta
    else:
        places = torch.searchsorted(ordered, torch.cat([theta - huber, theta, theta + huber], dim=1))
        far_below, below, near = powers.gather(2, places.expand(3, -1, -1)).chunk(3, dim=2)
        far_above, inside = powers[:, :, -1:] - near, torch.stack([below - far_below, near - below], dim=1)
        number, first, second = inside  # [2, B, M], below and above theta
        slopes = (first - number * theta) / huber
        costs = (second - (2 * first - number * theta) * theta) / (2 * huber)
        negative_slope, positive_slope = slopes[0] - far_below[0], slopes[1] + far_above[0]
        negative_cost = costs[0] + far_below[0] * (theta - huber / 2) - far_below[1]
        positive_cost = costs[1] + far_above[1] - far_above[0] * (theta + huber / 2)
    slope = (1 - levels) * negative_slope + levels * positive_slope
    cost = (1 - levels) * negative_cost + levels * positive_cost
    return slope.to(quantiles.dtype), cost.to(quantiles.dtype)


def taken(outputs: Tensor, actions: Tensor) -> Tensor:
    """Return the outputs [B, M] of the taken actions, without their graph."""
    batch, count, size = outputs.shape
    return outputs.detach().reshape(batch * count, size).index_select(0, _places(actions, count))


def _spread(outputs: Tensor, actions: Tensor, slope: Tensor, weights: Tensor | None) -> Tensor:
    """Put the slope [B, M] of the taken actions' loss, times weight / B, into zeros [B, A, M]."""
    batch, count, size = outputs.shape
    scale = slope / batch if weights is None else slope * (weights / batch)[:, None]
    gradient = torch.zeros(batch * count, size, dtype=outputs.dtype, device=outputs.device)
    return gradient.index_copy_(0, _places(actions, count), scale).view(batch, count, size)


def _places(actions: Array, count: int) -> Array:
    """Where each row's action stands when rows and actions are one axis: one index is faster than two."""
    end = len(actions) * count
    if isinstance(actions, Tensor):
        return torch.arange(0, end, count, device=actions.device).add_(actions)
    return np.arange(0, end, count) + actions
