"""One decode step of a Llama-like body without the cost of its modules.

On small models most of a decode step is not arithmetic: each layer is a dozen module calls, RMSNorm is six
operations, rotary embedding eight, and each projection its own product. `FusedStep` computes the same with the
model's own weights in about half the operations: queries, keys and values in one product, gate and up in one,
residuals added by the product that makes them.

It serves bodies of pre-norm RMSNorm, rotary attention (grouped or not, with or without biases and query/key norms) and
a gated MLP: Llama, Qwen2, Qwen3, Mistral without a window. No name decides that: the parts are found by structure,
each module must be plain (no adapter, quantization, hook or patched forward), and a probe must show the hidden states
of the model's own forward. Any other model decodes through its own forward: the same tokens, only slower.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from rlhf.lm.cache import InPlaceCache
from rlhf.lm.shared_prompt import attend
from rlhf.training.linear import FastLinear, linear, linear_onto

MERGE_LIMIT = 2**22
"""Elements up to which matrices are merged. Beyond, the product itself takes the time and the copy too much memory."""

_BODY_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}
_LAYER_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class _NotFusibleError(Exception):
    """The body has another structure; it decodes through its own forward."""


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    epsilon: float

    def __call__(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class _Projection:
    """One or several linear maps of the same input, their outputs side by side."""

    matrices: list[tuple[Tensor, Tensor | None]]

    def __call__(self, hidden: Tensor) -> Tensor:
        if len(self.matrices) == 1:
            return linear(hidden, *self.matrices[0])
        return torch.cat([linear(hidden, weight, bias) for weight, bias in self.matrices], dim=-1)

    def add_to(self, residual: Tensor, hidden: Tensor) -> Tensor:
        """Residual [n, H] + map of hidden [n, I]; only for a single map."""
        return linear_onto(residual, hidden, *self.matrices[0])


@dataclass(frozen=True)
class _NormedProjection:
    """A norm and the map of what it returns.

    With the norm's weight in the matrix, RMSNorm is a division by a length:
    x / sqrt(mean(x^2) + epsilon) = sqrt(H) x / hypot(|x|, sqrt(H epsilon)), and sqrt(H) is in the matrix too.
    """

    norm: _Norm
    projection: _Projection
    floor: Tensor | None
    """sqrt(H epsilon) where the norm's weight is part of the matrix, else None."""

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.floor is None:
            return self.projection(self.norm(hidden))
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        return self.projection(hidden / torch.hypot(length, self.floor))


@dataclass(frozen=True)
class _Layer:
    """What one layer's step reads."""

    qkv: _NormedProjection
    query_key_norm: _Norm | None
    """Weight [Hq + H, D]: that of the query heads, then that of the key heads."""
    output: _Projection
    gate_up: _NormedProjection
    activation: nn.Module
    down: _Projection
    query_heads: int
    key_heads: int
    head_dim: int
    scaling: float


class FusedStep:
    """Decode steps with the weights a body has now; make a new one whenever they may have changed.

    Args:
        body: See `read_fused_step`, which makes the object.
        layers: The parts of its layers.
    """

    def __init__(self, body: Any, layers: list[_Layer]) -> None:
        self.embedding: Tensor = body.embed_tokens.weight
        self.rotary, self.norm, self.layers = body.rotary_emb, _read_norm(body.norm), layers
        half = layers[0].head_dim // 2
        self.signs = torch.ones(2 * half, dtype=self.embedding.dtype, device=self.embedding.device)
        self.signs[:half] = -1.0

    def __call__(self, tokens: Tensor, positions: Tensor, *, cache: InPlaceCache, mask: Tensor | None) -> Tensor:
        """Feed one token per row and write its keys and values into the cache.

        Args:
            tokens: [n] int64.
            positions: [n, 1] of the tokens.
            cache: After `start_decoding`, its prompts shared or repeated.
            mask: [n, 1, 1, columns] added to the scores where prompts are repeated; None without padding.

        Returns:
            Hidden states [n, H] for the head.
        """
        hidden = nn.functional.embedding(tokens, self.embedding)
        # The model's own module each step, not a table: dynamic rotary types depend on the batch's greatest position.
        cosines, sines = self.rotary(hidden[:, None], position_ids=positions)  # [n, 1, D]
        sines = sines * self.signs
        for index, layer in enumerate(self.layers):
            heads = _project_heads(layer, hidden, cosines, sines)
            keys_values = heads[:, layer.query_heads :].unflatten(1, (2, layer.key_heads))
            own = cache.append(keys_values, index)
            attended = _attend(layer, heads[:, : layer.query_heads], own, cache=cache, mask=mask)
            hidden = layer.output.add_to(hidden, attended)
            gate, up = layer.gate_up(hidden).chunk(2, dim=-1)
            hidden = layer.down.add_to(hidden, layer.activation(gate).mul_(up))
        return self.norm(hidden)


