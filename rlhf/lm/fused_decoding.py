"""One decode step of a Llama-like body without the cost of its modules.

On small models most of a decode step is not arithmetic: each layer is a dozen module calls, RMSNorm is six
operations, rotary embedding eight, and each projection its own product. `FusedStep` computes the same with the
model's own weights in about half the operations: queries, keys and values in one product, gate and up in one,
residuals added by the product that makes them.

It serves bodies of pre-norm RMSNorm, rotary attention (grouped or not, with or without biases and query/key norms) and
a gated MLP: Llama, Qwen2, Qwen3, Mistral without a window, with LoRA adapters or without. No name decides that: the
parts are found by structure, each module must be plain (no quantization, hook or patched forward), and a probe must
show the hidden states of the model's own forward. Any other model decodes through its own forward: the same tokens,
only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from rlhf.lm.backbone import LogitsHead
from rlhf.lm.cache import InPlaceCache
from rlhf.lm.decode_products import match_keys, wants_keys_across, weigh_values
from rlhf.lm.fusible_structure import has_fusible_structure, is_plain_linear, norm_epsilon, parts_of
from rlhf.lm.rotary import HalvedRotation, PairedRotation, paired_components, paired_rows
from rlhf.lm.shared_prompt import attend
from rlhf.training.linear import linear, linear_onto, pack

STATIC_ROTARY = {"default", "linear", "llama3", "yarn"}
"""Rotary types whose angles depend on the position alone; others look at the batch's greatest position."""
FULL_PRECISION = (torch.float32, torch.float64)
MERGE_LIMITS = {"cpu": 2**22, "cuda": 2**24}
"""Elements up to which matrices are merged, and packed on a CPU. Beyond, a copy takes too much memory."""


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    epsilon: float

    def __call__(self, hidden: Tensor) -> Tensor:
        return rms_norm(hidden, self.weight.shape, self.weight, self.epsilon)


@dataclass(frozen=True)
class _Length:
    """RMSNorm as a division by a length: half the operations of torch's own on a CPU.

    x / sqrt(mean(x^2) + epsilon) = sqrt(H) x / hypot(|x|, sqrt(H epsilon)), times the norm's weight.
    """

    floor: Tensor
    """sqrt(H epsilon)."""
    weight: Tensor | None = None
    """The norm's weight times sqrt(H); None where both are in the matrix that follows."""

    def __call__(self, hidden: Tensor) -> Tensor:
        divided = hidden / torch.hypot(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True), self.floor)
        return divided if self.weight is None else divided.mul_(self.weight)


@dataclass(frozen=True)
class _Map:
    """A linear layer as it computes now."""

    weight: Tensor
    bias: Tensor | None
    adapters: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """(A [r, I], scaled B [O, r]) of each LoRA adapter that is not part of `weight`."""
    packed: Tensor | None = None
    """The weight as a CPU multiplies by it fastest."""

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._adapt(linear(hidden, self.weight, self.bias, packed=self.packed), hidden)

    def add_to(self, residual: Tensor, hidden: Tensor) -> Tensor:
        if hidden.dtype is not residual.dtype:
            return residual + self(hidden)
        return self._adapt(linear_onto(residual, hidden, self.weight, self.bias, packed=self.packed), hidden)

    def pack(self) -> _Map:
        """The same with its weight packed, where that is worth a copy."""
        small = self.weight.numel() <= MERGE_LIMITS.get(self.weight.device.type, 0)
        return replace(self, packed=pack(self.weight)) if small else self

    def _adapt(self, output: Tensor, hidden: Tensor) -> Tensor:
        for down, up in self.adapters:
            output = output + linear(linear(hidden.to(down.dtype), down), up)
        return output.to(hidden.dtype) if self.adapters else output


@dataclass(frozen=True)
class _Projection:
    """One or several linear maps of the same input, their outputs side by side, in the precision of the matrices."""

    maps: list[_Map]

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = self._round(hidden)
        if len(self.maps) == 1:
            return self.maps[0](hidden)
        return torch.cat([one(hidden) for one in self.maps], dim=-1)

    def add_to(self, residual: Tensor, hidden: Tensor) -> Tensor:
        """Residual [n, H] + map of hidden [n, I], in the residual's precision; only for a single map."""
        return self.maps[0].add_to(residual, self._round(hidden))

    def pack(self) -> _Projection:
        """The same with packed weights."""
        return _Projection([one.pack() for one in self.maps])

    def _round(self, hidden: Tensor) -> Tensor:
        dtype = self.maps[0].weight.dtype
        return hidden if hidden.dtype is dtype else hidden.to(dtype)


