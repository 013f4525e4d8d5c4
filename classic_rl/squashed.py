"""The tanh-squashed Gaussian: a normal draw bent into (-1, 1), with the log-probability of the bent draw.

Squashing is not truncation: a truncated normal renormalizes what lies inside the bounds, tanh moves everything inside
and pays with the Jacobian's determinant, so probability piles up near the bounds.
Source: Haarnoja et al. 2018, https://arxiv.org/abs/1801.01290, appendix C.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from classic_rl.continuous_networks import ContinuousNetworkConfig
from classic_rl.distributions import HALF_LOG_TWO_PI

LOG_STD_MIN, LOG_STD_MAX = -20.0, 2.0
"""Bounds of the network's log standard deviations, as in Haarnoja's code, Spinning Up and Stable-Baselines3."""


def log_tanh_slope(u: Tensor) -> Tensor:
    """Return log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2 u)), exact also where tanh(u) rounds to 1.

    >>> round(log_tanh_slope(torch.tensor(0.0)).item(), 6)  # tanh'(0) = 1
    0.0
    >>> round(log_tanh_slope(torch.tensor(30.0)).item(), 4)  # 2 log 2 - 60; 1 - tanh(30)^2 itself would round to 0
    -58.6137
    """
    return 2.0 * (math.log(2.0) - u - functional.softplus(-2.0 * u))


def squash(mean: Tensor, log_std: Tensor, *, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw a = tanh(u), u = mean + exp(log_std) x noise; gradients flow into mean and log_std (reparameterization).

    log pi(a) = sum over components of log N(u; mean, std) - log(1 - tanh(u)^2).

    Args:
        mean: [..., A].
        log_std: [..., A].
        noise: [..., A] standard normals.

    Returns:
        Actions [..., A] in (-1, 1), and their log-probabilities [...].
    """
    u = torch.addcmul(mean, log_std.exp(), noise)
    # (u - mean) / std is the noise itself, so log N needs no division.
    normal = -0.5 * noise.square() - log_std - HALF_LOG_TWO_PI
    return torch.tanh(u), (normal - log_tanh_slope(u)).sum(dim=-1)


def squashed_log_prob(u: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log pi(tanh(u)) for given u, [..., A] to [...]; for draws that are not mean + std x independent noise."""
    normal = -0.5 * ((u - mean) / std).square() - std.log() - HALF_LOG_TWO_PI
    return (normal - log_tanh_slope(u)).sum(dim=-1)


class GaussianActor(nn.Module):
    """a = tanh(mean(s) + std(s) x noise), the means and log standard deviations from one network.

    Args:
        observations: Length of an observation.
        actions: A, length of an action.
        network: Shape of the hidden layers.
        seed: Of the initial weights.
    """

    def __init__(self, observations: int, actions: int, *, network: ContinuousNetworkConfig, seed: int) -> None:
        super().__init__()
        self.num_actions = actions
        self.trunk = network.make(observations, 2 * actions, seed=seed)

    def forward(self, observations: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Draw actions [B, A] at observations [B, D] with standard normals [B, A], and score them [B]."""
        mean, log_std = self.trunk(observations)[0].split(self.num_actions, dim=-1)
        return squash(mean, log_std.clamp(LOG_STD_MIN, LOG_STD_MAX), noise=noise)

    def greedy(self, outputs: np.ndarray) -> np.ndarray:
        """Tanh of the mean."""
        return np.tanh(outputs[:, : self.num_actions])

    def draw(self, outputs: np.ndarray, features: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw actions [N, A] of the trunk's outputs [N, 2 A]."""
        mean, log_std = outputs[:, : self.num_actions], outputs[:, self.num_actions :]
        noise = generator.standard_normal(mean.shape, dtype=np.float32)
        return np.tanh(mean + np.exp(np.clip(log_std, LOG_STD_MIN, LOG_STD_MAX)) * noise)
