"""The critic of a language model's policy: where it starts from, and how long it learns alone before the policy moves.

A critic on the policy's trunk is cheap, but its gradients move the policy, hence a small value coefficient; one of its
own keeps the two apart and costs its weights, or, under LoRA, an adapter. Started from the reward model it predicts
the reward at once (InstructGPT, https://arxiv.org/abs/2203.02155, appendix C.4); started at zero it must be warmed up,
or the first advantages are the rewards themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf.config import Config
from rlhf.errors import ModelError
from rlhf.lm.adapters import AdapterCritic, add_critic_adapter
from rlhf.lm.loading import ModelConfig, load_causal_lm

SCORING_SETTINGS = "reward_model"
"""Entry of a reward model's config with its normalisation."""
ADAPTED_CONFIG = "reward_model_config.json"
"""That config, in a folder of adapters."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"


class CriticConfig(Config):
    """The critic; not read where the algorithm trains none."""

    start: str = "head"
    """`head` on the policy's hidden states, `copy` of the policy, `adapter` (a second LoRA adapter on the policy's
    backbone), or the folder of a reward model, of its adapter, or of a language model to start from."""
    warmup_iterations: int = Field(0, ge=0)
    """First iterations in which only the critic learns: what it says of the first advantages then has some truth."""

    @model_validator(mode="before")
    @classmethod
    def _accept_a_word(cls, value: Any) -> Any:
        """`critic: head`, and `critic: head` with `critic.warmup_iterations=5` on the command line."""
        if isinstance(value, str):
            return {"start": value}
        if isinstance(value, Mapping) and "preset" in value:
            return {"start": value["preset"], **{key: item for key, item in value.items() if key != "preset"}}
        return value


def make_critic(start: str, *, policy_model: Any, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    """What `LanguageModelPolicy` takes as its critic.

    Args:
        start: As in `CriticConfig`.
        policy_model: The policy's model; an adapter goes onto it.
        model: How the policy's model was loaded.
        tokenizer: The policy's.

    Raises:
        ModelError: There is no such folder, or the adapter does not fit.
    """
    path = Path(start)
    if start == "head":
        return "head"
    if start == "copy":
        return load_causal_lm(model.model_copy(update={"lora": None}), tokenizer)
    if start == "adapter":
        add_critic_adapter(policy_model)
        return AdapterCritic(policy_model)
    if _is_reward_adapter(path):
        return _critic_from_adapter(path, policy_model)
    if not (path / "config.json").is_file():
        raise ModelError(
            "no such critic",
            where=start,
            expected="head, copy, adapter, or the folder of a reward model, its adapter, or a language model",
        )
    architectures = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    if architectures[0].endswith("ForSequenceClassification"):
        return _open_reward_model(path)
    return load_causal_lm(ModelConfig(path=start, dtype=model.dtype), tokenizer)


def _open_reward_model(path: Path) -> Any:
    classifier: Any = AutoModelForSequenceClassification.from_pretrained(
        path, use_safetensors=True, trust_remote_code=False
    )
    settings = getattr(classifier.config, SCORING_SETTINGS, None) or {}
    if isinstance(classifier.score, nn.Linear) and classifier.score.out_features == 1:  # else the policy refuses it
        classifier.score = normalized_head(classifier.score.weight, settings).to(classifier.device)
    return classifier


def normalized_head(weight: Tensor, settings: Mapping[str, Any]) -> nn.Linear:
    """A value head that says what the reward function says: (w h - mean) / std, as a linear layer with a bias.

    Args:
        weight: [1, H] of the reward model's head.
        settings: Its "mean" and "std", where it is normalised.

    >>> head = normalized_head(torch.tensor([[4.0]]), {"mean": 1.0, "std": 2.0})
    >>> head(torch.tensor([[3.0]])).item()  # (12 - 1) / 2
    5.5
    """
    mean, std = float(settings.get("mean", 0.0)), float(settings.get("std", 1.0))
    head = nn.Linear(weight.shape[1], 1)
    with torch.no_grad():
        head.weight.copy_(weight.detach().float() / std)
        head.bias.fill_(-mean / std)
    return head


def _is_reward_adapter(path: Path) -> bool:
    file = path / "adapter_config.json"
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"


def read_reward_adapter(folder: str | Path) -> tuple[Any, dict[str, Tensor], Tensor, dict[str, Any]]:
    """A reward model's adapter folder: its LoraConfig, its weights, its head's weight [1, H], its settings.

    Raises:
        ModelError: The folder holds no adapter of a reward model.
    """
    from peft import PeftConfig

    folder = Path(folder)
    if not _is_reward_adapter(folder) or not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            "no adapter of a reward model",
            where=str(folder),
            expected="adapter_config.json of task type SEQ_CLS, and " + ADAPTER_WEIGHTS,
            remedy="Train the reward model with model.lora and keep its adapters apart when saving.",
        )
    weights = load_file(folder / ADAPTER_WEIGHTS)
    heads = [tensor for name, tensor in weights.items() if name.endswith("score.weight")]
    if len(heads) != 1:
        raise ModelError("the reward model's adapter lacks its head", where=str(folder), got=f"{len(heads)} heads")
    file = folder / ADAPTED_CONFIG
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return PeftConfig.from_pretrained(str(folder)), weights, heads[0], config.get(SCORING_SETTINGS) or {}


def _critic_from_adapter(path: Path, policy_model: Any) -> AdapterCritic:
    lora, weights, head, settings = read_reward_adapter(path)
    add_critic_adapter(policy_model, settings=lora, weights=weights)
    return AdapterCritic(policy_model, head=normalized_head(head, settings))
