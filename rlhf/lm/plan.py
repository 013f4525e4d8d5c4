"""What a run will do and take, by arithmetic: prompts, completions, tokens, optimizer steps, memory of a process."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.errors import UserError
from rlhf.lm.actors import pick_tokenizer
from rlhf.lm.episode_collector import EpisodeCollectorConfig
from rlhf.lm.footprint import ModelSize, measure_model
from rlhf.lm.generator_config import VllmGeneratorConfig
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_tokenizer
from rlhf.lm.log_probs import default_chunk_tokens
from rlhf.lm.tasks import TaskConfig, make_task

OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "rmsprop": 1}
"""Tensors of a parameter's shape that an optimizer keeps."""
FLOAT32 = 4
GIB = 2**30

Memory = dict[str, int]
"""Name -> bytes of one process."""


def plan(config: Any, *, processes: int = 1) -> list[str]:
    """Lines about a language recipe's run; none for other recipes.

    Nothing is loaded: of a model config.json is read, of the data nothing.

    Args:
        config: A resolved config of `sft`, `reward_model`, `grpo`, `ppo_rlhf` or of a recipe like them.
        processes: Training processes that share its batches.
    """
    model = getattr(config, "model", None)
    reinforced = hasattr(config, "algorithm") and hasattr(config, "collector")
    ranks = hasattr(getattr(config, "training", None), "batch_prompts")  # a reward model
    if not isinstance(model, ModelConfig) or not (reinforced or ranks or hasattr(config, "demonstrations")):
        return []
    plays = reinforced and isinstance(config.collector, EpisodeCollectorConfig)
    arithmetic = _episodes if plays else _rollouts if reinforced else _rankings if ranks else _imitation
    lines = ["Batches" + (f", over {processes} processes" if processes > 1 else "")]
    lines += [f"  {line}" for line in arithmetic(config, processes)]
    if plays:
        return [*lines, "Memory: not estimated for text environments", f"This machine: {machine()}"]
    try:
        size = measure_model(model, _tokenizer(config) if model.config is not None else None)
        if reinforced:
            memory = rollout_memory(config, size, processes=processes)
        else:
            memory = ranking_memory(size) if ranks else imitation_memory(config, size)
        lines += _show_memory(size, memory)
        if _has_engine(config):
            fraction = f"{config.generator.memory_fraction:.0%} of the GPU's memory"
            lines.append(f"  vLLM besides: {fraction if config.generator.server is None else 'on its server'}")
        elif reinforced and config.collector.max_prompt_length is None:
            lines.append("  the prompts' part of the KV cache is not in it: collector.max_prompt_length is not set")
    except UserError as error:
        lines.append(f"Memory: not known. {error}")
    return [*lines, f"This machine: {machine()}"]


def _rollouts(config: Any, processes: int) -> Iterator[str]:
    collector, algorithm, iterations = config.collector, config.algorithm, config.iterations
    prompts, group = collector.prompts_per_iteration, collector.group_size
    completions, length = prompts * group, collector.sampling.max_completion_length
    steps = algorithm.epochs * algorithm.minibatches
    yield (
        f"an iteration: {prompts:,} prompts x {group} = {completions:,} completions of at most {length:,} tokens, "
        f"{completions * length:,} in all"
        + (f"; a process has {math.ceil(prompts / processes):,} prompts" if processes > 1 else "")
    )
    yield (
        f"an update: epochs x minibatches = {algorithm.epochs} x {algorithm.minibatches} = {steps:,} optimizer steps "
        f"of {math.ceil(completions / algorithm.minibatches):,} completions"
    )
    yield (
        f"the run: {iterations:,} iterations = {iterations * prompts:,} prompts, {iterations * completions:,} "
        f"completions, at most {iterations * completions * length:,} tokens, {iterations * steps:,} optimizer steps"
    )


def _episodes(config: Any, processes: int) -> Iterator[str]:
    collector, algorithm, iterations = config.collector, config.algorithm, config.iterations
    starts, group, length = collector.starts_per_iteration, collector.group_size, collector.max_episode_length
    episodes, steps = starts * group, algorithm.epochs * algorithm.minibatches
    yield (
        f"an iteration: {starts:,} start states x {group} = {episodes:,} episodes of at most {length:,} tokens after "
        f"the first prompt, turns of at most {collector.sampling.max_completion_length:,}"
        + (f"; a process has {math.ceil(starts / processes):,} start states" if processes > 1 else "")
    )
    yield (
        f"an update: epochs x minibatches = {algorithm.epochs} x {algorithm.minibatches} = {steps:,} optimizer steps "
        f"of {math.ceil(episodes / algorithm.minibatches):,} episodes"
    )
    yield (
        f"the run: {iterations:,} iterations = {iterations * episodes:,} episodes, at most "
        f"{iterations * episodes * length:,} tokens, {iterations * steps:,} optimizer steps"
    )


def _tokenizer(config: Any) -> PreTrainedTokenizerBase:
    """It gives a fresh model its vocabulary; a reward model names its task itself."""
    if isinstance(getattr(config, "task", None), TaskConfig) and config.model.tokenizer is None:
        return character_tokenizer(make_task(config.task).alphabet)
    if hasattr(config, "task"):
        return load_tokenizer(config.model)
    return pick_tokenizer(config.model, config.prompts if hasattr(config, "prompts") else config.demonstrations)


