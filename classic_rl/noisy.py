"""Noisy linear layers: exploration that is learnt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf.training.linear import linear

ROWS_TO_BUILD = 8
"""Rows from which building the noisy weight once costs less than a second product."""


class NoisyLinear(nn.Module):
    """y = (mu_w + sigma_w * eps_w) x + mu_b + sigma_b * eps_b with factorised noise eps_w = f(eps_out) f(eps_in)^T.

    f(x) = sign(x) sqrt|x|, eps_b = f(eps_out). mu starts uniform in +-1/sqrt(p), sigma at sigma_0 / sqrt(p), p inputs.
    Since eps_w is an outer product, sigma_w * eps_w need not be built:
    y = mu_w x + mu_b + f(eps_out) * (sigma_w (f(eps_in) * x) + sigma_b), which serves the few rows of acting.
    Source: Fortunato et al. 2018, equations 9 to 11 and section 3.2, https://arxiv.org/abs/1706.10295.

    Args:
        inputs: p.
        outputs: q.
        initial_sigma: sigma_0.
    """

    def __init__(self, inputs: int, outputs: int, *, initial_sigma: float = 0.5) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), initial_sigma * bound))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), initial_sigma * bound))
        self.register_buffer("noise_in", torch.zeros(inputs))
        self.register_buffer("noise_out", torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        if x.numel() >= ROWS_TO_BUILD * x.shape[-1]:
            weight = torch.addcmul(self.weight, self.weight_sigma, torch.outer(self.noise_out, self.noise_in))
            return linear(x, weight, torch.addcmul(self.bias, self.bias_sigma, self.noise_out))
        mean = nn.functional.linear(x, self.weight, self.bias)
        noise = nn.functional.linear(x * self.noise_in, self.weight_sigma, self.bias_sigma)
        return mean + self.noise_out * noise


def resample_noise(layers: Sequence[NoisyLinear], generator: torch.Generator) -> None:
    """Draw new noise for every layer, which its forward passes use until the next draw."""
    noises = [noise for layer in layers for noise in (layer.noise_in, layer.noise_out)]
    sizes = [len(noise) for noise in noises]
    drawn = torch.randn(sum(sizes), generator=generator)
    scaled = drawn.abs().sqrt_().copysign_(drawn)
    for noise, part in zip(noises, scaled.split(sizes), strict=True):
        noise.copy_(part)


def silence_noise(layers: Sequence[NoisyLinear]) -> None:
    """Set the noise of every layer to 0: the mean weights, which evaluation acts with."""
    for layer in layers:
        layer.noise_in.zero_()
        layer.noise_out.zero_()
