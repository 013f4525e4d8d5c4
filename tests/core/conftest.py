"""Builders that the core's tests share. They are session-wide because hypothesis refuses fixtures per function."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from rlhf.core.types import PolicyOutput, Rollout

NUM_ACTIONS = 5


@dataclass
class Batch:
    """A rollout, and the parameters (logits and values) of a categorical policy that scores its actions."""

    rollout: Rollout
    logits: Tensor
    """[B, T, A]"""
    values: Tensor
    """[B, T]"""

    def output(self, logits: Tensor, values: Tensor) -> PolicyOutput:
        all_log_probs = logits.log_softmax(-1)
        log_probs = all_log_probs.gather(-1, self.rollout.actions.unsqueeze(-1)).squeeze(-1)
        return PolicyOutput(log_probs, -(all_log_probs.exp() * all_log_probs).sum(-1), values)

    def parameters(self) -> tuple[Tensor, Tensor]:
        return self.logits.clone().requires_grad_(), self.values.clone().requires_grad_()


def _make_batch(seed: int, *, rows: int = 4, steps: int = 6, drift: float = 0.3, dtype=torch.float64) -> Batch:
    """Rows of different lengths, two to a group, a score on the last action; `drift` is how far the policy moved."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    lengths = torch.randint(1, steps + 1, (rows,), generator=generator)
    lengths[0] = steps
    positions = torch.arange(steps)
    mask = positions < lengths.unsqueeze(1)
    last = positions == (lengths - 1).unsqueeze(1)
    old_logits = normal(rows, steps, NUM_ACTIONS)
    actions = torch.randint(0, NUM_ACTIONS, (rows, steps), generator=generator)
    old_log_probs = old_logits.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)
    rollout = Rollout(
        inputs={"row": torch.arange(rows)},
        actions=actions,
        action_mask=mask,
        rewards=torch.where(last, normal(rows, steps).abs(), 0.0),  # maxrl refuses negative scores
        old_log_probs=old_log_probs,
        episode_ends=last,
        values=normal(rows, steps),
        ref_log_probs=old_log_probs + 0.2 * normal(rows, steps),
        sampling_log_probs=old_log_probs + 0.05 * normal(rows, steps),
        group_ids=torch.arange(rows) // 2,
        baselines=normal(rows),
        reward_parts=normal(rows, 2),
        part_weights=(1.0, 0.5),
    )
    return Batch(rollout, old_logits + drift * normal(rows, steps, NUM_ACTIONS), normal(rows, steps))


def _pad(tensor: Tensor, left: int, right: int, filler: float | int | bool) -> Tensor:
    """Lengthen dimension 1 on both sides."""
    shape = list(tensor.shape)
    shape[1] = left
    before = tensor.new_full(shape, filler)
    shape[1] = right
    return torch.cat([before, tensor, tensor.new_full(shape, filler)], dim=1)


def _pad_rollout(rollout: Rollout, left: int, right: int, garbage: float) -> Rollout:
    """The same rollout with masked steps on both sides, full of garbage."""
    names = ["rewards", "old_log_probs", "values", "next_values", "ref_log_probs", "sampling_log_probs"]
    floats = {name: getattr(rollout, name) for name in names if getattr(rollout, name) is not None}
    return replace(
        rollout,
        actions=_pad(rollout.actions, left, right, 0),
        action_mask=_pad(rollout.action_mask, left, right, False),
        episode_ends=_pad(rollout.episode_ends, left, right, False),
        **{name: _pad(value, left, right, garbage) for name, value in floats.items()},
    )


class TwoProcesses:
    """Runs one function in two threads whose `reduce` adds what both give it, as an all-reduce would."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=10)
        self._given: list[Tensor] = [torch.empty(0), torch.empty(0)]

    def run(self, function, *arguments):
        """`function(argument, reduce)` for each of the two arguments, at once; returns both results."""

        def on(rank: int):
            def reduce(tensor: Tensor) -> Tensor:
                self._given[rank] = tensor
                self._barrier.wait()
                total = self._given[0] + self._given[1]
                self._barrier.wait()
                return total

            return function(arguments[rank], reduce)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(on, range(2)))


@pytest.fixture(scope="session")
def make_batch():
    return _make_batch


@pytest.fixture(scope="session")
def pad_rollout():
    return _pad_rollout


@pytest.fixture(scope="session")
def pad():
    return _pad


@pytest.fixture(scope="session")
def on_two_processes():
    return lambda function, *arguments: TwoProcesses().run(function, *arguments)
