"""The endless order of prompts, shared by all processes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch


def mix_seed(*parts: object) -> int:
    """A seed in [0, 2^63) from any parts, so that streams of neighbouring seeds share nothing.

    >>> mix_seed("order", 0, 1) == mix_seed("order", 0, 1), mix_seed("order", 0, 1) == mix_seed("order", 1, 0)
    (True, False)
    """
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class PromptStream:
    """Indices of prompts: once through all in an order drawn by the seed, then in a new order, and so on.

    Every process steps through the same stream and takes its own contiguous share of each batch.

    Args:
        count: How many prompts there are, >= 1.
        batch: Prompts a step over all processes.
        process: Rank of this process.
        processes: How many there are; must divide `batch`.
        seed: Of the orders.
    """

    def __init__(self, count: int, *, batch: int, process: int = 0, processes: int = 1, seed: int = 0) -> None:
        """Stand before the first prompt."""
        assert count >= 1
        assert batch % processes == 0
        self._count, self._batch, self._seed = count, batch, seed
        self._share, self._first = batch // processes, process * (batch // processes)
        self._drawn = 0
        self._orders: dict[int, list[int]] = {}

    def take(self) -> list[int]:
        """This process's share of the next batch."""
        numbers = range(self._drawn + self._first, self._drawn + self._first + self._share)
        self._drawn += self._batch
        passes = [divmod(number, self._count) for number in numbers]
        self._orders = {epoch: self._orders.get(epoch) or self._draw_order(epoch) for epoch in {e for e, _ in passes}}
        return [self._orders[epoch][place] for epoch, place in passes]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands; equal on all processes."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._drawn = int(state["drawn"])

    def _draw_order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed("order", self._seed, epoch))
        return torch.randperm(self._count, generator=generator).tolist()
