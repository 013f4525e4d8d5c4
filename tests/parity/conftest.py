"""One batch of log-probs, advantages and masks that every library is asked about."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor


@dataclass
class Completions:
    """Six completions, three to a prompt; the policy has moved far enough from the old one to be clipped."""

    log_probs: Tensor
    old_log_probs: Tensor
    ref_log_probs: Tensor
    entropy: Tensor
    advantages: Tensor
    """[B]"""
    mask: Tensor


@pytest.fixture
def completions() -> Completions:
    generator = torch.Generator().manual_seed(7)
    rows, steps = 6, 9
    lengths = torch.tensor([9, 1, 4, 6, 9, 2])
    old = -torch.rand(rows, steps, generator=generator, dtype=torch.float64) * 3 - 0.1
    return Completions(
        log_probs=old + 0.4 * torch.randn(rows, steps, generator=generator, dtype=torch.float64),
        old_log_probs=old,
        ref_log_probs=old + 0.3 * torch.randn(rows, steps, generator=generator, dtype=torch.float64),
        entropy=torch.rand(rows, steps, generator=generator, dtype=torch.float64),
        advantages=torch.randn(rows, generator=generator, dtype=torch.float64),
        mask=torch.arange(steps) < lengths.unsqueeze(1),
    )
