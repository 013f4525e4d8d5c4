"""The loss of every algorithm, as sums with separate denominators: PolicyOutput x Experience -> LossSums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from rlhf.core import surrogates
from rlhf.core.aggregation import aggregate, denominator
from rlhf.core.algorithm import (
    AlgorithmConfig,
    Clipped,
    ClippedValueLoss,
    ClippedWeight,
    DualClipped,
    GeometricMean,
    KlInLoss,
    PolicyGradient,
    ProbabilityMask,
    SoftGate,
    SquaredValueLoss,
    Unclipped,
)
from rlhf.core.corrections import off_policy_rows
from rlhf.core.kl import kl_estimate
from rlhf.core.masking import blank, masked_sum
from rlhf.core.ratios import importance_ratio
from rlhf.core.types import Experience, PolicyOutput, present
from rlhf.core.values import clipped_value_loss, squared_value_loss
from rlhf.errors import ConfigError, ModelError

SurrogateFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(ratio, log_probs, advantages), each [B, T] -> gain [B, T]; a researcher's own surrogate."""


class LossSums(NamedTuple):
    """What some rows contribute; sums of several microbatches add up."""

    policy: Tensor
    """Scalar numerator of the policy part: surrogate, KL in the loss, entropy bonus, imitation."""
    value: Tensor
    """Scalar numerator of the value part, coefficient included; 0 without a critic."""
    metrics: Tensor
    """[M] sums over actions, in the order of `Objective.metric_names`; detached."""


