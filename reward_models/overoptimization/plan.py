"""What the lab will do and take: lines for `rlhf explain`, by arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reward_models.overoptimization.settings import OptimizationConfig, StartConfig, Variant
from reward_models.overoptimization.start import PROMPTS_AT_ONCE
from rlhf.errors import UserError
from rlhf.lm.actors import pick_tokenizer
from rlhf.lm.footprint import measure_model
from rlhf.lm.plan import machine, show_memory
from rlhf.lm.plan_memory import FLOAT32, OPTIMIZER_STATES, Memory


def plan_lab(
    start: StartConfig,
    optimization: OptimizationConfig,
    variants: Mapping[str, Variant],
    *,
    seeds: int,
    jobs: int,
) -> list[str]:
    """Batches of the cells, memory of one of them, and the machine.

    Args:
        start: Once per seed.
        optimization: Of every variant.
        variants: By name.
        seeds: How many.
        jobs: Cells at a time.
    """
    lines = ["Batches", *(f"  {line}" for line in _starts(start, seeds))]
    lines += [f"  {line}" for line in _policies(start, optimization, len(variants) * seeds)]
    lines.append(f"  {jobs} cells at a time, each a process with one thread")
    try:
        lines += _memory(start, optimization)
    except UserError as error:
        lines.append(f"Memory: not known. {error}")
    return [*lines, f"This machine: {machine()}"]


def _starts(start: StartConfig, seeds: int) -> Iterator[str]:
    sft, length, reward_model = start.sft, start.sampling.max_completion_length, start.reward_model
    held_out = _held_out(start)
    yield f"{seeds} starts, one per seed:"
    if sft is not None:
        amount = f"{sft.epochs:g} passes" if sft.max_steps is None else f"{sft.max_steps:,} steps"
        yield f"  fine-tuning: {amount} of {sft.batch_size:,} demonstrations"
    ranked = start.ranked_prompts * start.num_candidates
    yield (
        f"  rankings: {start.ranked_prompts:,} prompts x {start.num_candidates} = {ranked:,} completions of at most "
        f"{length:,} tokens, and as many answers to each of {held_out:,} held-out prompts"
    )
    yield (
        f"  {start.members} reward models: {reward_model.epochs} x {start.ranked_prompts:,} rankings / "
        f"{reward_model.batch_prompts:,} optimizer steps each"
    )
    drawn = held_out * start.best_of_n.samples
    yield (
        f"  best of n up to {start.best_of_n.largest:,}: {held_out:,} prompts x {start.best_of_n.samples:,} = "
        f"{drawn:,} completions, {drawn * length:,} tokens"
    )


def _policies(start: StartConfig, optimization: OptimizationConfig, cells: int) -> Iterator[str]:
    algorithm, length = optimization.algorithm, start.sampling.max_completion_length
    completions = optimization.prompts_per_iteration * optimization.group_size
    steps = algorithm.epochs * algorithm.minibatches
    measured = (optimization.iterations // optimization.evaluate_every + 1) * _held_out(start)
    yield f"{cells} policies, each variant from each start:"
    yield (
        f"  an iteration: {optimization.prompts_per_iteration:,} prompts x {optimization.group_size} = "
        f"{completions:,} completions of at most {length:,} tokens, {steps:,} optimizer steps"
    )
    yield (
        f"  a policy: {optimization.iterations:,} iterations = {optimization.iterations * completions:,} completions, "
        f"{optimization.iterations * steps:,} optimizer steps; measured on "
        f"{measured * optimization.samples_per_prompt:,} completions besides"
    )
    yield f"  all: {cells * optimization.iterations * completions:,} completions"


def _memory(start: StartConfig, optimization: OptimizationConfig) -> Iterator[str]:
    """Of the larger kind of cell: a policy's, with an ensemble as its reward; rows of best-of-n in its cache."""
    fresh = start.model.config is not None
    size = measure_model(start.model, pick_tokenizer(start.model, start.source) if fresh else None)
    rows = max(
        PROMPTS_AT_ONCE * start.best_of_n.samples,
        optimization.prompts_per_iteration * optimization.group_size,
    )
    memory: Memory = {
        "weights": size.weight_bytes,
        "gradients": size.trainable_bytes,
        "optimizer": OPTIMIZER_STATES[optimization.update.optimizer] * size.trainable_bytes,
        "reference": 0 if start.model.lora is not None else size.weight_bytes,
        "reward models": start.members * (size.body_bytes + size.hidden * FLOAT32),
        "KV cache": rows * start.sampling.max_completion_length * size.cache_bytes,
    }
    yield from show_memory(memory, size.parameters, size.trainable, left_out="activations, prompts in the KV cache")


def _held_out(start: StartConfig) -> int:
    return start.source.task.held_out if start.source.task is not None else start.source.held_out
