"""Which rows make up which minibatch and microbatch, on this process.

A minibatch (one optimizer step) is a slice of one permutation of the rows of *all* processes, drawn alike on each of
them; a process computes the rows it holds. So the steps are those that one process with all rows would take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, repeat
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.core.masking import Reduce, identity, standardize
from rlhf.core.types import Experience
from rlhf.errors import TrainingError
from rlhf.training.distributed import gather_stack


@dataclass(frozen=True)
class Shard:
    """The rows of this process among those of all."""

    offset: int
    """Index of the first own row in the concatenation over ranks."""
    rows: int
    """Own rows."""
    total: int
    """Rows of all processes."""


@dataclass(frozen=True)
class MicrobatchLimits:
    """What may go through one forward and backward; None is no limit."""

    rows: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Minibatch:
    """One optimizer step: a range of the epoch's order, cut into microbatches."""

    start: int
    stop: int
    sizes: tuple[int, ...]
    """Rows of each microbatch, in order; their sum is stop - start."""
    fillers: int
    """Fully masked microbatches to add, so that every process makes as many backward passes."""
    denominators: Tensor
    """[2] over all processes, as `Objective.loss` wants them, on the experience's device."""
    actions: int
    """Unmasked actions over all processes."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the rows."""

    order: Tensor | None
    """[B] own rows, minibatch after minibatch; None is the order they have."""
    minibatches: list[Minibatch]


def make_shard(accelerator: Accelerator, rows: int, *, minibatches: int) -> Shard:
    """Learn where this process's rows stand among all.

    Raises:
        TrainingError: A process without rows, or fewer rows than minibatches.
    """
    counts = gather_stack(accelerator, torch.tensor([rows])).flatten().tolist()
    rank, total = accelerator.process_index, sum(counts)
    if min(counts) == 0:
        raise TrainingError(
            "a process collected no row with an action of the policy's own",
            where=f"process {counts.index(0)} of {len(counts)}",
            remedy="Collect more, or check the action_mask that the collector writes.",
        )
    if total < minibatches:
        raise TrainingError(
            "there are fewer rows than minibatches",
            got=f"{total} rows for algorithm.minibatches={minibatches}",
            remedy="Collect more rows per iteration, or lower algorithm.minibatches.",
        )
    return Shard(offset=sum(counts[:rank]), rows=rows, total=total)


def local_minibatches(permutation: Tensor, shard: Shard, *, minibatches: int) -> list[Tensor]:
    """Cut a permutation of all rows into minibatches whose sizes differ by at most one; keep this process's rows.

    Args:
        permutation: [total] int64, the same on all processes.
        shard: Where this process's rows stand.
        minibatches: How many.

    Returns:
        For each minibatch the own rows [n], counted from 0.

    >>> local_minibatches(torch.tensor([3, 0, 2, 1]), Shard(offset=2, rows=2, total=4), minibatches=2)
    [tensor([1]), tensor([0])]
    """
    parts = permutation.tensor_split(minibatches)
    if shard.rows == shard.total:
        return list(parts)
    local = [part - shard.offset for part in parts]
    return [part[(part >= 0) & (part < shard.rows)] for part in local]


def cut_microbatches(lengths: Sequence[int], limits: MicrobatchLimits) -> tuple[int, ...]:
    """Cut rows, the longest first, into microbatches within the limits, in order and greedily.

    Args:
        lengths: Tokens that each row costs, in the order of the rows.
        limits: Most rows, and most rows x longest row.

    Returns:
        Rows of each microbatch.

    Raises:
        TrainingError: One row alone exceeds the token budget.

    >>> cut_microbatches([5, 4, 3, 2, 1], MicrobatchLimits(tokens=10))
    (2, 3)
    """
    if limits.tokens is None:
        step = limits.rows or max(1, len(lengths))
        return tuple(min(step, len(lengths) - start) for start in range(0, len(lengths), step))
    if lengths and max(lengths) > limits.tokens:
        raise TrainingError(
            f"a row of {max(lengths)} tokens does not fit into a microbatch",
            where="update.microbatch_tokens",
            got=limits.tokens,
            remedy=f"Raise it to at least {max(lengths)}, or limit the lengths of prompts and completions.",
        )
    sizes: list[int] = []
    longest = count = 0
    for length in lengths:
        longest = max(longest, length)
        if count and ((count + 1) * longest > limits.tokens or count == limits.rows):
            sizes.append(count)
            longest, count = length, 0
        count += 1
    return (*sizes, count) if count else tuple(sizes)


