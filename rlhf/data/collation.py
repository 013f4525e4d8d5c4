"""Padding lists of token ids into tensors, with masks made from lengths.

A mask made by comparing ids with the pad id is wrong wherever the pad token doubles as the end token; lengths cannot
be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Align sequences at their end, as prompts must be so that generation goes on from their last token.

    Args:
        sequences: N lists of token ids.
        pad_id: What fills the front.

    Returns:
        ids [N, P] int64, and mask [N, P] bool, True where a real token stands.

    Example:
        >>> left_pad([[5, 6], [7]], 0)[0].tolist()
        [[5, 6], [0, 7]]
    """
    return _pad(sequences, pad_id, from_left=True)


def right_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Align sequences at their start, as completions are.

    Args:
        sequences: N lists of token ids.
        pad_id: What fills the end.

    Returns:
        ids [N, T] int64, and mask [N, T] bool, True where a real token stands.

    Example:
        >>> right_pad([[5, 6], [7]], 0)[1].tolist()
        [[True, True], [True, False]]
    """
    return _pad(sequences, pad_id, from_left=False)


def _pad(sequences: Sequence[Sequence[int]], pad_id: int, *, from_left: bool) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    width = int(lengths.max()) if len(sequences) else 0
    positions = torch.arange(width).expand(len(sequences), width)
    if from_left:
        mask = positions >= (width - lengths).unsqueeze(1)
    else:
        mask = positions < lengths.unsqueeze(1)
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    ids[mask] = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return ids, mask
