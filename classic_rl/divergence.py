"""Exact KL divergence and Fisher metric of the action distributions, state by state.

Sampled estimators (`rlhf.core.kl.kl_estimate`) see one action per state; a trust region holds the whole distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classic_rl.distributions import Categorical, DiagonalGaussian, MultiCategorical
from rlhf.core.kl import exact_categorical_kl
from rlhf.errors import ConfigError


class Described(NamedTuple):
    """A policy's distributions in some states, frozen."""

    outputs: Tensor
    """[N, K] outputs of the actor network."""
    log_std: Tensor | None
    """[K] free log standard deviations of a Gaussian."""


def describe(distribution: nn.Module, outputs: Tensor) -> Described:
    """Keep what `kl_from` needs of the distributions with these network outputs [N, K], without gradients."""
    log_std = distribution.log_std.detach().clone() if isinstance(distribution, DiagonalGaussian) else None
    return Described(outputs.detach(), log_std)


def kl_from(old: Described, distribution: nn.Module, outputs: Tensor) -> Tensor:
    """KL(old || new) in every state, summed over all actions: the constraint of TRPO, whose first argument is the old.

    Categorical: `sum_a p_old(a) log(p_old(a) / p_new(a))`, summed over independent choices. Gaussian, per component:
    `log(s_new / s_old) + (s_old^2 + (m_old - m_new)^2) / (2 s_new^2) - 1/2`.
    Source: Schulman et al. 2015, https://arxiv.org/abs/1502.05477, eq. 12 and appendix C.

    Args:
        old: From `describe`.
        distribution: The new policy's; gradients flow into its parameters.
        outputs: [N, K] the new policy's network outputs in the same states; gradients flow.

    Returns:
        [N] nats.

    Raises:
        ConfigError: A distribution whose KL has no closed form here.
    """
    match distribution:
        case Categorical():
            return exact_categorical_kl(torch.log_softmax(old.outputs, -1), torch.log_softmax(outputs, -1))
        case MultiCategorical(sizes=sizes):
            parts = zip(old.outputs.split(sizes, -1), outputs.split(sizes, -1), strict=True)
            kl = [exact_categorical_kl(torch.log_softmax(p, -1), torch.log_softmax(q, -1)) for p, q in parts]
            return torch.stack(kl).sum(0)
        case DiagonalGaussian(log_std=log_std):
            assert old.log_std is not None
            variances = torch.exp(2 * (old.log_std - log_std))
            moved = (old.outputs - outputs).square() * torch.exp(-2 * log_std)
            return (log_std - old.log_std + 0.5 * (variances + moved - 1)).sum(-1)
    raise _no_closed_form(distribution)


def fisher_metric(distribution: nn.Module, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return u -> M u, the Fisher information of the distribution about the network's outputs, in every state.

    M is the Hessian of KL(old || new) in the new outputs, at the old ones. Categorical logits: diag(p) - p p^T;
    Gaussian means: 1 / s^2. (Free log standard deviations have information 2 each, and none shared with the means.)
    Source: Kakade 2001, "A natural policy gradient"; Schulman et al. 2015, appendix C.1.

    Args:
        distribution: Of the policy.
        outputs: [N, K] network outputs; what is returned maps [N, K] to [N, K].

    Raises:
        ConfigError: A distribution whose metric has no closed form here.
    """
    match distribution:
        case Categorical():
            return _softmax_metric(outputs)
        case MultiCategorical(sizes=sizes):
            metrics = [_softmax_metric(part) for part in outputs.split(sizes, -1)]
            return lambda u: torch.cat([m(part) for m, part in zip(metrics, u.split(sizes, -1), strict=True)], -1)
        case DiagonalGaussian(log_std=log_std):
            precision = torch.exp(-2 * log_std.detach())
            return lambda u: u * precision
    raise _no_closed_form(distribution)


def _softmax_metric(logits: Tensor) -> Callable[[Tensor], Tensor]:
    p = torch.softmax(logits.detach(), -1)
    return lambda u: p * (u - (p * u).sum(-1, keepdim=True))


def _no_closed_form(distribution: nn.Module) -> ConfigError:
    return ConfigError(
        "trust regions need the exact KL between two policies, which this action distribution does not give",
        where="environment.id",
        got=type(distribution).__name__,
        expected="Discrete, MultiDiscrete or MultiBinary actions, or Box with free standard deviations",
        remedy="Use PPO (`rlhf run on_policy`), which samples the KL.",
    )
