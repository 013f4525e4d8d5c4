"""Which transformer bodies the fused passes know: their structure, part by part.

Structure alone proves nothing (Gemma's norms add one to their weights): a probe must show that a fused pass computes
the body's own numbers, `fused_probe` for decoding and `fused_training_probe` for training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from rlhf.training.linear import FastLinear

_BODY_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class _NotFusibleError(Exception):
    """The body has another structure; it decodes through its own forward."""


def has_fusible_structure(body: Any, *, adapters: bool = False) -> bool:
    """Whether a body has the parts that fused passes know, each of them plain.

    Args:
        body: The body of a causal language model.
        adapters: Whether linear layers may carry LoRA adapters.
    """
    parameter = next(body.parameters(), None)  # an adapter's critic has none of its own
    if parameter is None or parameter.device.type == "meta":
        return False
    try:
        for module in body.modules():
            # Hooks may want to see or change every step; accelerate replaces `forward` to move weights around.
            _require(_runs_its_own_forward(module))
        _require(parts_of(body) == _BODY_PARTS and type(body.embed_tokens) is nn.Embedding)
        _require(type(body.embed_tokens.weight) is nn.Parameter and body.embed_tokens.max_norm is None)
        _require(len(body.layers) == body.config.num_hidden_layers > 0)
        _require_norm(body.norm)
        for index, layer in enumerate(body.layers):
            _require_layer(layer, index, is_map=_is_map_with_adapters if adapters else is_plain_linear)
    except _NotFusibleError:
        return False
    return True


def _is_map_with_adapters(module: Any) -> bool:
    return is_plain_linear(module) or is_plain_lora(module)


def _require_layer(layer: Any, index: int, *, is_map: Callable[[Any], bool]) -> None:
    _require(parts_of(layer) == _LAYER_PARTS and parts_of(layer.mlp) == _MLP_PARTS)
    attention, mlp = layer.self_attn, layer.mlp
    normed = parts_of(attention) == _ATTENTION_PARTS | {"q_norm", "k_norm"}
    _require(normed or parts_of(attention) == _ATTENTION_PARTS)
    for module in (layer, attention, mlp):  # attention sinks and the like
        _require(not module._parameters and not module._buffers)
    head_dim, scaling = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if not isinstance(head_dim, int) or not isinstance(scaling, float) or head_dim % 2 != 0:
        raise _NotFusibleError
    _require(getattr(attention, "layer_idx", None) == index)
    _require_norm(layer.input_layernorm)
    _require_norm(layer.post_attention_layernorm)
    _require_projection(attention.q_proj, attention.k_proj, attention.v_proj, is_map=is_map)
    for modules in ((attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)):
        _require_projection(*modules, is_map=is_map)
    query_heads, key_heads = (module.out_features // head_dim for module in (attention.q_proj, attention.k_proj))
    _require(attention.q_proj.out_features == query_heads * head_dim)
    _require(attention.v_proj.out_features == attention.k_proj.out_features == key_heads * head_dim)
    if normed:
        for norm in (attention.q_norm, attention.k_norm):
            _require_norm(norm)
            _require(norm.weight.shape == (head_dim,))
        _require(norm_epsilon(attention.q_norm) == norm_epsilon(attention.k_norm))


def _require_norm(module: Any) -> None:
    _require(isinstance(norm_epsilon(module), float) and set(module._parameters) == {"weight"} and not parts_of(module))
    _require(type(module.weight) is nn.Parameter)


def _require_projection(*modules: Any, is_map: Callable[[Any], bool]) -> None:
    for module in modules:  # exact types: quantized and parametrized layers are subclasses or others
        _require(is_map(module))
        _require((module.bias is None) == (modules[0].bias is None) and module.weight.dtype == modules[0].weight.dtype)


def is_plain_lora(module: Any) -> bool:
    """Whether a layer is a plain linear one with LoRA adapters that add B A x and nothing else."""
    from peft.tuners.lora import Linear

    if type(module) is not Linear or not is_plain_linear(module.base_layer):
        return False
    active = module.active_adapters
    variants = any(name in module.lora_variant or module.lora_bias.get(name) for name in active)
    return not module.fan_in_fan_out and not variants and all(name in module.lora_A for name in active)


def is_plain_linear(module: Any) -> bool:
    """Whether a layer does nothing but multiply by its matrix and add its bias."""
    known = type(module) in (nn.Linear, FastLinear) and type(module.weight) is nn.Parameter
    return known and _runs_its_own_forward(module)


def _runs_its_own_forward(module: nn.Module) -> bool:
    return not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


def norm_epsilon(module: Any) -> Any:
    """The epsilon of an RMSNorm module, under whichever of its two names."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def parts_of(module: nn.Module) -> set[str]:
    """Names of the modules directly inside."""
    return set(module._modules)


def _require(condition: bool) -> None:
    if not condition:
        raise _NotFusibleError
