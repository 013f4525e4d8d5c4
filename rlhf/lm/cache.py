"""A key-value cache that is written in place, keeps each prompt once, and gives up finished rows.

transformers' `DynamicCache` concatenates: each step copies the whole cache of each layer. Here storage is
allocated ahead, a step writes one column, and attention reads a view.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from rlhf.lm.shared_prompt import PromptGroups

INITIAL_COLUMNS = 256
"""Columns allocated at first; storage then doubles, so that short answers need no long storage."""
ACROSS_COLUMNS = 64
"""Keys that lie across are read with all columns of their storage, which therefore grows in steps of this many."""
ACROSS_EXTRA = 16
"""Columns beyond such a step, 64 bytes: a new column is one number in every line, and lines whose distance is a high
power of two share few places of the processor's cache; an odd multiple of 64 bytes spreads them."""


class InPlaceLayer(CacheLayerMixin):
    """Keys and values of one attention layer in storage [rows, heads, columns, head_dim].

    The first update stores the prompts. `start_decoding` then makes room for completions, with the prompt repeated
    into each row's storage or kept apart, once per group, in `prompt_keys` and `prompt_values`.

    Args:
        capacity: Columns that will ever be needed: prompt plus longest completion.
        zeroed: Fill storage with zeros: who reads columns that are yet to be written, with weight 0, needs numbers.
    """

    is_sliding = False

    def __init__(self, capacity: int, *, zeroed: bool = False) -> None:
        super().__init__()
        self.capacity, self.zeroed = capacity, zeroed
        self.rows = 0
        self.length = 0
        self.offset = 0  # columns that are not in `keys` because the prompts are kept apart
        self.pair: Tensor | None = None  # [2, rows, heads, columns, head_dim]: keys and values where they are alike
        self.keys_across = False
        self.prompt_keys: Tensor | None = None
        self.prompt_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the prompts as they come; keys and values may differ in width (multi-head latent attention)."""
        self.keys, self.values = key_states, value_states
        self.rows, self.length = key_states.shape[0], key_states.shape[2]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        """Write new columns and return views of all columns in storage."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        start = self.length - self.offset
        end = start + key_states.shape[2]
        self._make_room(end)
        keys, values = self.keys[: self.rows, :, :end], self.values[: self.rows, :, :end]
        keys[:, :, start:] = key_states
        values[:, :, start:] = value_states
        self.length += key_states.shape[2]
        return keys, values

    def append(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """As `update` after `start_decoding`, for one column [n, 2, heads, head_dim] in one write."""
        start = self.length - self.offset
        self._make_room(start + 1)
        if self.pair is not None:
            self.active_pair()[:, :, :, start] = keys_values.transpose(0, 1)
        else:
            self.keys[: self.rows, :, start], self.values[: self.rows, :, start] = keys_values.unbind(1)
        self.length += 1
        return self.keys[: self.rows, :, : start + 1], self.values[: self.rows, :, : start + 1]

    def round_to(self, dtype: torch.dtype) -> None:
        """Keep the prompts, and what follows, in another precision."""
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)

    def order_keys(self, components: Tensor) -> None:
        """Put the components of the prompts' keys into the order of [D] indices."""
        self.keys = self.keys[..., components]

    def reserve(self, columns: int, *, written: int) -> None:
        """Make room for `columns`, of which `written` are in use."""
        self.length = written
        self._make_room(columns - self.offset)

    def active_pair(self) -> Tensor:
        """Keys and values [2, n, H, columns, D] of the active rows, a view; after `start_decoding`."""
        assert self.pair is not None, "keys and values of one width, after start_decoding"
        return self.pair[:, : self.rows]

    def start_decoding(self, group_size: int, *, share: bool, keys_across: bool = False) -> None:
        """Make rows for `group_size` completions of each prompt, consecutively.

        Args:
            group_size: Completions per prompt.
            share: Keep the prompts apart instead of repeating them.
            keys_across: Store keys as [rows, heads, head_dim, columns], for `decode_products`; `keys` shows them as
                ever.
        """
        self.keys_across = keys_across
        prompt_keys, prompt_values = self.keys, self.values
        self.rows *= group_size
        if share:
            self.prompt_keys, self.prompt_values, self.offset = prompt_keys, prompt_values, self.length
        written = self.length - self.offset
        self._allocate(min(self.capacity - self.offset, written + INITIAL_COLUMNS), key_columns=written + 1)
        if not share:
            for storage, prompt in ((self.keys, prompt_keys), (self.values, prompt_values)):
                shape = (len(prompt), group_size, *prompt.shape[1:])
                storage.view(*shape[:2], *storage.shape[1:])[:, :, :, : self.length] = prompt[:, None].expand(shape)

    def move_rows(self, sources: Tensor, destinations: Tensor, rows: int) -> None:
        """Copy rows `sources` over rows `destinations`, then keep the first `rows`."""
        columns = self.length - self.offset
        if len(sources) > 0:
            self.values[destinations, :, :columns] = self.values[sources, :, :columns]
            if self.keys_across:  # whole rows of memory are copied sooner than parts of their lines
                columns = self.keys.shape[2]
            self.keys[destinations, :, :columns] = self.keys[sources, :, :columns]
        self.rows = rows

    def keep_prompts(self, kept: Tensor) -> None:
        """Forget shared prompts that no active row needs."""
        assert self.prompt_keys is not None
        assert self.prompt_values is not None
        self.prompt_keys, self.prompt_values = self.prompt_keys[kept], self.prompt_values[kept]

    def _make_room(self, needed: int) -> None:
        """Move to wider storage where `needed` columns have no room; rows given up are not copied."""
        if needed <= min(self.keys.shape[2], self.values.shape[2]):
            return
        columns = min(max(needed, 2 * self.values.shape[2]), max(self.capacity - self.offset, needed))
        key_columns = max(needed, self.keys.shape[2] * 9 // 8)
        written = self.length - self.offset
        keys, values = self.keys, self.values
        self._allocate(columns if needed > values.shape[2] or not self.keys_across else None, key_columns=key_columns)
        for storage, former in ((self.keys, keys), (self.values, values)):
            if storage is not former:
                storage[:, :, :written] = former[: self.rows, :, :written]

    def _allocate(self, columns: int | None, *, key_columns: int) -> None:
        """Replace `keys` and `values` by new storage of the same heads and widths.

        Args:
            columns: None keeps the values.
            key_columns: Of keys that lie across.
        """
        if self.keys_across:
            needed = max(self.capacity - self.offset, key_columns)
            wide = min(
                key_columns + (ACROSS_EXTRA - key_columns) % ACROSS_COLUMNS,
                needed + (ACROSS_EXTRA - needed) % (2 * ACROSS_EXTRA),
            )
            self.keys = self.keys.new_empty(self.rows, self.keys.shape[1], self.keys.shape[3], wide).transpose(2, 3)
            if columns is not None:
                self.values = _storage(self.values, self.rows, columns)
            return
        assert columns is not None
        if self.keys.shape[1:2] + self.keys.shape[3:] == self.values.shape[1:2] + self.values.shape[3:]:
            _, heads, _, width = self.keys.shape
            make = self.keys.new_zeros if self.zeroed else self.keys.new_empty
            self.pair = make(2, self.rows, heads, columns, width)
            self.keys, self.values = self.pair.unbind(0)
        else:
            self.keys, self.values = (_storage(like, self.rows, columns) for like in (self.keys, self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(columns a mask must cover, offset of the first)."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, the prompt included."""
        return self.length

    def get_max_length(self) -> int:
        """No fixed maximum: storage grows."""
        return -1


class InPlaceCache(Cache):
    """One `InPlaceLayer` per attention layer.

    Args:
        num_layers: Layers of the model that keep keys and values.
        capacity: Columns that will ever be needed.
        zeroed: See `InPlaceLayer`.
    """

    def __init__(self, num_layers: int, *, capacity: int, zeroed: bool = False) -> None:
        super().__init__(layers=[InPlaceLayer(capacity, zeroed=zeroed) for _ in range(num_layers)])
        self.capacity = capacity
        self.last_updated = self.layers[0]
        self.last_views: tuple[Tensor | None, Tensor | None] = (None, None)
        self.groups: PromptGroups | None = None
        self.prompt_bias: Tensor | None = None
        """[N, 1, 1, P], very negative on padding; None where no prompt is padded."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args, **_kwargs
    ) -> tuple[Tensor, Tensor]:
        """Write new columns of one layer; see `InPlaceLayer.update`."""
        self.last_updated = self.layers[layer_idx]
        self.last_views = self.last_updated.update(key_states, value_states)
        return self.last_views

    def append(self, keys_values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write one column of one layer; see `InPlaceLayer.append`."""
        self.last_updated = self.layers[layer_idx]
        return self.last_updated.append(keys_values)

    def start_decoding(self, group_size: int, *, share: bool, prompt_mask: Tensor, keys_across: bool = False) -> None:
        """Make rows for the completions; with `share`, each prompt [N, P] stays stored once.

        With `keys_across`, keys are stored for `decode_products`.
        """
        for layer in self.used_layers():
            layer.start_decoding(group_size, share=share, keys_across=keys_across)
        if not share:
            return
        prompts = len(prompt_mask)
        rows = torch.arange(prompts, device=prompt_mask.device).repeat_interleave(group_size)
        self.groups = PromptGroups(rows, prompts, in_order=True)
        if not bool(prompt_mask.all()):
            self.prompt_bias = padding_bias(prompt_mask, self.layers[0].keys.dtype)

    def reserve(self, columns: int, *, written: int) -> None:
        """Make room for `columns` in every layer, of which `written` are in use."""
        for layer in self.used_layers():
            layer.reserve(columns, written=written)

    def round_to(self, dtype: torch.dtype) -> None:
        """Keep all keys and values in another precision; before `start_decoding`."""
        for layer in self.used_layers():
            layer.round_to(dtype)

    def order_keys(self, components: Tensor) -> None:
        """Put the components of all keys into another order; before `start_decoding`."""
        for layer in self.used_layers():
            layer.order_keys(components)

    def move_rows(self, sources: Tensor, destinations: Tensor, kept: Tensor) -> None:
        """Fill the places of finished rows with the last rows, so that row i is the former row `kept[i]`."""
        for layer in self.used_layers():
            layer.move_rows(sources, destinations, len(kept))
        if self.groups is None:
            return
        prompt_of_row = self.groups.prompt_of_row[kept]
        needed, renumbered = prompt_of_row.unique(return_inverse=True)
        if len(needed) < self.groups.prompts:
            for layer in self.used_layers():
                layer.keep_prompts(needed)
            if self.prompt_bias is not None:
                self.prompt_bias = self.prompt_bias[needed]
        self.groups = PromptGroups(renumbered, len(needed))

    def used_layers(self) -> list[InPlaceLayer]:
        """The layers that hold anything."""
        return [layer for layer in self.layers if isinstance(layer, InPlaceLayer) and layer.is_initialized]


def padding_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, S] bool to [N, 1, 1, S]: 0 where True, the type's lowest number elsewhere."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(~mask, torch.finfo(dtype).min)[:, None, None]


def _storage(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(rows, like.shape[1], columns, like.shape[3])