def _project_heads(layer: _Layer, hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotated queries and keys, then values, [n, Hq + H + H, D], of hidden states [n, H].

    Rotary embedding is x * cos + (-second half, first half) * sin; a roll swaps the halves, the sign is in `sines`.
    """
    heads = layer.qkv(hidden).view(len(hidden), -1, layer.head_dim)
    turned = heads[:, : -layer.key_heads]
    if layer.query_key_norm is not None:
        normed = rms_norm(turned, (layer.head_dim,), None, layer.query_key_norm.epsilon)
        torch.mul(normed, layer.query_key_norm.weight, out=turned)
    swapped = turned.roll(layer.head_dim // 2, dims=-1)
    turned.mul_(cosines).addcmul_(swapped, sines)
    return heads


def _attend(
    layer: _Layer, queries: Tensor, own: tuple[Tensor, Tensor], *, cache: InPlaceCache, mask: Tensor | None
) -> Tensor:
    """Attention [n, Hq * D] of queries [n, Hq, D] to the keys and values of the cache."""
    keys, values = own
    rows = len(queries)
    if cache.groups is not None:
        stored = cache.last_updated
        assert stored.prompt_keys is not None
        assert stored.prompt_values is not None
        attended = attend(
            queries[:, :, None],
            keys,
            values,
            prompt_keys=stored.prompt_keys,
            prompt_values=stored.prompt_values,
            prompt_bias=cache.prompt_bias,
            groups=cache.groups,
            scaling=layer.scaling,
        )
        return attended.view(rows, -1)
    # Queries of one key head side by side; faster than scaled_dot_product_attention for one token on a CPU.
    queries = queries.reshape(rows * layer.key_heads, -1, layer.head_dim) * layer.scaling
    scores = torch.bmm(queries, keys.flatten(0, 1).transpose(1, 2))
    if mask is not None:
        scores.view(rows, layer.key_heads, -1, scores.shape[-1]).add_(mask)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return torch.bmm(weights.to(values.dtype), values.flatten(0, 1)).view(rows, -1)


def read_fused_step(body: Any) -> FusedStep | None:
    """A `FusedStep` with the weights `body` has now, or None where its structure is another.

    Structure alone proves nothing (Gemma's norms add one to their weights): ask
    `fused_probe.fusing_is_exact` once before.
    """
    if not has_fusible_structure(body):
        return None
    return FusedStep(body, [_read_layer(layer) for layer in body.layers])


def has_fusible_structure(body: Any) -> bool:
    """Whether a body has the parts that fused passes know, each of them plain."""
    parameter = next(body.parameters(), None)  # an adapter's critic has none of its own
    if parameter is None or parameter.device.type == "meta" or torch.is_autocast_enabled(parameter.device.type):
        return False
    try:
        for module in body.modules():
            # Hooks may want to see or change every step; accelerate replaces `forward` to move weights around.
            _require(not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module))
        _require(_parts(body) == _BODY_PARTS and type(body.embed_tokens) is nn.Embedding)
        _require(type(body.embed_tokens.weight) is nn.Parameter and body.embed_tokens.max_norm is None)
        _require(len(body.layers) == body.config.num_hidden_layers > 0)
        _require_norm(body.norm)
        for index, layer in enumerate(body.layers):
            _require_layer(layer, index)
    except _NotFusibleError:
        return False
    return True


def _require_layer(layer: Any, index: int) -> None:
    _require(_parts(layer) == _LAYER_PARTS and _parts(layer.mlp) == _MLP_PARTS)
    attention, mlp = layer.self_attn, layer.mlp
    normed = _parts(attention) == _ATTENTION_PARTS | {"q_norm", "k_norm"}
    _require(normed or _parts(attention) == _ATTENTION_PARTS)
    for module in (layer, attention, mlp):  # attention sinks and the like
        _require(not module._parameters and not module._buffers)
    head_dim, scaling = getattr(attention, "head_dim", None), getattr(attention, "scaling", None)
    if not isinstance(head_dim, int) or not isinstance(scaling, float) or head_dim % 2 != 0:
        raise _NotFusibleError
    _require(getattr(attention, "layer_idx", None) == index)
    _require_norm(layer.input_layernorm)
    _require_norm(layer.post_attention_layernorm)
    _require_projection(attention.q_proj, attention.k_proj, attention.v_proj)
    for modules in ((attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)):
        _require_projection(*modules)
    query_heads, key_heads = (module.out_features // head_dim for module in (attention.q_proj, attention.k_proj))
    _require(attention.q_proj.out_features == query_heads * head_dim)
    _require(attention.v_proj.out_features == attention.k_proj.out_features == key_heads * head_dim)
    if normed:
        for norm in (attention.q_norm, attention.k_norm):
            _require_norm(norm)
            _require(norm.weight.shape == (head_dim,))
        _require(norm_epsilon(attention.q_norm) == norm_epsilon(attention.k_norm))


def _require_norm(module: Any) -> None:
    _require(isinstance(norm_epsilon(module), float) and set(module._parameters) == {"weight"} and not _parts(module))
    _require(type(module.weight) is nn.Parameter)


def _require_projection(*modules: Any) -> None:
    for module in modules:  # exact types: adapters, quantized and parametrized layers are subclasses or others
        _require(type(module) in (nn.Linear, FastLinear) and type(module.weight) is nn.Parameter)
        _require((module.bias is None) == (modules[0].bias is None) and module.weight.dtype == modules[0].weight.dtype)


def norm_epsilon(module: Any) -> Any:
    """The epsilon of an RMSNorm module, under whichever of its two names."""
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _read_layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    query_heads, key_heads = (
        module.out_features // attention.head_dim for module in (attention.q_proj, attention.k_proj)
    )
    return _Layer(
        qkv=_read_normed(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj),
        query_key_norm=_read_head_norms(attention, query_heads, key_heads) if "q_norm" in _parts(attention) else None,
        output=_read_projection(attention.o_proj),
        gate_up=_read_normed(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj),
        activation=mlp.act_fn,
        down=_read_projection(mlp.down_proj),
        query_heads=query_heads,
        key_heads=key_heads,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
    )


def _read_norm(module: Any) -> _Norm:
    return _Norm(weight=module.weight.detach(), epsilon=norm_epsilon(module))


def _read_head_norms(attention: Any, query_heads: int, key_heads: int) -> _Norm:
    """The query and the key norm as one; both are over the head's width, not over all heads together."""
    norms = (_read_norm(attention.q_norm), _read_norm(attention.k_norm))
    weights = [norm.weight.expand(heads, -1) for norm, heads in zip(norms, (query_heads, key_heads), strict=True)]
    return _Norm(weight=torch.cat(weights), epsilon=norms[0].epsilon)


def _read_projection(*modules: Any) -> _Projection:
    matrices = [(module.weight.detach(), module.bias) for module in modules]
    if len(modules) == 1 or sum(weight.numel() for weight, _ in matrices) > MERGE_LIMIT:
        return _Projection(matrices)
    weight = torch.cat([weight for weight, _ in matrices])
    bias = None if modules[0].bias is None else torch.cat([bias for _, bias in matrices])
    return _Projection([(weight, bias)])


def _read_normed(norm_module: Any, *modules: Any) -> _NormedProjection:
    norm, projection = _read_norm(norm_module), _read_projection(*modules)
    weight, bias = projection.matrices[0]
    # Only a merged matrix is ours to change; in 16 bits, the product of two weights would be rounded once more.
    if len(projection.matrices) > 1 or weight.dtype not in (torch.float32, torch.float64):
        return _NormedProjection(norm, projection, None)
    width = weight.shape[1]
    folded = _Projection([(weight * (norm.weight * width**0.5), bias)])
    return _NormedProjection(norm, folded, weight.new_tensor((width * norm.epsilon) ** 0.5))


def _parts(module: nn.Module) -> set[str]:
    return set(module._modules)


def _require(condition: bool) -> None:
    if not condition:
        raise _NotFusibleError