def plan_epochs(
    experience: Experience,
    shard: Shard,
    *,
    accelerator: Accelerator,
    generator: torch.Generator,
    epochs: int,
    minibatches: int,
    limits: MicrobatchLimits,
    lengths: Tensor | None,
    denominators: Callable[[Tensor], Tensor],
) -> list[Epoch]:
    """Draw the minibatches of all epochs, cut them, and count what they hold over all processes, in one collective.

    Args:
        experience: The own rows.
        shard: Where they stand among all.
        accelerator: Whose processes take part.
        generator: CPU generator in the same state on all processes.
        epochs: Passes over the rows.
        minibatches: Optimizer steps per pass.
        limits: What fits into one forward.
        lengths: [B] tokens per row on the CPU; rows are sorted by them inside a minibatch so that trimming pays.
        denominators: `Objective.denominators`, of a mask [n, T].

    Raises:
        TrainingError: A row that fits into no microbatch.
    """
    drawn = [_draw(shard, generator=generator, minibatches=minibatches, lengths=lengths) for _ in range(epochs)]
    parts = [part for parts, _ in drawn for part in parts]
    sizes = [_cut(part, lengths, limits, positions=experience.action_mask.shape[1]) for part in parts]
    everywhere = gather_stack(accelerator, _count(experience.action_mask, parts, sizes, denominators))  # [P, E M, 3]
    most = everywhere[:, :, 2].amax(0).long().tolist()
    totals = everywhere[:, :, :2].sum(0)
    divisors, actions = totals.float().to(experience.action_mask.device).unbind(0), totals[:, 1].tolist()
    planned = []
    for epoch, (_, order) in enumerate(drawn):
        steps, start = [], 0
        for index in range(epoch * minibatches, (epoch + 1) * minibatches):
            stop, fillers = start + len(parts[index]), most[index] - len(sizes[index])
            steps.append(Minibatch(start, stop, sizes[index], fillers, divisors[index], int(actions[index])))
            start = stop
        planned.append(Epoch(order=order, minibatches=steps))
    return planned


