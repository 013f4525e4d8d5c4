"""How large a model is, before its weights are loaded: from its config alone, on torch's meta device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from rlhf.errors import ModelError
from rlhf.lm.loading import DTYPES, ModelConfig, add_lora, fresh_config


@dataclass(frozen=True)
class ModelSize:
    """Numbers of one copy of a model; shared weights count once."""

    parameters: int
    trainable: int
    """Those with a gradient: all, or the adapters."""
    weight_bytes: int
    trainable_bytes: int
    body_bytes: int
    """Without an output head of its own: what a critic of this architecture takes."""
    cache_bytes: int
    """Keys and values of one token, all layers."""
    hidden: int
    vocabulary: int
    context: int | None = None
    """Most tokens of a row, where the config tells."""


def measure_model(model: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> ModelSize:
    """Count a model's parameters and bytes without allocating them.

    Args:
        model: A folder or hub id, of which config.json alone is read; or a fresh config.
        tokenizer: Gives a fresh model its vocabulary.

    Raises:
        ModelError: There is no config.json to read, or no such architecture.
        ConfigError: A fresh config with an unknown key.
    """
    config = read_model_config(model, tokenizer)
    dtype = DTYPES[model.dtype]
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        built: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
        built.tie_weights()
        head = built.get_output_embeddings()
        own_head = head is not None and head.weight is not built.get_input_embeddings().weight
        head_bytes = sum(_bytes(parameter) for parameter in head.parameters()) if own_head else 0
        whole_bytes = sum(map(_bytes, built.parameters()))
        saved = _saved_by_quantization(built, model.quantization)
        if model.lora is not None:
            built = add_lora(built, model.lora)
    parameters = list(built.parameters())
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    text = config.get_text_config()
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in learned),
        weight_bytes=sum(map(_bytes, parameters)) - saved,
        trainable_bytes=sum(map(_bytes, learned)),
        body_bytes=whole_bytes - head_bytes,
        cache_bytes=cache_bytes_per_token(text, dtype),
        hidden=int(text.hidden_size),
        vocabulary=int(text.vocab_size),
        context=getattr(text, "max_position_embeddings", None),
    )


def cache_bytes_per_token(config: PretrainedConfig, dtype: torch.dtype) -> int:
    """2 x layers x key-value heads x head width x bytes of a number; windows of local attention are not taken off."""
    layers = int(config.num_hidden_layers)
    if getattr(config, "kv_lora_rank", None):  # multi-head latent attention keeps a latent and a rotated key
        return layers * int(config.kv_lora_rank + config.qk_rope_head_dim) * dtype.itemsize
    heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return 2 * layers * heads * width * dtype.itemsize


def _saved_by_quantization(built: Any, quantization: str | None) -> int:
    """Bytes that quantized linear layers do without; the head stays whole.

    Source: QLoRA, section 3: 4 bits a weight, and 0.127 for its doubly quantized constants.
    """
    if quantization is None:
        return 0
    bits = 4.127 if quantization == "nf4" else 8.0
    head = built.get_output_embeddings()
    linear = [module.weight for module in built.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return sum(_bytes(weight) - round(weight.numel() * bits / 8) for weight in linear)


def read_model_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PretrainedConfig:
    """The transformers config of a model: its config.json, or a fresh one for the tokenizer's vocabulary.

    Raises:
        ModelError: There is no config.json to read, or a fresh model has no tokenizer.
        ConfigError: A fresh config with an unknown key.
    """
    if model.config is None:
        return _read_config(str(model.path))
    if tokenizer is None:
        raise ModelError("the size of a fresh model depends on its tokenizer", where="model.tokenizer")
    return fresh_config(model.config, tokenizer)


def _read_config(path: str) -> PretrainedConfig:
    adapter = Path(path) / "adapter_config.json"
    if adapter.is_file() and not (Path(path) / "config.json").is_file():
        path = str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"])
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "config.json cannot be read", where=path, remedy="Check the path, and the connection for a hub id."
        ) from error


def _bytes(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()
