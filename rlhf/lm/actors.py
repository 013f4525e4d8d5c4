"""The cast of a reinforcement-learning run: policy, critic, generator and frozen reference, made from settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.core.algorithm import AlgorithmConfig
from rlhf.data.tokenization import end_token_ids, require_special_tokens
from rlhf.errors import ConfigError
from rlhf.lm.backbone import unwrap_adapters
from rlhf.lm.collector_config import CollectorConfig
from rlhf.lm.critic import make_critic
from rlhf.lm.generation import Generator, TransformersGenerator
from rlhf.lm.generator_config import GeneratorConfig, TransformersGeneratorConfig, VllmGeneratorConfig
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm, load_tokenizer
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.reference import FrozenReference
from rlhf.lm.sft import SftConfig, train_sft
from rlhf.lm.sources import SourceConfig, load_demonstration_sets
from rlhf.rewards.combination import CombinedReward
from rlhf.training.distributed import make_accelerator, on_main_process_first_failing
from rlhf.training.run import Run
from rlhf.training.sharding import whole_parameters


@dataclass(frozen=True)
class Actors:
    """Who takes part; all share one device."""

    policy: LanguageModelPolicy
    tokenizer: PreTrainedTokenizerBase
    generator: Generator
    reference: FrozenReference | None
    """None where the algorithm needs none."""

    def save(self, folder: str | Path, accelerator: Accelerator) -> None:
        """Write the policy as an ordinary model folder, on the main process."""
        with whole_parameters(self.policy):
            on_main_process_first_failing(accelerator, lambda: self.policy.save(folder, tokenizer=self.tokenizer))
        accelerator.wait_for_everyone()


def make_actors(
    model: ModelConfig,
    algorithm: AlgorithmConfig,
    *,
    temperature: float,
    critic: str = "head",
    tokenizer: PreTrainedTokenizerBase | None = None,
    keep_reference: bool = False,
    generator: GeneratorConfig | None = None,
    accelerator: Accelerator,
    seed: int = 0,
) -> Actors:
    """Load the policy and what the algorithm needs beside it.

    Args:
        model: The policy's model.
        algorithm: Decides whether there is a critic and a reference.
        temperature: At which completions are drawn and scored.
        critic: Where it starts, as in `CriticConfig`. Not read where the algorithm needs no critic.
        tokenizer: None loads the model's own.
        keep_reference: Measure the KL to the start also where the algorithm does not use it.
        generator: What writes the completions; None is the model itself.
        accelerator: Whose device is used.
        seed: Of an engine's own stream.

    Raises:
        ModelError: Something cannot be loaded or lacks a pad or end token.
        ConfigError: The generator is not installed.
    """
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
    require_special_tokens(tokenizer)
    language_model: Any = load_causal_lm(model, tokenizer)
    critic_model: Any = "none"
    if algorithm.needs_critic:
        critic_model = make_critic(critic, policy_model=language_model, model=model, tokenizer=tokenizer)
    policy = LanguageModelPolicy(language_model, critic=critic_model, temperature=temperature).to(accelerator.device)
    for module in policy.modules():
        # The policy keeps its models in eval mode anyway; the learner asks for the probabilities themselves.
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # FSDP2 shards layer by layer and asks the module it is given, the policy, for the layers' class.
    policy._no_split_modules = list(unwrap_adapters(language_model)._no_split_modules or [])
    writer = make_generator(language_model, tokenizer, config=generator, accelerator=accelerator, seed=seed)
    # Made before the first update: it is the policy as it is now.
    needs_reference = algorithm.needs_reference or keep_reference
    reference = FrozenReference(policy).to(accelerator.device) if needs_reference else None
    return Actors(policy=policy, tokenizer=tokenizer, generator=writer, reference=reference)


def share_backbone(reward: Any, policy: LanguageModelPolicy) -> None:
    """Let rewards that are adapters on the policy's backbone have it.

    Args:
        reward: A reward function, or a combination whose `parts` hold some. One that offers `attach(model)` gets the
            policy's model.
        policy: The policy.

    Raises:
        ModelError: The adapter does not fit the policy's model.
    """
    functions = [part.reward for part in reward.parts] if isinstance(reward, CombinedReward) else [reward]
    for function in functions:
        if hasattr(function, "attach"):
            function.attach(policy.model)  # pyright: ignore[reportAttributeAccessIssue, reportFunctionMemberAccess]


def make_generator(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: GeneratorConfig | None = None,
    accelerator: Accelerator | None = None,
    seed: int = 0,
) -> Generator:
    """A generator that stops at the tokenizer's end tokens.

    Args:
        model: A causal language model, bare or with adapters, on its device.
        tokenizer: The model's.
        config: What writes; None is the model itself.
        accelerator: Whose mixed precision the model writes in, and whose processes take part in starting an engine;
            None computes in the weights' precision, and makes one for an engine.
        seed: Of an engine's own stream.

    Raises:
        ModelError: The tokenizer lacks a pad or an end token, or an engine does not start.
        ConfigError: vLLM is asked for and not installed.
    """
    require_special_tokens(tokenizer)
    assert tokenizer.pad_token_id is not None
    ends, pad = end_token_ids(tokenizer), int(tokenizer.pad_token_id)
    if isinstance(config, VllmGeneratorConfig):
        from rlhf.lm.vllm_generator import make_vllm_generator

        accelerator = accelerator if accelerator is not None else make_accelerator()
        return make_vllm_generator(
            config, model, end_token_ids=ends, pad_token_id=pad, accelerator=accelerator, seed=seed
        )
    config = config or TransformersGeneratorConfig()
    mixed = accelerator is not None and accelerator.mixed_precision == "bf16"
    return TransformersGenerator(
        model,
        end_token_ids=ends,
        pad_token_id=pad,
        backend=config.backend,
        dtype=torch.bfloat16 if mixed else None,
        cuda_graphs=config.cuda_graphs,
    )


def pick_tokenizer(model: ModelConfig, source: SourceConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for a fresh model and a procedural task, one token per character of the task."""
    task = source.make_task()
    fresh = model.config is not None and model.tokenizer is None
    return character_tokenizer(task.alphabet) if task is not None and fresh else load_tokenizer(model)


