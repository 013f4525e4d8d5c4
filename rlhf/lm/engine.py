"""What a generator asks of an engine with weights of its own, in this process or on a server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """One completion as an engine gives it."""

    token_ids: list[int]
    """Through the end token, or to the limit."""
    log_probs: list[float]
    """Of each token, under the distribution it was drawn from."""


class Engine(Protocol):
    """vLLM in this process, or on a server."""

    def complete(
        self, prompts: Sequence[list[int]], *, count: int, settings: dict[str, Any], seeds: list[int] | None
    ) -> list[Answer]:
        """Answer each prompt `count` times.

        Args:
            prompts: Token ids.
            count: Answers per prompt.
            settings: Fields of vLLM's `SamplingParams` but `n` and `seed`.
            seeds: One per prompt; None draws from the engine's own stream.

        Returns:
            Prompt 0's answers, prompt 1's, ...
        """
        ...

    def load(self, weights: Callable[[], Iterator[tuple[str, Tensor]]]) -> None:
        """Take over weights by their names in a checkpoint; all processes call it alike.

        Args:
            weights: Walks through them from the start.
        """
        ...
