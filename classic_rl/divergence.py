"""Exact KL divergence and Fisher metric of the action distributions, state by state.

Sampled estimators (`rlhf.core.kl.kl_estimate`) see one action per state; a trust region holds the whole distribution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from classic_rl.distributions import Categorical, DiagonalGaussian, MultiCategorical
from classic_rl.state_dependent_exploration import StateDependentGaussian
from rlhf.core.kl import exact_categorical_kl
from rlhf.errors import ConfigError


class Described(NamedTuple):
    """A policy's distributions in some states, frozen."""

    outputs: Tensor
    """[N, K] outputs of the actor network; of a Gaussian, the means."""
    log_std: Tensor | None
    """Log standard deviations of a Gaussian: [K], or [N, K] where they depend on the state."""


def describe(distribution: nn.Module, outputs: Tensor) -> Described:
    """Keep what `kl_from` needs of the distributions with these network outputs [N, K], without gradients."""
    if not isinstance(distribution, DiagonalGaussian | StateDependentGaussian):
        return Described(outputs.detach(), None)
    means, log_std = _means_and_log_std(distribution, outputs)
    return Described(means.detach(), log_std.detach().clone())


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
        case DiagonalGaussian() | StateDependentGaussian():
            assert old.log_std is not None
            means, log_std = _means_and_log_std(distribution, outputs)
            variances = torch.exp(2 * (old.log_std - log_std))
            moved = (old.outputs - means).square() * torch.exp(-2 * log_std)
            return (log_std - old.log_std + 0.5 * (variances + moved - 1)).sum(-1)
    raise _no_closed_form(distribution)


def fisher_metric(distribution: nn.Module, outputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Return u -> M u, the Fisher information of the distribution about the network's outputs, in every state.

    M is the Hessian of KL(old || new) in the new outputs, at the old ones. Categorical logits: diag(p) - p p^T;
    Gaussian means: 1 / s^2, and nothing shared with the deviations (`deviation_fisher`).
    Source: Kakade 2001, "A natural policy gradient"; Schulman et al. 2015, appendix C.1.

    Args:
        distribution: Of the policy.
        outputs: [N, K] network outputs; what is returned maps [N, K] to [N, K]. With state-dependent exploration its
            features follow, as the actor returns them; they count as constants.

    Raises:
        ConfigError: A distribution whose metric has no closed form here.
    """
    match distribution:
        case Categorical():
            return _softmax_metric(outputs)
        case MultiCategorical(sizes=sizes):
            metrics = [_softmax_metric(part) for part in outputs.split(sizes, -1)]
            return lambda u: torch.cat([m(part) for m, part in zip(metrics, u.split(sizes, -1), strict=True)], -1)
        case DiagonalGaussian() | StateDependentGaussian():
            precision = torch.exp(-2 * _means_and_log_std(distribution, outputs)[1].detach())
            return lambda u: u * precision
    raise _no_closed_form(distribution)


def deviation_fisher(distribution: nn.Module, outputs: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Return v -> sum over states of F v, F the Fisher information about a Gaussian's learned log deviations.

    About log s it is 2 per component. State-dependent exploration has s^2 = sum_h z_h^2 std_h^2 (+ a constant), so that
    d log s / d log std_h = z_h^2 std_h^2 / s^2.

    Args:
        distribution: Of the policy.
        outputs: [N, ...] as the actor returns them.

    Returns:
        A map of the shape of `distribution.log_std` onto itself; None where nothing else than the network is learned.
    """
    match distribution:
        case DiagonalGaussian():
            return lambda v: 2 * len(outputs) * v
        case StateDependentGaussian(num_outputs=actions, log_std=log_std):
            variances = torch.exp(2 * log_std.detach())  # [H, A]
            weighed = outputs.detach()[:, actions:].square()[:, :, None] * variances  # [N, H, A]
            slopes = weighed / torch.exp(2 * _means_and_log_std(distribution, outputs)[1].detach())[:, None, :]
            return lambda v: 2 * torch.einsum("nha,na->ha", slopes, torch.einsum("nha,ha->na", slopes, v))
    return None


def _means_and_log_std(
    distribution: DiagonalGaussian | StateDependentGaussian, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """[N, K] and [K] or [N, K]."""
    if isinstance(distribution, DiagonalGaussian):
        return outputs, distribution.log_std
    return distribution.means_and_log_std(outputs)


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
