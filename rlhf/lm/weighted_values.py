"""The second product of decode attention: each query's weights times the values it has seen so far.

For one new token a row, a batched product multiplies one line by one matrix for each row and head. On a CPU that waits
for memory, and torch's product waits badly: `embedding_bag`, a weighted sum of chosen lines of a table, fetches ahead,
and took a third to a half of the product's time once the values of all layers outgrew the cache.
"""

from __future__ import annotations

import platform
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_HAS_KERNEL = platform.machine().lower() in ("x86_64", "amd64")
"""The kernel that fetches ahead (FBGEMM) is made for these."""


def weigh_values(weights: Tensor, values: Tensor) -> Tensor:
    """Return weights [n * H, R, T] times values [n, H, T, D]: [n * H, R, D].

    Args:
        weights: Of R queries for each row and key head.
        values: A view of a cache's first T columns.
    """
    rows, heads, columns, width = values.shape
    capacity = values.stride(1) // width
    lies_in_storage = values.stride() == (heads * capacity * width, capacity * width, width, 1)
    fits = weights.shape[1] == 1 and rows * heads * capacity < 2**31 and columns <= capacity
    is_plain = values.dtype is weights.dtype is torch.float32 and values.device.type == "cpu"
    if not (_HAS_KERNEL and lies_in_storage and fits and is_plain and not torch.is_grad_enabled()):
        return torch.bmm(weights, values.flatten(0, 1))
    # The last row and head may end at their last column.
    table = values.as_strided((rows * heads * capacity - (capacity - columns), width), (width, 1))
    places = _places(rows * heads, columns, capacity)
    return embedding_bag(places, table, mode="sum", per_sample_weights=weights.squeeze(1)).unsqueeze(1)


@lru_cache(maxsize=2)
def _places(rows: int, columns: int, capacity: int) -> Tensor:
    """[rows, columns] lines of the table; every layer of a step asks for the same."""
    starts = torch.arange(rows, dtype=torch.int32)[:, None] * capacity
    return starts + torch.arange(columns, dtype=torch.int32)