@dataclass(frozen=True)
class _NormedProjection:
    """A norm and the map of what it returns."""

    norm: _Norm
    projection: _Projection
    length: _Length | None
    """What is left of the norm where its weight is in the matrix, else None."""

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.projection(self.norm(hidden) if self.length is None else self.length(hidden))


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
        dtype: See there.
        positions: Positions below this are looked up in a table, where the rotary type allows one.
    """

    def __init__(self, body: Any, *, dtype: torch.dtype | None = None, positions: int = 0) -> None:
        self.embedding: Tensor = body.embed_tokens.weight
        self.rotary, self.norm = body.rotary_emb, _read_last_norm(body.norm)
        self.dtype = dtype
        has_table = positions > 0 and getattr(self.rotary, "rope_type", None) in STATIC_ROTARY
        self.paired = has_table and dtype is None and _can_pair(body.layers)
        self.layers = [_read_layer(layer, dtype, paired=self.paired) for layer in body.layers]
        places = torch.arange(positions, device=self.embedding.device)
        self.table = self._rotate(places[:, None]) if has_table else None

    def take_over(self, cache: InPlaceCache) -> None:
        """Bring the prompts that the body's own forward wrote into the precision and order of these steps."""
        if self.dtype is not None:
            cache.round_to(self.dtype)
        if self.paired:
            cache.order_keys(paired_components(self.layers[0].head_dim).to(self.embedding.device))

    @property
    def wants_keys_across(self) -> bool:
        """How the cache should store keys: see `InPlaceLayer.start_decoding`."""
        layer = self.layers[0]
        dtype = layer.qkv.projection.maps[0].weight.dtype
        return layer.query_heads == layer.key_heads and wants_keys_across(self.embedding.device, dtype)

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
        rotation = self._rotate(positions) if self.table is None else self.table.at(positions.squeeze(1))
        for index, layer in enumerate(self.layers):
            heads = _project_heads(layer, hidden, rotation)
            keys_values = heads[:, layer.query_heads :].unflatten(1, (2, layer.key_heads))
            own = cache.append(keys_values, index)
            attended = _attend(layer, heads[:, : layer.query_heads], own, cache=cache, mask=mask)
            hidden = layer.output.add_to(hidden, attended)
            gate, up = layer.gate_up(hidden).chunk(2, dim=-1)
            hidden = layer.down.add_to(hidden, layer.activation(gate).mul_(up))
        return self.norm(hidden)

    def _rotate(self, positions: Tensor) -> PairedRotation | HalvedRotation:
        """Rotary embedding of positions [n, 1], by the model's own module."""
        cosines, sines = self.rotary(self.embedding, position_ids=positions)  # [n, 1, D]
        kind, layer = PairedRotation if self.paired else HalvedRotation, self.layers[0]
        return kind.of(cosines[:, 0], sines[:, 0], heads=layer.query_heads + layer.key_heads)


def _project_heads(layer: _Layer, hidden: Tensor, rotation: PairedRotation | HalvedRotation) -> Tensor:
    """Rotated queries and keys, then values, [n, Hq + H + H, D], of hidden states [n, H]."""
    products = layer.qkv(hidden)
    heads = products.view(len(hidden), -1, layer.head_dim)
    if layer.query_key_norm is not None:
        turned = heads[:, : -layer.key_heads]
        normed = rms_norm(turned, (layer.head_dim,), None, layer.query_key_norm.epsilon)
        torch.mul(normed, layer.query_key_norm.weight, out=turned)
    rotation.turn_(products)
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
    if queries.device.type == "cuda":
        grouped = queries.reshape(rows, layer.key_heads, -1, layer.head_dim)
        bias = None if mask is None else mask.expand(*grouped.shape[:3], -1)
        attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=bias, scale=layer.scaling)
        return attended.reshape(rows, -1)
    # Queries of one key head side by side; faster than scaled_dot_product_attention for one token on a CPU.
    queries = (queries * layer.scaling).view(rows * layer.key_heads, -1, layer.head_dim)
    scores = match_keys(queries, keys)
    if mask is not None:
        scores.view(rows, layer.key_heads, -1, scores.shape[-1]).add_(mask)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weigh_values(weights.to(values.dtype), values).view(rows, -1)


def read_fused_step(body: Any, *, dtype: torch.dtype | None = None, positions: int = 0) -> FusedStep | None:
    """A `FusedStep` with the weights `body` has now, or None where its structure is another.

    Structure alone proves nothing (Gemma's norms add one to their weights): ask
    `fused_probe.fusing_is_exact` once before.

    Args:
        body: The body of a causal language model.
        dtype: Precision of products and attention, as under autocast; norms and residuals keep the weights'. None
            computes everything in the weights' precision.
        positions: See `FusedStep`.
    """
    if not has_fusible_structure(body, adapters=True):
        return None
    return FusedStep(body, dtype=dtype, positions=positions)


