"""What a run will do and take, before anything is loaded: its batches, the memory of a process, the machine.

Of a model config.json is read, of the data nothing. The numbers are those of the code that runs, tested against real
models, optimizers, caches and forwards; the activations are counted on torch's meta device (`rlhf.lm.activations`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.lm import plan_batches as batches
from rlhf.lm import plan_memory as memories
from rlhf.lm.actors import pick_tokenizer
from rlhf.lm.episode_collector import EpisodeCollectorConfig
from rlhf.lm.footprint import measure_model
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_tokenizer
from rlhf.lm.plan_memory import Memory
from rlhf.lm.players import pick_player_tokenizer
from rlhf.lm.tasks import TaskConfig, make_task
from rlhf.lm.text_environments import make_factory

GIB = 2**30
UNKNOWN = {"reward models": "their folders are not there yet"}
"""Name of a part -> why it is not known; else the model's forward does not run without numbers."""
Arithmetic = Callable[[Any, int], Iterator[str]]


@dataclass(frozen=True)
class _Run:
    """What is known of a run while it is planned."""

    config: Any
    processes: int
    sharded: bool


def plan(config: Any, *, processes: int = 1, sharded: bool = False) -> list[str]:
    """Lines about a language recipe's run; none for other recipes.

    Args:
        config: A resolved config of `sft`, `reward_model`, `grpo`, `ppo_rlhf`, `text_environment`, `evaluate`,
            `rankings`, `reward_bench` or of a recipe like them.
        processes: Training processes that share its batches.
        sharded: They share the trained weights, gradients and optimizer states too (FSDP2).
    """
    kind = _kind(config)
    if kind is None:
        return []
    arithmetic, remember = kind
    lines = ["Batches" + (f", over {processes} processes" if processes > 1 else "")]
    lines += [f"  {line}" for line in arithmetic(config, processes)]
    try:
        lines += remember(_Run(config, processes, sharded))
    except UserError as error:
        lines.append(f"Memory: not known. {error}")
    return [*lines, f"This machine: {machine()}"]


def _kind(config: Any) -> tuple[Arithmetic, Callable[[_Run], Iterator[str]]] | None:
    """What a recipe does, told by its settings; None where no language model takes part."""
    if hasattr(config, "completions_per_call"):
        return batches.judging_batches, _judging
    if not isinstance(getattr(config, "model", None), ModelConfig):
        return None
    if hasattr(config, "algorithm") and hasattr(config, "collector"):
        plays = isinstance(config.collector, EpisodeCollectorConfig)
        return (batches.episode_batches if plays else batches.rollout_batches), _reinforcing
    if hasattr(getattr(config, "training", None), "batch_prompts"):
        return batches.ranking_batches, _ranking
    if hasattr(config, "demonstrations"):
        return batches.imitation_batches, _imitating
    if hasattr(config, "evaluation") and hasattr(config, "against"):
        return batches.answer_batches, _answering
    return (batches.candidate_batches, _writing) if hasattr(config, "num_candidates") else None


# --- memory by kind of run ----------------------------------------------------------------------------------------


def _reinforcing(run: _Run) -> Iterator[str]:
    config = run.config
    tokenizer = _tokenizer(config)
    size = measure_model(config.model, tokenizer)
    prompt = _prompt_length(config, tokenizer)
    memory = memories.rollout_memory(
        config,
        size,
        processes=run.processes,
        sharded=run.sharded,
        prompt_length=prompt,
        tokenizer=tokenizer,
    )
    yield from show_memory(memory, size.parameters, size.trainable)
    if memory["moving average"]:
        yield "  the moving average takes as much again while it is evaluated or saved"
    if memories.has_engine(config):
        fraction = f"{config.generator.memory_fraction:.0%} of the GPU's memory"
        yield f"  vLLM besides: {fraction if config.generator.server is None else 'on its server'}"
    if prompt is None:
        told = "collector.max_prompt_length is not set" if hasattr(config, "prompts") else "they are the environment's"
        yield f"  prompts are not counted in KV cache and activations: {told}"


def _ranking(run: _Run) -> Iterator[str]:
    tokenizer = _tokenizer(run.config)
    size = measure_model(run.config.model, tokenizer)
    memory = memories.ranking_memory(size, run.config, processes=run.processes, tokenizer=tokenizer)
    yield from show_memory(memory, size.parameters, size.trainable)