def prepare_start(
    model: ModelConfig, source: SourceConfig, *, sft: SftConfig | None, folder: Path, run: Run, accelerator: Accelerator
) -> tuple[ModelConfig, PreTrainedTokenizerBase]:
    """The model a run starts from, and its tokenizer.

    With `sft` the model is first fine-tuned on the source's demonstrations and written to `folder`, from where it is
    loaded again. A resumed run finds it there. A fresh model for a procedural task gets a character tokenizer.

    Args:
        model: As configured.
        source: Its task gives the alphabet, its demonstrations the fine-tuning.
        sft: None starts from the model as it is.
        folder: Where the fine-tuned model goes.
        run: Its seed is the fine-tuning's, its console gets a word about it.
        accelerator: Whose processes take part.

    Returns:
        Model settings whose `path` is the fine-tuned folder where there was fine-tuning, and the tokenizer.
    """
    tokenizer = pick_tokenizer(model, source)
    if sft is None:
        return model, tokenizer
    if not run.finds_model(folder):
        demonstrations, held_out = load_demonstration_sets(source)
        untrained = load_causal_lm(model.model_copy(update={"lora": None}), tokenizer)
        seed = run.config.seed
        metrics = train_sft(
            untrained, tokenizer, demonstrations, config=sft, folder=folder, held_out=held_out, seed=seed
        )
        told = ", ".join(f"{name} {metrics[name]:.4g}" for name in ("steps", "loss", "evaluation_loss", "seconds"))
        run.say(f"fine-tuned on {len(demonstrations)} demonstrations: {told}")
    accelerator.wait_for_everyone()
    return model.model_copy(update={"path": str(folder), "config": None, "tokenizer": None}), tokenizer


def require_groups(algorithm: AlgorithmConfig, collector: CollectorConfig) -> None:
    """Refuse a group algorithm without groups, before anything is loaded.

    Raises:
        ConfigError: The algorithm compares completions of one prompt, and there is one only.
    """
    if algorithm.needs_groups and collector.group_size < 2:
        raise ConfigError(
            f"{algorithm.advantages.type} compares the completions of a prompt, and there is only one",
            where="collector.group_size",
            got=collector.group_size,
            expected="2 or more; 8 is usual",
        )
