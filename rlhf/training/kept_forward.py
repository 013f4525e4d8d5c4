"""The forward over a rollout, kept with its graph: the first epoch takes its results over instead of making its own.

Valid for one minibatch: its microbatches meet the weights that the forward met. They leave the gradients of their
losses at leaves in the place of its results, and its backward is made once, after the last of them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlhf.core.types import Experience
from rlhf.errors import ConfigError

FIELDS = ("live_log_probs", "live_entropy", "live_values")
"""Of an experience, those that may be results of a kept forward."""


def take_over(rows: Experience, *, minibatches: int) -> tuple[Experience, dict[str, Tensor]]:
    """Put leaves in the place of what a kept forward gave; returns the rows, and what stood there by its name.

    Raises:
        ConfigError: There is such a forward and more than one minibatch.
    """
    live = {name: kept for name in FIELDS if (kept := getattr(rows, name)) is not None}
    if not live:
        return rows, live
    if minibatches > 1:
        raise ConfigError(
            "the rollout's forward was kept, and all minibatches but the first meet weights that have moved",
            where="algorithm.minibatches",
            got=minibatches,
            expected="1",
            remedy="Set collector.keep_forward to false.",
        )
    return replace(rows, **{name: kept.detach().requires_grad_() for name, kept in live.items()}), live


def let_go(experience: Experience) -> Experience:
    """Return the rows without what a kept forward gave, for the epochs after the first."""
    return replace(experience, **dict.fromkeys(FIELDS))


def pass_on(live: dict[str, Tensor], leaves: Experience) -> None:
    """Make the backward of a kept forward, with the gradients that microbatches left at its leaves."""
    slopes = {name: getattr(leaves, name).grad for name in live}
    reached = [name for name, slope in slopes.items() if slope is not None]
    if reached:
        torch.autograd.backward([live[name] for name in reached], [slopes[name] for name in reached])