def _has_engine(config: Any) -> bool:
    """Whether the completions come from vLLM: their cache is its own then."""
    return isinstance(getattr(config, "generator", None), VllmGeneratorConfig)


def _rankings(config: Any, processes: int) -> Iterator[str]:
    training = config.training
    share = training.batch_prompts // processes
    answers = f"{config.num_candidates}" if config.task is not None else "all their"
    length = "the model's context" if training.max_length is None else f"{training.max_length:,} tokens"
    yield (
        f"an optimizer step: {training.batch_prompts:,} prompts with {answers} answers, each with its prompt at most "
        f"{length}; a process takes {share:,} prompts, {min(training.microbatch_prompts or share, share):,} at once"
    )
    rankings = f"{config.task.train:,}" if config.task is not None else "the rankings that are not held out"
    yield f"the run: {training.epochs} x {rankings} / {training.batch_prompts:,} optimizer steps"


def _imitation(config: Any, processes: int) -> Iterator[str]:
    training = config.training
    share = training.batch_size // processes
    micro = min(training.microbatch_size or share, share)
    rows = "packed rows" if training.packing else "demonstrations"
    yield (
        f"an optimizer step: {training.batch_size:,} {rows} of at most {training.max_length:,} tokens, "
        f"{training.batch_size * training.max_length:,} in all; a process takes {share // micro:,} x {micro:,}"
    )
    if training.max_steps is None:
        yield f"the run: {training.epochs:g} x the {rows} / {training.batch_size:,} optimizer steps"
    else:
        yield (
            f"the run: {training.max_steps:,} optimizer steps = {training.max_steps * training.batch_size:,} {rows}, "
            f"at most {training.max_steps * training.batch_size * training.max_length:,} tokens"
        )


def rollout_memory(config: Any, size: ModelSize, *, processes: int = 1) -> Memory:
    """Bytes of one process in a run of reinforcement learning, activations left out.

    Args:
        config: As `FineTuningConfig`.
        size: Of the policy's model.
        processes: That share a rollout's prompts.

    Raises:
        UserError: The critic's config.json cannot be read.
    """
    collector, algorithm = config.collector, config.algorithm
    states = OPTIMIZER_STATES[config.update.optimizer]
    critic, critic_learned = critic_bytes(config, size) if algorithm.needs_critic else (0, 0)
    share = math.ceil(collector.prompts_per_iteration / processes)
    rows = min(collector.generation_prompts or share, share) * collector.group_size
    completion = collector.sampling.max_completion_length
    needs_copy = (algorithm.needs_reference or config.watch.kl_budget is not None) and config.model.lora is None
    positions = config.update.microbatch_tokens or share * collector.group_size * completion
    kept = 2 + algorithm.needs_reference + 2 * algorithm.needs_critic  # old, sampling; reference; values, next values
    return {
        "weights": size.weight_bytes,
        "critic": critic,
        "gradients": size.trainable_bytes + critic_learned,
        "optimizer": states * (size.trainable_bytes + critic_learned),
        "reference": size.weight_bytes if needs_copy else 0,
        "KV cache": 0
        if _has_engine(config)
        else rows * ((collector.max_prompt_length or 0) + completion) * size.cache_bytes,
        "logits of a chunk, forward and backward": 2 * _chunk_bytes(size.vocabulary, positions),
        "log-probs and values": share * collector.group_size * completion * kept * FLOAT32,
    }


def critic_bytes(config: Any, size: ModelSize) -> tuple[int, int]:
    """The critic's weights beside the policy's, and those of them that are learned."""
    head, start = (size.hidden + 1) * FLOAT32, config.critic.start
    if start == "head":
        return head, head
    if start == "adapter":
        return size.trainable_bytes + head, size.trainable_bytes + head
    body = size.body_bytes
    if start != "copy" and (Path(start) / "config.json").is_file():
        body = measure_model(ModelConfig(path=start, dtype=config.model.dtype)).body_bytes
    return body + head, body + head


def imitation_memory(config: Any, size: ModelSize) -> Memory:
    """Bytes of one process in supervised fine-tuning, activations and logits left out."""
    return {
        "weights": size.weight_bytes,
        "gradients": size.trainable_bytes,
        "optimizer": OPTIMIZER_STATES["adamw"] * size.trainable_bytes,
    }


def ranking_memory(size: ModelSize) -> Memory:
    """Bytes of one process that trains a reward model, activations left out: a head of one output, no logits."""
    head, adapters = size.hidden * FLOAT32, 0 if size.trainable == size.parameters else size.trainable_bytes
    learned = (adapters or size.body_bytes) + head
    # PEFT keeps a saved-whole layer such as the head twice: as it was, and as it is trained.
    return {
        "weights": size.body_bytes + head + (adapters + head if adapters else 0),
        "gradients": learned,
        "optimizer": OPTIMIZER_STATES["adamw"] * learned,
    }


def _chunk_bytes(vocabulary: int, positions: int) -> int:
    """Logits are made a chunk at a time, and of no more positions than a microbatch has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return min(default_chunk_tokens(vocabulary, device), positions) * vocabulary * FLOAT32


def _show_memory(size: ModelSize, memory: Memory) -> Iterator[str]:
    learned = "" if size.trainable == size.parameters else f", {size.trainable:,} of them learned"
    yield f"Memory of a process at most, beside activations: {_gib(sum(memory.values()))}"
    yield f"  {size.parameters:,} parameters{learned}"
    for name, amount in memory.items():
        if amount:
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
