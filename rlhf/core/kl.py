"""Estimators of the KL divergence from samples, and coefficients that steer it.

In all estimators `d = log pi(a) - log ref(a)` for actions drawn from pi; their mean estimates KL(pi || ref).
"""

from __future__ import annotations

import math
from typing import Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.core.algorithm import AdaptiveKl, DualKl, FixedKl, Kl, NoKl, ProportionalKl
from rlhf.core.ratios import MAX_LOG_RATIO
from rlhf.errors import ConfigError, TrainingError

KlEstimator = Literal["k1", "k2", "k3", "k3_straight_through", "k3_weighted"]


def kl_estimate(
    log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"],
    *,
    estimator: KlEstimator,
    old_log_probs: Float[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B T"]:
    """Estimate KL(pi || ref) at each action.

    As a *value*: k1 = d is unbiased and may be negative; k2 = d^2 / 2 is biased; k3 = exp(-d) - 1 + d is unbiased and
    never negative. As a *loss* (what its gradient does to pi, on-policy): k1's expected gradient is 0; k2's is that
    of KL(pi || ref); k3's is that of KL(ref || pi). k3_straight_through has k3's value and k2's gradient; k3_weighted
    multiplies k3 by pi / pi_old, whose gradient makes it that of KL(pi || ref), off-policy too.
    Source: Schulman, http://joschu.net/blog/kl-approx.html; gradients: https://arxiv.org/abs/2506.09477;
    k3_weighted: DeepSeek-AI 2025, https://arxiv.org/abs/2512.02556.

    Args:
        log_probs: log pi of the actions; gradients flow through it.
        ref_log_probs: log ref of the same actions.
        estimator: See above.
        old_log_probs: log-probs under the policy that drew the actions; only k3_weighted reads it, and takes the
            detached `log_probs` where it is None.

    Returns:
        [B, T] nats. Nothing is clamped: a large drift keeps its gradient.

    >>> d = torch.tensor([[0.5]]).log()
    >>> kl_estimate(d, torch.zeros(1, 1), estimator="k1"), kl_estimate(d, torch.zeros(1, 1), estimator="k3")
    (tensor([[-0.6931]]), tensor([[0.3069]]))
    """
    d = log_probs - ref_log_probs
    match estimator:
        case "k1":
            return d
        case "k2":
            return 0.5 * d**2
        case "k3":
            return torch.expm1(-d) + d
        case "k3_straight_through":
            k2 = 0.5 * d**2
            return k2 + (torch.expm1(-d) + d - k2).detach()
        case "k3_weighted":
            drawn = log_probs.detach() if old_log_probs is None else old_log_probs
            weight = (log_probs - drawn).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
            return weight * (torch.expm1(-d) + d)
        case _:
            assert_never(estimator)


def exact_categorical_kl(log_p: Float[Tensor, "*batch A"], log_q: Float[Tensor, "*batch A"]) -> Float[Tensor, "*batch"]:
    """KL(p || q) of categorical distributions, summed over all outcomes instead of estimated from one.

    Args:
        log_p: Normalised log-probabilities over A outcomes; -inf is an impossible outcome.
        log_q: The same for q.

    Returns:
        Nats, without the last dimension.

    >>> exact_categorical_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log())
    tensor(0.1438)
    """
    # The difference is replaced before it is multiplied: 0 * (-inf) would be NaN in the gradient.
    return (log_p.exp() * torch.where(log_p > -torch.inf, log_p - log_q, 0.0)).sum(-1)


class KlCoefficient:
    """The multiplier of the KL term, updated once per policy update.

    Attributes:
        value: The current coefficient.
        unit: Whether `update` wants the mean KL per action ("token") or per row ("sequence"), nats.
    """

    def __init__(self, config: FixedKl | AdaptiveKl | ProportionalKl | DualKl) -> None:
        """Start at the config's initial value."""
        self._config = config
        self.value = config.value if isinstance(config, FixedKl) else config.initial
        self.unit: Literal["token", "sequence"] = "token" if isinstance(config, FixedKl) else config.unit

    def update(self, kl: float, *, episodes: int) -> None:
        """Move the coefficient towards its target.

        Args:
            kl: Measured mean KL in `unit`.
            episodes: Rows seen since the last update; only the proportional rule reads it.

        Raises:
            TrainingError: `kl` is not finite.
            ConfigError: The proportional rule sees so many episodes at once that it could turn negative.

        >>> coefficient = KlCoefficient(AdaptiveKl(initial=1.0, target=0.01))
        >>> coefficient.update(0.02, episodes=1); coefficient.value
        2.0
        """
        if not isinstance(self._config, FixedKl) and not math.isfinite(kl):
            raise TrainingError("the measured KL is not finite", where="kl coefficient", got=kl)
        match self._config:
            case FixedKl():
                pass
            case AdaptiveKl(target=target):
                if kl < target / 1.5:
                    self.value /= 2
                elif kl > target * 1.5:
                    self.value *= 2
            case ProportionalKl(target=target, horizon=horizon):
                if 0.2 * episodes >= horizon:
                    raise ConfigError(
                        "the KL coefficient could become negative, which would reward drifting away",
                        where="algorithm.kl.coefficient.horizon",
                        got=horizon,
                        expected=f"much more than the {episodes} episodes between two updates",
                        remedy="Raise horizon, or collect fewer rows per iteration.",
                    )
                error = min(max(kl / target - 1, -0.2), 0.2)
                self.value *= 1 + error * episodes / horizon
            case DualKl(target=target, learning_rate=learning_rate):
                self.value = max(0.0, self.value + learning_rate * (kl - target))
            case _:
                assert_never(self._config)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.value = state["value"]


def make_kl_coefficient(kl: Kl) -> KlCoefficient:
    """The coefficient of a KL axis; constantly 0 where there is no KL term."""
    return KlCoefficient(FixedKl(value=0.0) if isinstance(kl, NoKl) else kl.coefficient)
