"""A key-value cache that is written in place, repeated once per group, and gives up finished rows.

transformers' `DynamicCache` concatenates: each step copies the whole cache of each layer. Here storage is
allocated ahead, a step writes one column, and attention reads a view.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

INITIAL_COLUMNS = 64
"""Columns allocated beyond the prompt at first; storage then doubles, so that short answers need no long storage."""


class InPlaceLayer(CacheLayerMixin):
    """Keys and values of one attention layer in storage [rows, heads, columns, head_dim].

    Args:
        capacity: Columns that will ever be needed: prompt plus longest completion.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.rows = 0
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the prompt; keys and values may differ in width (multi-head latent attention)."""
        self.rows = key_states.shape[0]
        columns = key_states.shape[2]
        self.keys = key_states.new_empty(*key_states.shape[:2], columns, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], columns, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        """Write new columns and return views of all columns so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, end = self.length, self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self._reallocate(torch.arange(self.rows, device=self.keys.device), end)
        self.length = end
        keys, values = self.keys[: self.rows], self.values[: self.rows]
        keys[:, :, start:end] = key_states
        values[:, :, start:end] = value_states
        return keys[:, :, :end], values[:, :, :end]

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, consecutively: one prefill serves a whole group."""
        rows = torch.arange(self.rows, device=self.keys.device).repeat_interleave(times)
        self._reallocate(rows, self.length + 1)

    def move_rows(self, sources: Tensor, destinations: Tensor, rows: int) -> None:
        """Copy rows `sources` over rows `destinations`, then keep the first `rows`."""
        for storage in (self.keys, self.values):
            storage[destinations, :, : self.length] = storage[sources, :, : self.length]
        self.rows = rows

    def _reallocate(self, rows: Tensor, needed: int) -> None:
        """Move `rows` into new storage of at least `needed` columns, with room to grow."""
        columns = min(max(needed, self.length + max(INITIAL_COLUMNS, self.length)), max(self.capacity, needed))
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(len(rows), old.shape[1], columns, old.shape[3])
            new[:, :, : self.length] = old[rows, :, : self.length]
            setattr(self, name, new)
        self.rows = len(rows)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns a mask must cover, offset of the first)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Columns written."""
        return self.length

    def get_max_length(self) -> int:
        """No fixed maximum: storage grows."""
        return -1


class InPlaceCache(Cache):
    """One `InPlaceLayer` per attention layer.

    Args:
        num_layers: Layers of the model that keep keys and values.
        capacity: Columns that will ever be needed.
    """

    def __init__(self, num_layers: int, *, capacity: int) -> None:
        super().__init__(layers=[InPlaceLayer(capacity) for _ in range(num_layers)])

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, consecutively."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.repeat(times)

    def move_rows(self, sources: Tensor, destinations: Tensor, rows: int) -> None:
        """Fill the places of finished rows with the last rows, then keep the first `rows`."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.move_rows(sources, destinations, rows)