def _draw(
    shard: Shard, *, generator: torch.Generator, minibatches: int, lengths: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """The own rows of each minibatch, and all of them in order; None where that is the order they have."""
    if minibatches == 1:
        if lengths is None:  # the order inside a minibatch changes no gradient
            return [torch.arange(shard.rows)], None
        order = lengths.argsort(descending=True, stable=True)
        return [order], order
    permutation = torch.randperm(shard.total, generator=generator)
    parts = local_minibatches(permutation, shard, minibatches=minibatches)
    if lengths is None:
        return parts, permutation if shard.rows == shard.total else torch.cat(parts)
    parts = [part[lengths[part].argsort(descending=True, stable=True)] for part in parts]
    return parts, torch.cat(parts)


def _cut(part: Tensor, lengths: Tensor | None, limits: MicrobatchLimits, *, positions: int) -> tuple[int, ...]:
    """Microbatch sizes of one minibatch; without lengths every row costs its `positions`."""
    if limits == MicrobatchLimits():
        return (len(part),) if len(part) else ()
    return cut_microbatches([positions] * len(part) if lengths is None else lengths[part].tolist(), limits)


def _count(
    mask: Tensor, parts: Sequence[Tensor], sizes: Sequence[tuple[int, ...]], denominators: Callable[[Tensor], Tensor]
) -> Tensor:
    """[M, 3] float64: the two denominators of the own rows, and how many microbatches they make."""
    if bool(mask.all()):  # as always where single actions are shuffled: only the number of rows matters
        rows = [len(part) for part in parts]
        by_rows = {count: denominators(mask[:count]) for count in set(rows)}
        own = [by_rows[count] for count in rows]
    else:
        own = [denominators(mask[part.to(mask.device)]) for part in parts]
    cuts = torch.tensor([[float(len(size))] for size in sizes], dtype=torch.float64)
    return torch.cat([torch.stack(own).double().cpu(), cuts], dim=1)


def clear_masked(experience: Experience) -> Experience:
    """Put 0 where actions are masked: an inf left there by a collector would give 0 x inf in the gradient."""
    mask = experience.action_mask
    if bool(mask.all()):
        return replace(experience, complete=True)
    cleared = {
        name: torch.where(mask, value, 0.0)
        for name, value in vars(experience).items()
        if isinstance(value, Tensor) and value.is_floating_point() and name != "actions"
    }
    return replace(experience, **cleared)


def rows_between(experience: Experience, start: int, stop: int) -> Experience:
    """Return rows start..stop as views."""
    if start == 0 and stop == len(experience):
        return experience
    # On the hot path of small policies: a slice keeps the shapes that the constructor would check again.
    part = object.__new__(Experience)
    for name, value in vars(experience).items():
        if isinstance(value, Tensor):
            value = value[start:stop]
        elif isinstance(value, dict):
            value = {key: tensor[start:stop] for key, tensor in value.items()}
        part.__dict__[name] = value
    return part


def split_rows(experience: Experience, sizes: Sequence[int]) -> list[Experience]:
    """Cut into consecutive rows, as views; the sizes add up to all of them."""
    if len(sizes) == 1:
        return [experience]
    parts = [object.__new__(Experience) for _ in sizes]  # as in `rows_between`
    for name, value in vars(experience).items():
        pieces: Iterable[Any] = repeat(value)
        if isinstance(value, Tensor):
            pieces = value.split(sizes)  # type: ignore[arg-type]
        elif isinstance(value, dict):
            each = {key: tensor.split(sizes) for key, tensor in value.items()}
            pieces = [{key: tensors[index] for key, tensors in each.items()} for index in range(len(sizes))]
        for part, piece in zip(parts, pieces, strict=False):
            part.__dict__[name] = piece
    return parts


def masked_filler(experience: Experience, *, row: int = 0) -> Experience:
    """Return one row with every action masked: it costs a forward and contributes exactly nothing."""
    filler = experience.select(torch.tensor([row], device=experience.actions.device))
    return replace(filler, action_mask=torch.zeros_like(filler.action_mask), complete=False)


def microbatches(
    own: Experience, minibatch: Minibatch, *, filler_from: Experience
) -> Iterator[tuple[Experience, bool]]:
    """Yield each microbatch of a minibatch's rows, and whether it is the last; fully masked ones fill up at the end."""
    total, start = len(minibatch.sizes) + minibatch.fillers, 0
    for index, size in enumerate(minibatch.sizes):
        yield rows_between(own, start, start + size), index + 1 == total
        start += size
    for index in range(minibatch.fillers):
        yield masked_filler(filler_from), index + 1 == minibatch.fillers


def standardize_minibatches(rows: Experience, plan: Epoch, *, reduce: Reduce) -> Experience:
    """Return the rows, in an epoch's order, with the advantages of every minibatch standardized by themselves."""
    counted = rows.counted
    if counted is None and reduce is identity:  # those of equal size at once
        parts = []
        for size, equal in groupby(plan.minibatches, key=lambda minibatch: minibatch.stop - minibatch.start):
            start, *others = equal
            together = rows.advantages[start.start : start.start + size * (1 + len(others))]
            each = torch.vmap(lambda advantages: standardize(advantages, None))(together.unflatten(0, (-1, size)))
            parts.append(each.flatten(0, 1))
        return replace(rows, advantages=torch.cat(parts))
    parts = [
        standardize(
            rows.advantages[minibatch.start : minibatch.stop],
            None if counted is None else counted[minibatch.start : minibatch.stop],
            reduce=reduce,
        )
        for minibatch in plan.minibatches
    ]
    return replace(rows, advantages=torch.cat(parts))
