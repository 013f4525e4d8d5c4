"""A model's weights as a checkpoint would name them, one after the other: what an engine of its own is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import ModelError
from rlhf.lm.adapters import POLICY
from rlhf.lm.backbone import unwrap_adapters
from rlhf.training.optimizer import whole


@torch.no_grad()
def checkpoint_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under the name it has in the model's folder, tied ones once.

    LoRA adapters are added on the way, W + (alpha / rank) B A, into new tensors: the trained weights are not touched,
    where merging and unmerging in place would round them a little every time. Shards (FSDP2) are gathered, so that all
    processes must run through it alike.

    Args:
        model: A causal language model, bare or with LoRA adapters, of which the policy's counts.

    Raises:
        ModelError: Quantized weights, or layers whose names differ between the model and its folder.
    """
    base = unwrap_adapters(model)
    if getattr(base, "is_quantized", False):
        raise ModelError(
            "quantized weights cannot be handed to an engine",
            where="generator",
            remedy="Use generator: {type: transformers}, or model.lora without model.quantization.",
        )
    weights = _own_weights(base)
    _require_names_of_the_folder(base, weights)
    adapted = _adapted_layers(base) if hasattr(model, "peft_config") else {}
    for plain, (name, parameter) in weights.items():
        layer = adapted.get(name.removesuffix(".base_layer.weight")) if name.endswith(".base_layer.weight") else None
        weight = whole(parameter.detach())
        yield plain, weight if layer is None else _with_adapter(weight, layer)


def _own_weights(base: Any) -> dict[str, tuple[str, Tensor]]:
    """Name in the folder -> name in the model and parameter; adapters and the layers they replace are left out."""
    weights = {}
    for name, parameter in base.named_parameters():
        plain, owner = _plain_name(name)
        if owner in (None, POLICY) and ".lora_" not in name and ".original_module." not in name:
            weights[plain] = (name, parameter)
    return weights


def _require_names_of_the_folder(base: Any, weights: dict[str, tuple[str, Tensor]]) -> None:
    """Some models' layers (experts, for instance) are renamed and cut on loading; an engine reads folders."""
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {plain: torch.empty(parameter.shape, device="meta") for plain, (_, parameter) in weights.items()}
    saved = revert_weight_conversion(base, dict(shapes))
    if {name: tensor.shape for name, tensor in saved.items()} != {name: meta.shape for name, meta in shapes.items()}:
        raise ModelError(
            "the layers of this model are named or cut otherwise in its folder, which handing them on does not repeat",
            where="generator",
            got=type(base).__name__,
            expected="a dense model such as Llama, Qwen, Mistral or Gemma",
            remedy="Use generator: {type: transformers}.",
        )


def _plain_name(name: str) -> tuple[str, str | None]:
    """The name without PEFT's wrappers, and whose copy it is where a layer was saved whole.

    >>> _plain_name("model.layers.0.mlp.up_proj.base_layer.weight")
    ('model.layers.0.mlp.up_proj.weight', None)
    >>> _plain_name("lm_head.modules_to_save.default.weight")
    ('lm_head.weight', 'default')
    """
    before, wrapper, after = name.partition(".modules_to_save.")
    owner = None
    if wrapper:
        owner, _, after = after.partition(".")
        name = f"{before}.{after}"
    return name.replace(".base_layer.", "."), owner


def _adapted_layers(base: Any) -> dict[str, Any]:
    """Name -> layer that carries the policy's adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer) and POLICY in getattr(module, "lora_A", {})
    }


def _with_adapter(weight: Tensor, layer: Any) -> Tensor:
    return weight + whole(layer.get_delta_weight(POLICY)).to(weight.dtype)
