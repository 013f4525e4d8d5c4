"""The memory of one process, by name: what stays all run long, and what a rollout and a microbatch take at most."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.lm.activations import activation_bytes
from rlhf.lm.footprint import ModelSize, measure_model
from rlhf.lm.generator_config import VllmGeneratorConfig
from rlhf.lm.loading import ModelConfig, resolve_precision
from rlhf.lm.log_probs import default_chunk_tokens

OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "rmsprop": 1}
"""Tensors of a parameter's shape that an optimizer keeps."""
FLOAT32 = 4
TILE = (4096, 32_768)
"""Most tokens and most of the vocabulary that TRL's supervised loss holds the logits of at once."""
ONE_ANSWER = "activations of one answer, about (a microbatch has all answers of its prompts)"
BORROWS_THE_BACKBONE = "AdapterScorer"
"""Ending of the name of a reward that scores through the policy's own weights."""

Memory = dict[str, int | None]
"""Name -> bytes of one process; None where they are not known."""


def rollout_memory(
    config: Any,
    size: ModelSize,
    *,
    processes: int = 1,
    sharded: bool = False,
    prompt_length: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Memory:
    """Bytes of one process in a run of reinforcement learning on prompts or on episodes.

    Args:
        config: As `FineTuningConfig` or `EpisodeTrainingConfig`.
        size: Of the policy's model.
        processes: That share a rollout's prompts.
        sharded: Trained weights, gradients and optimizer states are divided among them (FSDP2).
        prompt_length: Tokens of the longest prompt; None leaves prompts out.
        tokenizer: Of a fresh model.

    Raises:
        UserError: The critic's or a reward model's config.json cannot be read.
    """
    algorithm = config.algorithm
    share, at_once, length = _rollout_shape(config, processes)
    critic, critic_learned = critic_bytes(config, size) if algorithm.needs_critic else (0, 0)
    kept = 2 + algorithm.needs_reference + 2 * algorithm.needs_critic  # old, sampling; reference; values, next values
    needs_copy = (algorithm.needs_reference or config.watch.kl_budget is not None) and config.model.lora is None
    learned, parts = size.trainable_bytes + critic_learned, processes if sharded else 1
    memory: Memory = {
        "weights": math.ceil(size.weight_bytes / parts),
        "critic": math.ceil(critic / parts),
        "gradients": math.ceil(learned / parts),
        "optimizer": math.ceil(OPTIMIZER_STATES[config.update.optimizer] * learned / parts),
        "reference": size.weight_bytes if needs_copy else 0,
        "moving average": math.ceil(size.trainable_bytes / parts) if getattr(config, "ema", None) is not None else 0,
        "weights gathered for a rollout": size.weight_bytes + critic if sharded else 0,
        "reward models": judge_bytes([*as_list(getattr(config, "reward", None)), *as_list(_gold(config))]),
        "KV cache": 0 if has_engine(config) else at_once * ((prompt_length or 0) + length) * size.cache_bytes,
    }
    return (
        memory
        | _update_memory(config, size, rows=share, length=length, prompt_length=prompt_length, tokenizer=tokenizer)
        | {"log-probs and values": share * length * kept * FLOAT32}
    )


def _rollout_shape(config: Any, processes: int) -> tuple[int, int, int]:
    """Rows of a process, most rows generated at once (an evaluation's counted), tokens of a row after its prompt."""
    collector = config.collector
    if hasattr(collector, "starts_per_iteration"):
        share = math.ceil(collector.starts_per_iteration / processes) * collector.group_size
        return share, min(collector.episodes_per_batch or share, share), collector.max_episode_length
    share = math.ceil(collector.prompts_per_iteration / processes)
    at_once = min(collector.generation_prompts or share, share) * collector.group_size
    rows = max(at_once, evaluation_rows(config.evaluation, _held_out(config.prompts)))
    return share * collector.group_size, rows, collector.sampling.max_completion_length


def _held_out(source: Any) -> int | None:
    """Held-out prompts, where their number stands in the settings."""
    if source is None:
        return None
    if source.task is not None:
        return source.task.held_out
    if source.reasoning_gym is not None:
        return source.reasoning_gym.held_out
    return source.held_out_data.limit if source.held_out_data is not None else source.held_out


def evaluation_rows(evaluation: Any, prompts: int | None) -> int:
    """Completions that an evaluation writes at once."""
    counts = [count for count in (evaluation.prompts_per_batch, evaluation.prompts, prompts) if count is not None]
    return min(counts) * max(int(evaluation.greedy), evaluation.samples_per_prompt)


def _update_memory(
    config: Any,
    size: ModelSize,
    *,
    rows: int,
    length: int,
    prompt_length: int | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Memory:
    """What one microbatch takes."""
    row = (prompt_length or 0) + length
    update, minibatches = config.update, config.algorithm.minibatches
    everything = rows * row
    rows = math.ceil(rows / minibatches)
    if getattr(update, "microbatch_rows", None) is not None:
        rows = min(rows, update.microbatch_rows)
    tokens = min(update.microbatch_tokens or rows * row, rows * row)
    low = resolve_precision(config.mixed_precision) == "bf16"
    bodies = 2 if config.algorithm.needs_critic and config.critic.start != "head" else 1
    keeps = getattr(config.collector, "keep_forward", False)
    memory: Memory = {
        "logits of a chunk, forward and backward": 2 * _chunk_bytes(size.vocabulary, min(tokens, rows * length)),
        "activations of a microbatch, about": _activations(
            config.model, tokens=(bodies - keeps) * tokens, length=row, low=low, tokenizer=tokenizer
        ),
    }
    if keeps:  # of one body; in later epochs a microbatch, which is no larger than the rollout, takes its place
        memory["activations of a forward over a rollout, about"] = _activations(
            config.model, tokens=everything, length=row, low=low, tokenizer=tokenizer
        )
    if low:
        memory["weights in bfloat16 for a forward"] = bodies * size.parameters * 2
    return memory


def _activations(
    model: ModelConfig,
    *,
    tokens: int,
    length: int,
    low: bool,
    tokenizer: PreTrainedTokenizerBase | None,
) -> int | None:
    """Bytes of the activations of so many tokens in rows of so many."""
    dtype = torch.bfloat16 if low or model.dtype == "bfloat16" else torch.float32
    row = activation_bytes(model, length=length, dtype=dtype, tokenizer=tokenizer)
    return None if row is None else round(row * tokens / length)


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


def imitation_memory(
    config: Any,
    size: ModelSize,
    *,
    processes: int = 1,
    longest: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Memory:
    """Bytes of one process in supervised fine-tuning.

    Args:
        config: As `sft`'s.
        size: Of the model.
        processes: That share a batch.
        longest: Tokens of the longest demonstration; None takes the longest that is let in.
        tokenizer: Of a fresh model.
    """
    training = config.training
    share = training.batch_size // processes
    length = min(length for length in (training.max_length, size.context, longest) if length is not None)
    tokens = min(training.microbatch_size or share, share) * length
    low = training.precision == "bfloat16" or (training.precision == "auto" and resolve_precision("auto") == "bf16")
    model = config.model
    if training.gradient_checkpointing:
        model = model.model_copy(update={"gradient_checkpointing": True})
    memory: Memory = {
        "weights": size.weight_bytes,
        "gradients": size.trainable_bytes,
        "optimizer": OPTIMIZER_STATES["adamw"] * size.trainable_bytes,
        "logits of a chunk, forward and backward": 2 * min(tokens, TILE[0]) * min(size.vocabulary, TILE[1]) * FLOAT32,
        "activations of a microbatch, about": _activations(
            model, tokens=tokens, length=length, low=low, tokenizer=tokenizer
        ),
    }
    return memory | ({"weights in bfloat16 for a forward": size.parameters * 2} if low else {})


def ranking_memory(
    size: ModelSize,
    config: Any = None,
    *,
    processes: int = 1,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Memory:
    """Bytes of one process that trains a reward model: a head of one output, no logits.

    Args:
        size: Of the base model.
        config: As `reward_model`'s; None leaves the activations out.
        processes: That share a batch.
        tokenizer: Of a fresh model.
    """
    head, adapters = size.hidden * FLOAT32, 0 if size.trainable == size.parameters else size.trainable_bytes
    learned = (adapters or size.body_bytes) + head
    # PEFT keeps a saved-whole layer such as the head twice: as it was, and as it is trained.
    memory: Memory = {
        "weights": size.body_bytes + head + (adapters + head if adapters else 0),
        "gradients": learned,
        "optimizer": OPTIMIZER_STATES["adamw"] * learned,
    }
    if config is None:
        return memory
    training = config.training
    share = training.batch_prompts // processes
    answers = min(training.microbatch_prompts or share, share) * config.num_candidates if config.task is not None else 1
    length, low = training.max_length or size.context, training.precision == "bfloat16"
    name = "activations of a microbatch, about" if config.task is not None else ONE_ANSWER
    if length is not None:
        memory[name] = _activations(config.model, tokens=answers * length, length=length, low=low, tokenizer=tokenizer)
    return memory | ({"weights in bfloat16 for a forward": size.parameters * 2} if low else {})


def answer_memory(size: ModelSize, *, rows: int, length: int, judges: Sequence[Any], engine: bool) -> Memory:
    """Bytes of one process that writes `rows` completions at once and has them judged."""
    return {
        "weights": size.weight_bytes,
        "KV cache": 0 if engine else rows * length * size.cache_bytes,
        "reward models": judge_bytes(judges),
    }


def judge_bytes(rewards: Iterable[Any]) -> int | None:
    """Weights of the reward models that rewards name by `folder` or `folders`; other functions take none here.

    Returns:
        None where a folder does not exist yet, as in a pipeline before its first run.
    """
    total = 0
    for reward in rewards:
        if reward.function.endswith(BORROWS_THE_BACKBONE):
            folder = Path(str(reward.arguments.get("folder", "")))
            total += sum(file.stat().st_size for file in folder.glob("adapter_model.safetensors"))
            continue
        for folder in _folders(reward.arguments):
            if not any((Path(folder) / name).is_file() for name in ("config.json", "adapter_config.json")):
                return None
            size = measure_model(ModelConfig(path=folder, dtype=reward.arguments.get("dtype", "float32")))
            total += size.body_bytes + size.hidden * FLOAT32
    return total


def _folders(arguments: dict[str, Any]) -> list[str]:
    """The folders that a reward's arguments name."""
    named = arguments.get("folders", arguments.get("folder"))
    if named is None:
        return []
    patterns = [named] if isinstance(named, str | Path) else list(named)
    return [path for pattern in patterns for path in (sorted(glob.glob(str(pattern))) or [str(pattern)])]


def as_list(given: Any) -> list[Any]:
    """One reward or several, or none, as a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


def _gold(config: Any) -> Any:
    return getattr(config, "gold", None)


def has_engine(config: Any) -> bool:
    """Whether the completions come from vLLM: their cache is its own then."""
    return isinstance(getattr(config, "generator", None), VllmGeneratorConfig)


def _chunk_bytes(vocabulary: int, positions: int) -> int:
    """Logits are made a chunk at a time, and of no more positions than a microbatch has."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return min(default_chunk_tokens(vocabulary, device), positions) * vocabulary * FLOAT32
