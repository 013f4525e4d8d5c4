"""A moving average of the policy's weights: steadier than the last ones, and saved as a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from rlhf.config import Config
from rlhf.core.types import Experience, Rollout
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.training.preparation import load_policy_state, policy_state


class EmaConfig(Config):
    """Exponential moving average of the policy's trained weights, in their precision."""

    decay: float = Field(0.992, gt=0, lt=1)
    """average <- decay x average + (1 - decay) x weights, after every iteration. 0.992 is InstructGPT's
    (https://arxiv.org/abs/2203.02155, appendix C.4): a memory of about 125 iterations."""
    evaluate: bool = False
    """Evaluate the averaged policy too: its metrics begin with `ema_`."""


class PolicyAverage:
    """The average, updated after every iteration; an `Observer` of the loop.

    Args:
        policy: Its language model is averaged, the critic is not.
        config: The decay.
    """

    replicated = True
    """A checkpoint needs the state of one process only."""

    def __init__(self, policy: LanguageModelPolicy, config: EmaConfig) -> None:
        """Start at the weights as they are now."""
        self._policy, self._decay = policy, config.decay
        critic = policy.critic_parameters()
        self._weights = {
            name: parameter
            for name, parameter in policy.named_parameters()
            if parameter.requires_grad and name not in critic
        }
        self._average = {name: parameter.detach().clone() for name, parameter in self._weights.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights."""
        for name, parameter in self._weights.items():
            self._average[name].lerp_(parameter.detach(), 1.0 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the policy have the averaged weights inside, and its own again afterwards."""
        own = {name: parameter.detach().clone() for name, parameter in self._weights.items()}
        self._put(self._average)
        try:
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, parameter in self._weights.items():
            parameter.copy_(weights[name])

    def save(self, folder: str | Path, *, tokenizer: Any) -> None:
        """Write the averaged policy as an ordinary model folder."""
        with self.in_place():
            self._policy.save(folder, tokenizer=tokenizer)

    def before_update(self, iteration: int, rollout: Rollout, experience: Experience) -> str | None:
        """Nothing to look at."""
        return None

    def after_update(self, iteration: int, metrics: dict[str, float]) -> dict[str, float]:
        """Take the iteration's weights in."""
        self.update()
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights by name, whole where parameters are sharded."""
        with self.in_place():
            learned = policy_state(self._policy)["learned"]
        return {"average": {name: learned[name] for name in self._average}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        with self.in_place():
            current = policy_state(self._policy)
            load_policy_state(self._policy, {**current, "learned": {**current["learned"], **state["average"]}})
            self._average = {name: parameter.detach().clone() for name, parameter in self._weights.items()}


def evaluate_both(evaluate: Callable[[], dict[str, float]], average: PolicyAverage) -> Callable[[], dict[str, float]]:
    """An evaluation of the policy and, with `ema_` before its metrics, of the average."""

    def both() -> dict[str, float]:
        metrics = evaluate()
        with average.in_place():
            return metrics | {f"ema_{name}": value for name, value in evaluate().items()}

    return both