def read_head(head: LogitsHead, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """The head with its matrix in the precision of products; as it is where it is no plain linear layer."""
    if not is_plain_linear(head.module):
        return head
    projection = _Projection([_read_map(head.module, dtype, merge=True).pack()])
    return lambda hidden: head.adjust(projection(hidden))


def _can_pair(layers: Any) -> bool:
    """Whether heads may be paired: their matrices are copied anyway, and this was measured on CPUs."""
    weight = layers[0].self_attn.q_proj.weight
    if weight.device.type != "cpu" or weight.dtype not in FULL_PRECISION:
        return False
    return all("q_norm" not in parts_of(layer.self_attn) and _are_small(_projections(layer)) for layer in layers)


def _projections(layer: Any) -> list[Any]:
    return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]


def _read_layer(layer: Any, dtype: torch.dtype | None, *, paired: bool) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    query_heads, key_heads = (
        module.out_features // attention.head_dim for module in (attention.q_proj, attention.k_proj)
    )
    return _Layer(
        qkv=_read_normed(
            layer.input_layernorm,
            *_projections(layer),
            dtype=dtype,
            rows=paired_rows(attention) if paired else None,
        ),
        query_key_norm=_read_head_norms(attention, query_heads, key_heads) if "q_norm" in parts_of(attention) else None,
        output=_read_projection(attention.o_proj, dtype=dtype).pack(),
        gate_up=_read_normed(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj, dtype=dtype),
        activation=mlp.act_fn,
        down=_read_projection(mlp.down_proj, dtype=dtype).pack(),
        query_heads=query_heads,
        key_heads=key_heads,
        head_dim=attention.head_dim,
        scaling=attention.scaling,
    )


def _read_norm(module: Any) -> _Norm:
    return _Norm(weight=module.weight.detach(), epsilon=norm_epsilon(module))


def _read_last_norm(module: Any) -> _Norm | _Length:
    norm = _read_norm(module)
    if norm.weight.device.type != "cpu" or norm.weight.dtype not in FULL_PRECISION:
        return norm
    floor, scale = _floor_and_scale(norm)
    return _Length(floor, norm.weight * scale)


def _floor_and_scale(norm: _Norm) -> tuple[Tensor, float]:
    """sqrt(H epsilon) and sqrt(H)."""
    width = len(norm.weight)
    return norm.weight.new_tensor((width * norm.epsilon) ** 0.5), width**0.5


def _read_head_norms(attention: Any, query_heads: int, key_heads: int) -> _Norm:
    """The query and the key norm as one; both are over the head's width, not over all heads together."""
    norms = (_read_norm(attention.q_norm), _read_norm(attention.k_norm))
    weights = [norm.weight.expand(heads, -1) for norm, heads in zip(norms, (query_heads, key_heads), strict=True)]
    return _Norm(weight=torch.cat(weights), epsilon=norms[0].epsilon)


def _read_map(module: Any, dtype: torch.dtype | None, *, merge: bool) -> _Map:
    """A linear layer, with its adapters in the matrix or beside it, rounded where products have another precision."""
    base = module if is_plain_linear(module) else module.base_layer
    weight, bias = base.weight.detach(), None if base.bias is None else base.bias.detach()
    adapters = []
    if base is not module and not module.disable_adapters and not module.merged:
        for name in module.active_adapters:
            if merge:
                weight = weight + module.get_delta_weight(name).detach().to(weight.dtype)
            else:
                scaled = module.lora_B[name].weight.detach() * module.scaling[name]
                adapters.append((module.lora_A[name].weight.detach(), scaled))
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    return _Map(weight, bias, adapters)


def _read_projection(*modules: Any, dtype: torch.dtype | None) -> _Projection:
    """Several maps as one where the matrices are small; adapters become part of a matrix that is copied anyway."""
    small = _are_small(modules)
    maps = [_read_map(module, dtype, merge=small or dtype is not None) for module in modules]
    if len(maps) == 1 or not small:
        return _Projection(maps)
    weight = torch.cat([one.weight for one in maps])
    bias = None if maps[0].bias is None else torch.cat([one.bias for one in maps if one.bias is not None])
    return _Projection([_Map(weight, bias)])


def _are_small(modules: Sequence[Any]) -> bool:
    limit = MERGE_LIMITS.get(modules[0].weight.device.type, 0)
    return sum(module.weight.numel() for module in modules) <= limit


def _read_normed(
    norm_module: Any, *modules: Any, dtype: torch.dtype | None, rows: Tensor | None = None
) -> _NormedProjection:
    """A norm and maps, with the outputs of the maps in the order of [C] indices `rows`, of small maps only."""
    norm, projection = _read_norm(norm_module), _read_projection(*modules, dtype=dtype)
    weight, bias = projection.maps[0].weight, projection.maps[0].bias
    # Only a merged matrix is ours to change; in 16 bits, the product of two weights would be rounded once more.
    if len(projection.maps) > 1 or weight.dtype not in FULL_PRECISION:
        return _NormedProjection(norm, projection.pack(), None)
    floor, scale = _floor_and_scale(norm)
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    folded = _Projection([_Map(weight * (norm.weight * scale), bias)]).pack()
    return _NormedProjection(norm, folded, _Length(floor))
