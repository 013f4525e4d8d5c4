"""Noisy linear layers: exploration that is learnt."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class NoisyLinear(nn.Module):
    """y = (mu_w + sigma_w * eps_w) x + mu_b + sigma_b * eps_b with factorised noise eps_w = f(eps_out) f(eps_in)^T.

    f(x) = sign(x) sqrt|x|, eps_b = f(eps_out). mu starts uniform in +-1/sqrt(p), sigma at sigma_0 / sqrt(p), p inputs.
    Since eps_w is an outer product, sigma_w * eps_w never needs to be built:
    y = mu_w x + mu_b + f(eps_out) * (sigma_w (f(eps_in) * x) + sigma_b).
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

    def resample(self, generator: torch.Generator) -> None:
        """Draw new noise, which every forward uses until the next draw."""
        for noise in (self.noise_in, self.noise_out):
            drawn = torch.randn(len(noise), generator=generator)
            noise.copy_(drawn.sign() * drawn.abs().sqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        mean = nn.functional.linear(x, self.weight, self.bias)
        noise = nn.functional.linear(x * self.noise_in, self.weight_sigma, self.bias_sigma)
        return mean + self.noise_out * noise


def resample_noise(network: nn.Module, generator: torch.Generator) -> None:
    """Draw new noise for every noisy layer of a network."""
    for layer in network.modules():
        if isinstance(layer, NoisyLinear):
            layer.resample(generator)


def silence_noise(network: nn.Module) -> None:
    """Set the noise of every noisy layer to 0: the mean weights, which evaluation acts with."""
    for layer in network.modules():
        if isinstance(layer, NoisyLinear):
            layer.noise_in.zero_()
            layer.noise_out.zero_()
