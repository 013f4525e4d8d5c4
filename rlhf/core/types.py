"""The central types: what a policy says, what a collector saw, what credit assignment made of it.

Shapes: B rows, T action positions. A row is one episode, one segment of a running environment, or one
completion. `action_mask` is True where the action was the policy's own and took effect: it is False on
padding and tool tokens of a completion, and on the reset step of gymnasium's NEXT_STEP autoreset.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


class PolicyOutput(NamedTuple):
    """What a policy says about given actions.

    A NamedTuple on purpose: accelerate's mixed precision returns its tensors as float32, a dataclass's not.
    """

    log_probs: Tensor
    """[B, T] log pi(a_t | s_t) of the given actions, nats, float32."""
    entropy: Tensor
    """[B, T] entropy of pi(. | s_t), nats."""
    values: Tensor | None
    """[B, T] V(s_t), or None for a policy without a critic."""


@runtime_checkable
class Policy(Protocol):
    """An `nn.Module` that scores given actions; a gym actor-critic and a language model both are one."""

    def __call__(self, inputs: Mapping[str, Tensor], actions: Tensor) -> PolicyOutput:
        """Score `actions` [B, T, ...] taken under `inputs` (each [B, ...])."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Facts, written once by a collector."""

    inputs: dict[str, Tensor]
    """What the policy saw, each [B, ...]."""
    actions: Tensor
    """[B, T] or [B, T, D]."""
    action_mask: Tensor
    """[B, T] bool, True where the action was the policy's own."""
    rewards: Tensor
    """[B, T] reward per action; a completion's score sits on its last real action."""
    old_log_probs: Tensor
    """[B, T] log-probs under the policy that collected, by the trainer's forward; with `on_policy`, the engine's."""
    episode_ends: Tensor
    """[B, T] bool, True where the episode terminated or was truncated after this action."""
    values: Tensor | None = None
    """[B, T] V(s_t) at collection."""
    next_values: Tensor | None = None
    """[B, T] V(s_{t+1}): 0 where terminated, V of the true next state where truncated."""
    live_log_probs: Tensor | None = None
    """[B, T] `old_log_probs` as the policy's forward left them, differentiable; None where it was not kept."""
    live_entropy: Tensor | None = None
    """[B, T] of the same forward."""
    live_values: Tensor | None = None
    """[B, T] `values` as the critic's forward left them, differentiable; None where it was not kept."""
    ref_log_probs: Tensor | None = None
    """[B, T] log-probs under the frozen reference."""
    sampling_log_probs: Tensor | None = None
    """[B, T] log-probs as the generation engine reported them."""
    on_policy: bool = False
    """True where one step is made of these rows, and its own forward gives what the old log-probs would be: they are
    those of the same weights, so that every ratio is 1. No forward before it computed them."""
    group_ids: Tensor | None = None
    """[B] int64; rows with one id answered the same prompt or started from the same state."""
    baselines: Tensor | None = None
    """[B] score of the greedy completion of the row's prompt."""
    reward_parts: Tensor | None = None
    """[B, P] what each part of a combined reward gave, before weighting; NaN where a part does not apply."""
    part_weights: tuple[float, ...] = ()
    """P factors of the parts."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Scalars for the log (for instance `rollout/score_mean`)."""
    samples: Sequence[Mapping[str, Any]] = ()
    """A few readable records for `samples.jsonl`."""

    def __post_init__(self) -> None:
        _check_rows(self)

    @property
    def scores(self) -> Tensor:
        """[B] undiscounted sum of each row's rewards over its own actions."""
        return torch.where(self.action_mask, self.rewards, 0.0).sum(dim=1)


@dataclass(frozen=True, kw_only=True)
class Experience:
    """Facts plus credit, made only by `estimate`: rewards are gone, advantages and returns arrived."""

    inputs: dict[str, Tensor]
    actions: Tensor
    action_mask: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    """[B, T], 0 where masked."""
    returns: Tensor | None = None
    """[B, T] regression targets of the critic."""
    old_values: Tensor | None = None
    live_log_probs: Tensor | None = None
    live_entropy: Tensor | None = None
    live_values: Tensor | None = None
    """[B, T] each, differentiable: the first epoch's forward, or the critic's part of it, where it was kept."""
    ref_log_probs: Tensor | None = None
    weights: Tensor | None = None
    """[B, T] detached factors of the surrogate (a correction for the generation engine, discount^t), or None."""
    imitation: Tensor | None = None
    """[B, T] factors of the likelihood of the rollout's successes, 0 on other rows, or None."""
    behaviour_log_probs: Tensor | None = None
    """[B, T] log-probs under what drew the actions, where rows that have drifted too far from it are left out."""
    on_policy: bool = False
    """As in `Rollout`."""
    complete: bool = False
    """True where it is known that every action counts: nothing has to be masked then, which saves operations."""

    def __post_init__(self) -> None:
        _check_rows(self)

    def __len__(self) -> int:
        return self.actions.shape[0]

    def select(self, rows: Tensor) -> Self:
        """Return the rows at integer indices `rows` [N]."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Self:
        """Return a copy on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def flatten_actions(self) -> Self:
        """Turn [B, T] into [N, 1] with one row per unmasked action, so that single actions can be shuffled.

        Only for policies whose every input has a time axis [B, T, ...], such as feed-forward gym policies.
        """
        kept = self.action_mask.reshape(-1).nonzero().squeeze(1)
        flat = self._map(lambda tensor: tensor.flatten(0, 1)[kept].unsqueeze(1))
        return replace(flat, complete=True)

    @property
    def counted(self) -> Tensor | None:
        """The action mask; None where every action is known to count."""
        return None if self.complete else self.action_mask

    def _map(self, transform) -> Self:
        changes: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                changes[item.name] = transform(value)
            elif isinstance(value, dict):
                changes[item.name] = {key: transform(tensor) for key, tensor in value.items()}
        return replace(self, **changes)


def present(tensor: Tensor | None) -> Tensor:
    """A tensor that earlier checks have made sure is there."""
    assert tensor is not None, "an optional tensor is missing; estimate() refuses rollouts that lack what is needed"
    return tensor


def _check_rows(batch: Rollout | Experience) -> None:
    """Refuse tensors whose row or time axis disagrees with the mask: a silent broadcast trains on garbage."""
    rows, steps = batch.action_mask.shape
    assert batch.action_mask.dtype == torch.bool, "action_mask must be bool"
    for item in fields(batch):
        value = getattr(batch, item.name)
        if not isinstance(value, Tensor):
            continue
        if item.name in ("group_ids", "baselines"):
            assert value.shape == (rows,), f"{item.name}: shape {tuple(value.shape)}, expected ({rows},)"
        elif item.name == "reward_parts":
            expected = (rows, len(batch.part_weights))  # pyright: ignore[reportAttributeAccessIssue]
            assert value.shape == expected, f"reward_parts: shape {tuple(value.shape)}, expected {expected}"
        elif item.name == "actions":
            assert value.shape[:2] == (rows, steps), (
                f"actions: shape {tuple(value.shape)}, expected ({rows}, {steps}, ...)"
            )
        else:
            assert value.shape == (rows, steps), f"{item.name}: shape {tuple(value.shape)}, expected ({rows}, {steps})"
    for key, value in batch.inputs.items():
        assert value.shape[0] == rows, f"inputs[{key!r}]: {value.shape[0]} rows, expected {rows}"
