"""The two products of decode attention on a CPU: a row's query with its keys, its weights with its values.

For one new token a row, a batched product multiplies one line by one matrix for each row and head. That waits for
memory, and torch's product waits badly: `embedding_bag`, a weighted sum of chosen lines of a table, fetches ahead. It
takes a third to a half of the product's time once keys and values of all layers outgrow the cache. For values the
lines are the tokens'. For keys they are the head's components, each with its number for every token, so the keys lie
across: [rows, heads, head_dim, columns] in memory (`InPlaceCache`'s `keys_across`).
"""

from __future__ import annotations

import platform
from functools import lru_cache

import torch
from torch import Tensor

SUM = 0
"""embedding_bag's number for sums."""
_HAS_KERNEL = platform.machine().lower() in ("x86_64", "amd64")
"""The kernel that fetches ahead (FBGEMM) is made for these."""


def wants_keys_across(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `match_keys` is faster for keys that lie across."""
    return _HAS_KERNEL and device.type == "cpu" and dtype is torch.float32


def match_keys(queries: Tensor, keys: Tensor) -> Tensor:
    """Return queries [n * H, R, D] times keys [n, H, T, D]: scores [n * H, R, T].

    Args:
        queries: R of each row and key head.
        keys: A view of a cache's first T columns.
    """
    rows, heads, columns, width = keys.shape
    capacity = keys.stride(3)
    lies_across = keys.stride() == (heads * width * capacity, width * capacity, 1, capacity) and columns <= capacity
    if not (lies_across and _is_plain(queries, keys, rows * heads * width)):
        return torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2))
    # Whole lines, those of columns yet to be written too: parts of lines would be fetched more slowly.
    table = keys.as_strided((rows * heads * width, capacity), (capacity, 1))
    lines = _places(rows * heads, width, width)
    return _weighted_sums(table, lines, queries.reshape(-1))[:, None, :columns]


def weigh_values(weights: Tensor, values: Tensor) -> Tensor:
    """Return weights [n * H, R, T] times values [n, H, T, D]: [n * H, R, D].

    Args:
        weights: Of R queries for each row and key head.
        values: A view of a cache's first T columns.
    """
    rows, heads, columns, width = values.shape
    capacity = values.stride(1) // width
    lies_in_storage = values.stride() == (heads * capacity * width, capacity * width, width, 1) and columns <= capacity
    if not (lies_in_storage and _is_plain(weights, values, rows * heads * capacity)):
        return torch.bmm(weights, values.flatten(0, 1))
    # The last row and head may end at their last column.
    table = values.as_strided((rows * heads * capacity - (capacity - columns), width), (width, 1))
    places = _places(rows * heads, columns, capacity)
    return _weighted_sums(table, places, weights.view(-1)).unsqueeze(1)


def _weighted_sums(table: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """[N, D] sums of lines of a table [., D]: those at places [N, L], times weights [N * L]."""
    starts = _starts(*places.shape)
    return torch.embedding_bag(table, places.view(-1), starts, False, SUM, False, weights)[0]


def _is_plain(factors: Tensor, stored: Tensor, lines: int) -> bool:
    """One factor for each line, in float32 on a CPU, without gradient."""
    return (
        _HAS_KERNEL
        and factors.shape[1] == 1
        and factors.dtype is stored.dtype is torch.float32
        and stored.device.type == "cpu"
        and lines < 2**31
        and not torch.is_grad_enabled()
    )


@lru_cache(maxsize=4)
def _places(rows: int, lines: int, distance: int) -> Tensor:
    """[rows, lines] int32: the first lines of rows that stand `distance` lines apart; all layers ask for the same."""
    starts = torch.arange(rows, dtype=torch.int32)[:, None] * distance
    return starts + torch.arange(lines, dtype=torch.int32)


@lru_cache(maxsize=4)
def _starts(rows: int, lines: int) -> Tensor:
    """[rows] int32: where each row of [rows, lines] begins when both are one axis."""
    return torch.arange(0, rows * lines, lines, dtype=torch.int32)
