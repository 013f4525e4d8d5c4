"""Learning rate and clip range as functions of the run's progress."""

from __future__ import annotations

import math
from typing import assert_never

from rlhf.training.update_config import UpdateConfig


def learning_rate(update: UpdateConfig, *, progress: float, progress_step: float = 0.0) -> float:
    """Return the learning rate of one update.

    It rises linearly from 0 over `warmup_fraction`, then stays, falls linearly, or follows half a cosine to 0.

    Args:
        update: The settings.
        progress: Share of the run that is done, in [0, 1].
        progress_step: Share that this update is. Warm-up looks to the update's end, so that the first one
            learns something.

    >>> learning_rate(UpdateConfig(learning_rate=1.0, learning_rate_schedule="linear"), progress=0.25)
    0.75
    """
    warmup = update.warmup_fraction
    if progress < warmup:
        return update.learning_rate * min(1.0, (progress + progress_step) / warmup)
    done = min(1.0, (progress - warmup) / (1.0 - warmup))
    match update.learning_rate_schedule:
        case "constant":
            return update.learning_rate
        case "linear":
            return update.learning_rate * (1.0 - done)
        case "cosine":
            return update.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            assert_never(update.learning_rate_schedule)


def clip_scale(update: UpdateConfig, *, progress: float) -> float:
    """Return what the clip ranges are multiplied by.

    >>> clip_scale(UpdateConfig(clip_schedule="linear"), progress=0.25)
    0.75
    """
    match update.clip_schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - progress
        case _:
            assert_never(update.clip_schedule)
