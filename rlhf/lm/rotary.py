"""Rotary position embedding of the fused passes: queries and keys turned in place, by the angles of the model's module.

A model turns component i of a head together with i + D / 2. Where the fused passes make queries and keys by a matrix of
their own, they order its rows so that the two lie side by side, a complex number's parts: turning is then one product
instead of three operations. Products of queries and keys, which are all that attention sees, stay the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


def paired_components(width: int) -> Tensor:
    """[D] which component of the model's head stands at each place of a paired one.

    >>> paired_components(6).tolist()
    [0, 3, 1, 4, 2, 5]
    """
    return torch.arange(width).view(2, -1).t().flatten()


def paired_rows(attention: Any) -> Tensor:
    """[C] which row of the query, key and value matrices, one below the other, makes each component; values as ever."""
    width = attention.head_dim
    turned = attention.q_proj.out_features + attention.k_proj.out_features
    rows = torch.arange(turned + attention.v_proj.out_features)
    rows[:turned] = rows[:turned].view(-1, width)[:, paired_components(width)].flatten()
    return rows.to(attention.q_proj.weight.device)


@dataclass(frozen=True)
class PairedRotation:
    """Rotary embedding of paired heads."""

    turns: Tensor
    """[n, h * D / 2] complex, alike for every head: rows of one head's width are too short to be fast."""

    @classmethod
    def of(cls, cosines: Tensor, sines: Tensor, *, heads: int) -> PairedRotation:
        """From a module's cosines and sines [n, D], whose halves are alike."""
        half = cosines.shape[1] // 2
        return cls(torch.complex(cosines[:, :half], sines[:, :half]).repeat(1, heads))

    @cached_property
    def turns_back(self) -> Tensor:
        """[n, h * D / 2] conjugates of the turns."""
        return self.turns.conj_physical()

    def at(self, rows: Tensor) -> PairedRotation:
        """That of some rows, which may repeat."""
        return PairedRotation(self.turns.index_select(0, rows))

    def turn_(self, products: Tensor) -> None:
        """Rotate the first h heads of [n, C] in place."""
        self._pairs(products).mul_(self.turns)

    def turn_back_(self, gradient: Tensor) -> None:
        """Apply the transposed map, in place."""
        self._pairs(gradient).mul_(self.turns_back)

    def _pairs(self, products: Tensor) -> Tensor:
        turned = products[:, : 2 * self.turns.shape[1]]
        return torch.view_as_complex(turned.unflatten(1, (-1, 2)))


@dataclass(frozen=True)
class HalvedRotation:
    """Rotary embedding of heads as the model has them: x * cos + (-second half, first half) * sin."""

    cosines: Tensor
    """[n, 1, D]."""
    sines: Tensor
    """[n, 1, D], negative in the first half: a roll swaps the halves."""
    heads: int

    @classmethod
    def of(cls, cosines: Tensor, sines: Tensor, *, heads: int) -> HalvedRotation:
        """From a module's cosines and sines [n, D]."""
        signs = torch.ones_like(sines[:1])
        signs[:, : sines.shape[1] // 2] = -1.0
        return cls(cosines[:, None], (sines * signs)[:, None], heads)

    def at(self, rows: Tensor) -> HalvedRotation:
        """That of some rows."""
        return HalvedRotation(self.cosines.index_select(0, rows), self.sines.index_select(0, rows), self.heads)

    def turn_(self, products: Tensor) -> None:
        """Rotate the first h heads of [n, C] in place."""
        width = self.cosines.shape[2]
        turned = products.unflatten(1, (-1, width))[:, : self.heads]
        swapped = turned.roll(width // 2, dims=-1)
        if self.cosines.dtype is turned.dtype:
            turned.mul_(self.cosines).addcmul_(swapped, self.sines)
        else:
            turned.copy_(turned * self.cosines + swapped * self.sines)
