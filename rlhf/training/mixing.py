"""A second loss that is mixed into every optimizer step: imitation of given texts beside reinforcement learning."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor


class MixedBatch(NamedTuple):
    """Rows whose actions are to be imitated; its loss is -weight x the sum of their log-probs."""

    inputs: dict[str, Tensor]
    """As the policy takes them, each [B, ...]."""
    actions: Tensor
    """[B, T]."""
    action_mask: Tensor
    """[B, T] bool, True on actions that count."""
    weight: float
    """Coefficient / actions of the whole minibatch, over all processes."""


class MixedLoss(Protocol):
    """Where the rows come from."""

    def minibatch(self) -> list[MixedBatch]:
        """Return the parts of the next minibatch, as many on every process, at least one."""
        ...

    def record(self, loss: Tensor) -> None:
        """Take note of one part's loss, detached."""
        ...

    def metrics(self) -> dict[str, float]:
        """Return what was recorded since the last call, reduced over processes."""
        ...