class Objective:
    """The loss of one algorithm.

    `loss = policy / denominators[0] + value / denominators[1]`, where the sums run over all microbatches and processes
    of one optimizer step and the denominators are those of the whole step. Dividing by a microbatch's own counts, or
    by the number of accumulation steps, would weigh tokens by how the batch happened to be split.

    Args:
        algorithm: The row of settings.
        surrogate: A callable that replaces the algorithm's surrogate.
    """

    def __init__(self, algorithm: AlgorithmConfig, *, surrogate: SurrogateFunction | None = None) -> None:
        """Check what can be checked before any data is seen."""
        denominator(torch.ones(1, 1, dtype=torch.bool), algorithm.aggregation)
        self.algorithm = algorithm
        self._custom_surrogate = surrogate
        names = ["policy_loss", "entropy", "ratio", "approx_kl", "kl_to_old", "clip_fraction"]
        if algorithm.needs_reference:
            names.append("kl_to_ref")
        if algorithm.needs_critic:
            names.append("value_loss")
        if algorithm.off_policy_threshold is not None:
            names.append("off_policy_dropped")
        if algorithm.imitation is not None:
            names.append("imitation_loss")
        self.metric_names: tuple[str, ...] = tuple(names)

    def denominators(self, action_mask: Tensor) -> Tensor:
        """[2]: what the policy part and the value part (and the metrics) of these rows are divided by.

        Args:
            action_mask: [B, T] of all rows of an optimizer step on this process; reduce the result over processes.
        """
        return torch.stack([denominator(action_mask, self.algorithm.aggregation), action_mask.sum().float()])

    def loss(self, sums: LossSums, denominators: Tensor) -> Tensor:
        """The scalar to differentiate, given the step's reduced denominators [2]."""
        # A step whose rows are all masked has nothing to learn from; 0 / 1 keeps it finite.
        policy, value = denominators.clamp(min=1).unbind()
        return sums.policy / policy + sums.value / value

    def __call__(
        self,
        output: PolicyOutput,
        experience: Experience,
        *,
        kl_coef: float = 0.0,
        clip_scale: float = 1.0,
        entropy_coef: float | None = None,
    ) -> LossSums:
        """Sums of the losses and metrics of these rows.

        Args:
            output: The policy's word on `experience.actions`.
            experience: Rows [B, T].
            kl_coef: Current coefficient of a KL term in the loss.
            clip_scale: Multiplies the clip ranges; schedules anneal it from 1 to 0.
            entropy_coef: Current coefficient of the entropy bonus; None takes the algorithm's constant.

        Returns:
            Sums; only `policy` and `value` carry gradients.

        Raises:
            ModelError: The output's shapes are not those of the actions.
            ConfigError: The algorithm trains a critic that the policy lacks.
        """
        _check_shapes(output, experience)
        if experience.on_policy:
            experience = replace(experience, old_log_probs=output.log_probs.detach())
        mask, old_log_probs = experience.counted, experience.old_log_probs
        experience = self._clip_advantages(experience)
        ratio_mask = mask if self.algorithm.ratio == "token" else experience.action_mask
        ratio = importance_ratio(output.log_probs, old_log_probs, ratio_mask, level=self.algorithm.ratio)
        gain = self._gain(ratio, output.log_probs, experience, clip_scale)
        if experience.weights is not None:
            gain = gain * experience.weights
        dropped = self._dropped(output.log_probs, experience)
        losses = -gain if dropped is None else torch.where(dropped, 0.0, -gain)
        if isinstance(self.algorithm.kl, KlInLoss) and kl_coef != 0.0:
            losses = losses + kl_coef * self._kl(output.log_probs, experience)
        entropy_coef = self.algorithm.entropy_coef if entropy_coef is None else entropy_coef
        if entropy_coef != 0.0:
            losses = losses - entropy_coef * output.entropy
        if self.algorithm.imitation is not None:
            losses = losses - present(experience.imitation) * output.log_probs
        value_losses = self._value_losses(output, experience, clip_scale)
        return LossSums(
            policy=aggregate(losses, mask, self.algorithm.aggregation),
            value=losses.new_zeros(()) if value_losses is None else self._value_sum(value_losses, mask),
            metrics=self._metrics(output, experience, ratio, losses, value_losses, dropped, clip_scale),
        )

    def _clip_advantages(self, experience: Experience) -> Experience:
        bound = self.algorithm.advantage_clip
        if bound is None:
            return experience
        return replace(experience, advantages=experience.advantages.clamp(-bound, bound))

    def _dropped(self, log_probs: Tensor, experience: Experience) -> Tensor | None:
        """[B, T] bool, True where a stale row is left out; None where none ever is."""
        threshold = self.algorithm.off_policy_threshold
        if threshold is None:
            return None
        behaviour = present(experience.behaviour_log_probs)
        stale = off_policy_rows(log_probs, behaviour, experience.action_mask, threshold=threshold)
        return stale & (experience.advantages < 0)

    def _gain(self, ratio: Tensor, log_probs: Tensor, experience: Experience, clip_scale: float) -> Tensor:
        """[B, T] of the surrogate."""
        advantages = experience.advantages
        if self._custom_surrogate is not None:
            return self._custom_surrogate(ratio, log_probs, advantages)
        match self.algorithm.surrogate:
            case PolicyGradient():
                return surrogates.policy_gradient(log_probs, advantages)
            case Unclipped():
                return surrogates.unclipped(ratio, advantages)
            case Clipped(clip_low=low, clip_high=high):
                return surrogates.clipped(ratio, advantages, clip_low=low * clip_scale, clip_high=high * clip_scale)
            case DualClipped(clip_low=low, clip_high=high, bound=bound):
                return surrogates.dual_clipped(
                    ratio, advantages, clip_low=low * clip_scale, clip_high=high * clip_scale, bound=bound
                )
            case ClippedWeight(clip_high=high):
                return surrogates.clipped_weight(ratio, log_probs, advantages, clip_high=high * clip_scale)
            case GeometricMean(clip_low=low, clip_high=high):
                low, high, mask = low * clip_scale, high * clip_scale, experience.action_mask
                return surrogates.geometric_mean(ratio, advantages, mask, clip_low=low, clip_high=high)
            case ProbabilityMask(limit=limit):
                old = experience.old_log_probs
                return surrogates.probability_masked(ratio, log_probs, old, advantages, limit=limit * clip_scale)
            case SoftGate(temperature_positive=positive, temperature_negative=negative):
                return surrogates.soft_gate(
                    ratio, advantages, temperature_positive=positive, temperature_negative=negative
                )
            case _:
                assert_never(self.algorithm.surrogate)

    def _kl(self, log_probs: Tensor, experience: Experience) -> Tensor:
        """[B, T] of the in-loss term: KL(policy || reference), or KL(old || policy)."""
        kl = self.algorithm.kl
        assert isinstance(kl, KlInLoss)
        # Log-probs of masked tokens may lie so far from 0 that exp overflows, and 0 * inf is NaN in the gradient.
        log_probs = blank(log_probs, experience.counted)
        if kl.against == "old_policy":
            # The actions were drawn from the old policy, so it takes the place of pi in the estimator.
            return kl_estimate(experience.old_log_probs, log_probs, estimator=kl.estimator)
        return kl_estimate(
            log_probs, present(experience.ref_log_probs), estimator=kl.estimator, old_log_probs=experience.old_log_probs
        )

    def _value_sum(self, value_losses: Tensor, mask: Tensor | None) -> Tensor:
        assert self.algorithm.value_loss is not None
        return self.algorithm.value_loss.coefficient * masked_sum(value_losses, mask)

    def _value_losses(self, output: PolicyOutput, experience: Experience, clip_scale: float) -> Tensor | None:
        if self.algorithm.value_loss is None:
            return None
        if output.values is None:
            raise ConfigError(
                "the algorithm trains a critic, but the policy predicts no values",
                where="algorithm.value_loss",
                remedy="Build the policy with a critic, or set value_loss to null.",
            )
        match self.algorithm.value_loss:
            case SquaredValueLoss():
                return squared_value_loss(output.values, present(experience.returns))
            case ClippedValueLoss(clip_range=clip_range):
                return clipped_value_loss(
                    output.values,
                    present(experience.returns),
                    old_values=present(experience.old_values),
                    clip_range=clip_range * clip_scale,
                )
            case _:
                assert_never(self.algorithm.value_loss)

    @torch.no_grad()
    def _metrics(
        self,
        output: PolicyOutput,
        experience: Experience,
        ratio: Tensor,
        losses: Tensor,
        value_losses: Tensor | None,
        dropped: Tensor | None,
        clip_scale: float,
    ) -> Tensor:
        """[M] sums over unmasked actions, in the order of `metric_names`."""
        log_ratio = output.log_probs - experience.old_log_probs
        columns = [
            losses,
            output.entropy,
            ratio,
            torch.expm1(log_ratio) - log_ratio,  # k3 of KL(old || policy)
            -log_ratio,  # k1 of the same
            self._is_clipped(ratio, output.log_probs, experience, clip_scale),
        ]
        if self.algorithm.needs_reference:
            columns.append(output.log_probs - present(experience.ref_log_probs))
        if value_losses is not None:
            columns.append(value_losses)
        if dropped is not None:
            columns.append(dropped.to(ratio.dtype))
        if self.algorithm.imitation is not None:
            columns.append(-present(experience.imitation) * output.log_probs)
        stacked = torch.stack(columns)
        kept = stacked if experience.complete else torch.where(experience.action_mask, stacked, 0.0)
        return kept.sum(dim=(1, 2))

    def _is_clipped(self, ratio: Tensor, log_probs: Tensor, experience: Experience, clip_scale: float) -> Tensor:
        """1 where clipping takes the gradient away (or, for CISPO, caps the weight), else 0."""
        advantages = experience.advantages
        match self.algorithm.surrogate:
            case Clipped(clip_low=low, clip_high=high) | DualClipped(clip_low=low, clip_high=high):
                too_high = (ratio > 1 + high * clip_scale) & (advantages > 0)
                too_low = (ratio < 1 - low * clip_scale) & (advantages < 0)
                silenced = too_high | too_low
                if isinstance(self.algorithm.surrogate, DualClipped):
                    silenced |= (ratio > self.algorithm.surrogate.bound) & (advantages < 0)
                return silenced.to(ratio.dtype)
            case ClippedWeight(clip_high=high):
                return (ratio > 1 + high * clip_scale).to(ratio.dtype)
            case GeometricMean(clip_low=low, clip_high=high):
                too_high = (ratio.log() > high * clip_scale) & (advantages > 0)
                return (too_high | ((ratio.log() < -low * clip_scale) & (advantages < 0))).to(ratio.dtype)
            case ProbabilityMask(limit=limit):
                moved = (log_probs.exp() - experience.old_log_probs.exp()) * advantages.sign()
                return (moved > limit * clip_scale).to(ratio.dtype)
            case _:
                return torch.zeros_like(ratio)


def _check_shapes(output: PolicyOutput, experience: Experience) -> None:
    """Refuse an output that would broadcast, such as values [B, T, 1]: it would train on every pair of steps."""
    expected = experience.action_mask.shape
    for name, tensor in output._asdict().items():
        if tensor is not None and tensor.shape != expected:
            raise ModelError(
                f"the policy's {name} do not fit the actions",
                where=f"PolicyOutput.{name}",
                got=tuple(tensor.shape),
                expected=f"{tuple(expected)}, one per action",
                remedy="Squeeze the last dimension of a value head; give one number per action.",
            )
