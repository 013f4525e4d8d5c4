"""What to say when a loss or gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn

from rlhf.core.types import Experience
from rlhf.errors import TrainingError


def non_finite_error(
    *, where: str, policy_loss: float, value_loss: float, norm: float, policy: nn.Module, experience: Experience
) -> TrainingError:
    """Say which part of the loss, which input and which parameters are not finite.

    Args:
        where: Update, epoch and minibatch.
        policy_loss: The minibatch's policy part.
        value_loss: Its value part.
        norm: Norm of its gradient.
        policy: Before the step that is refused, gradients still there.
        experience: The rows of this process in the minibatch.
    """
    losses = {"policy loss": policy_loss, "value loss": value_loss}
    parts = [name for name, loss in losses.items() if not math.isfinite(loss)]
    what = f"the {' and the '.join(parts)} of this minibatch is not finite" if parts else "the gradient is not finite"
    causes = [
        _named("experience", _experience_tensors(experience)),
        _named("weights", policy.named_parameters()),
        _named("gradient", ((name, parameter.grad) for name, parameter in policy.named_parameters())),
    ]
    found = "; ".join(cause for cause in causes if cause) or f"gradient norm {norm}"
    return TrainingError(
        what,
        where=where,
        got=found,
        remedy="The step was not taken: the weights are those before it. Lower update.learning_rate or "
        "update.max_grad_norm, or look at what is named above.",
    )


def _experience_tensors(experience: Experience) -> Iterable[tuple[str, Tensor]]:
    """Every tensor that an unmasked action reads; what masked ones hold does not matter."""
    for item in fields(experience):
        value = getattr(experience, item.name)
        if isinstance(value, Tensor) and value.shape == experience.action_mask.shape:
            yield item.name, torch.where(experience.action_mask, value, torch.zeros_like(value))
        elif isinstance(value, Mapping):
            yield from ((f"inputs[{key!r}]", tensor) for key, tensor in value.items())


def _named(kind: str, tensors: Iterable[tuple[str, Tensor | None]]) -> str:
    """Name up to three tensors that are not finite."""
    bad = [name for name, tensor in tensors if tensor is not None and not bool(torch.isfinite(tensor).all())]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"not finite in the {kind}: {', '.join(bad[:3])}{more}" if bad else ""