def _imitating(run: _Run) -> Iterator[str]:
    tokenizer = _tokenizer(run.config)
    size = measure_model(run.config.model, tokenizer)
    memory = memories.imitation_memory(
        run.config, size, processes=run.processes, longest=_longest(run.config), tokenizer=tokenizer
    )
    yield from show_memory(memory, size.parameters, size.trainable)


def _answering(run: _Run) -> Iterator[str]:
    config = run.config
    rows = memories.evaluation_rows(config.evaluation, None)
    models = [config.model] if config.against is None else [config.model, config.against]
    size = max((measure_model(model) for model in models), key=lambda one: one.weight_bytes)
    length = config.sampling.max_completion_length
    judges, engine = list(config.rewards.values()), memories.has_engine(config)
    yield from show_memory(memories.answer_memory(size, rows=rows, length=length, judges=judges, engine=engine))
    yield "  prompts are not counted in the KV cache"


def _writing(run: _Run) -> Iterator[str]:
    config = run.config
    rows, length = config.prompts_per_batch * config.num_candidates, config.sampling.max_completion_length
    judges = memories.as_list(config.scorer)
    size = measure_model(config.model)
    engine = memories.has_engine(config)
    yield from show_memory(memories.answer_memory(size, rows=rows, length=length, judges=judges, engine=engine))
    yield "  prompts are not counted in the KV cache"


def _judging(run: _Run) -> Iterator[str]:
    yield from show_memory({"reward models": memories.judge_bytes(memories.as_list(run.config.reward))})


# --- tokenizers ---------------------------------------------------------------------------------------------------


def _tokenizer(config: Any) -> PreTrainedTokenizerBase | None:
    """It gives a fresh model its vocabulary; None where the model's own folder tells it."""
    if config.model.config is None:
        return None
    if isinstance(getattr(config, "task", None), TaskConfig) and config.model.tokenizer is None:
        return character_tokenizer(make_task(config.task).alphabet)
    if hasattr(config, "task"):
        return load_tokenizer(config.model)
    if hasattr(config, "environment"):
        return pick_player_tokenizer(config.model, make_factory(config.environment))
    return pick_tokenizer(config.model, config.prompts if hasattr(config, "prompts") else config.demonstrations)


def _prompt_length(config: Any, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """Most tokens of a prompt: as limited, or as a procedural task's prompts have characters."""
    limit = getattr(config.collector, "max_prompt_length", None)
    task = getattr(getattr(config, "prompts", None), "task", None)
    if limit is not None or task is None or tokenizer is None or config.model.tokenizer is not None:
        return limit
    return max(len(str(prompt.prompt)) for prompt in make_task(task).prompts)


def _longest(config: Any) -> int | None:
    """Tokens of a procedural task's longest demonstration, end token included, where a character is a token."""
    task = config.demonstrations.task
    if task is None or config.model.config is None or config.model.tokenizer is not None or config.training.packing:
        return None
    return max(len(str(one.prompt)) + len(str(one.completion)) + 1 for one in make_task(task).demonstrations)


# --- output -------------------------------------------------------------------------------------------------------


def show_memory(
    memory: Memory, parameters: int | None = None, trainable: int | None = None, *, left_out: str | None = None
) -> Iterator[str]:
    """The sum, then each part that takes any.

    Args:
        memory: By name.
        parameters: Of the model.
        trainable: Those that are learned.
        left_out: What is not counted.
    """
    total = sum(amount for amount in memory.values() if amount is not None)
    beside = ("" if left_out is None else f", {left_out} left out") + ", beside the libraries' own"
    yield f"Memory of a process at most, about: {_gib(total)}{beside}"
    if parameters is not None:
        learned = "" if trainable == parameters else f", {trainable:,} of them learned"
        yield f"  {parameters:,} parameters{learned}"
    for name, amount in memory.items():
        if amount is None:
            yield f"  {name}: not known, {UNKNOWN.get(name, 'this architecture cannot be counted without its weights')}"
        elif amount:
            yield f"  {name}: {_gib(amount)}"


def machine() -> str:
    """Cores, memory and accelerators of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    shown = [f"{gpu.name} ({_gib(gpu.total_memory)})" for gpu in gpus] or ["no GPU"]
    return f"{cores} CPU cores, {_gib(memory)} of memory, {', '.join(shown)}"


def _gib(amount: int) -> str:
    return f"{amount / GIB:,.2f} GiB" if amount >= 0.01 * GIB else f"{amount / 2**20:,.2f} MiB"
