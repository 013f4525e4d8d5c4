"""A Llama-like body's forward and backward over many tokens, in half the operations of its modules.

`fused_decoding` does it for one token per row; here the pass is differentiable. What is saved:

- Prompts that rows share are computed once, padding never (`token_layout`); only attention sees rows. After the last
  layer's attention only the tokens go on whose hidden states are asked for.
- Queries, keys and values are one product, the norm's weight is multiplied into the matrix that follows, so
  that RMSNorm is one division. Residuals are added by the product that makes them. Attention is `causal_attention`'s.
- Backward is written out: a norm, a rotation, a gated unit take one to four passes over memory instead of a dozen.

The equations, with x the residual stream [M, H], r(x) = 1 / sqrt(mean(x^2) + epsilon) and n = r(x) x:

    dx  = r (dn - n mean(dn n))                  RMSNorm, without its weight
    dx  = conj(t) dy                             rotary embedding y = t x, t = cos + i sin, x a pair of components
    a   = silu(g) u;  du = da silu(g);  dg = da u silu'(g)

It serves what `fused_decoding` serves, save for norms on queries and keys and for biases outside of the attention's
input, in float32 on a CPU, where its speed was measured. `fused_training_probe` shows once per model that it computes
the model's own hidden states and gradients. Any other body, and one with hooks, adapters, checkpointing or compiled
layers, goes through its own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, silu

from rlhf.lm.causal_attention import causal_attention
from rlhf.lm.fusible_structure import has_fusible_structure, norm_epsilon
from rlhf.lm.rotary import PairedRotation, paired_rows
from rlhf.lm.token_layout import TokenLayout
from rlhf.training.linear import linear, linear_onto, weight_gradient


@dataclass(frozen=True)
class FusedPass:
    """Forward passes of one body, with the weights it has at the time of the call."""

    body: Any

    def __call__(self, layout: TokenLayout, wanted: Tensor | None = None) -> Tensor:
        """Hidden states after the last norm.

        Args:
            layout: M tokens.
            wanted: [N] indices of the tokens that are asked for, any of them several times; None asks for all.

        Returns:
            [N, H], or [M, H].
        """
        words = self.body.embed_tokens
        hidden = embedding(layout.ids, words.weight, words.padding_idx)
        rotation = self._rotation(layout, hidden)
        order = paired_rows(self.body.layers[0].self_attn)
        for index, layer in enumerate(self.body.layers):
            attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
            projections = (attention.q_proj, attention.k_proj, attention.v_proj)
            weights = [module.weight for module in projections]
            biases = [module.bias for module in projections if module.bias is not None]
            places = (layout, rotation, order, attention.head_dim)
            heads = _Heads.apply(hidden, *places, norm_epsilon(norm), norm.weight, *weights, *biases)
            attended = _ToTokens.apply(causal_attention(*heads, scale=attention.scaling), layout)
            if wanted is not None and index + 1 == len(self.body.layers):
                # An embedding is a gather whose gradient is fast where a token is wanted twice, as a prompt's last is.
                hidden, attended = embedding(wanted, hidden), embedding(wanted, attended)
            norm = layer.post_attention_layernorm
            modules = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
            weights = [module.weight for module in modules]
            hidden = _Block.apply(hidden, attended, norm_epsilon(norm), norm.weight, *weights)
        return _Norm.apply(hidden, norm_epsilon(self.body.norm), self.body.norm.weight)  # type: ignore[return-value]

    def _rotation(self, layout: TokenLayout, hidden: Tensor) -> PairedRotation:
        places = torch.arange(layout.width, device=hidden.device)[None]
        cosines, sines = self.body.rotary_emb(hidden[None], position_ids=places)  # [1, S, D]
        attention = self.body.layers[0].self_attn
        heads = (attention.q_proj.out_features + attention.k_proj.out_features) // sines.shape[2]
        return PairedRotation.of(cosines[0], sines[0], heads=heads).at(layout.positions)


def read_fused_pass(body: Any) -> FusedPass | None:
    """A `FusedPass` of a body, or None where its structure is another or it is not in float32 on a CPU.

    Structure alone proves nothing: ask `fused_training_probe`.
    """
    if not has_fusible_structure(body) or getattr(body, "gradient_checkpointing", False):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    if any(module._compiled_call_impl is not None for module in body.modules()):  # somebody asked for torch.compile
        return None
    if any(p.device.type != "cpu" or p.dtype is not torch.float32 for p in body.parameters()):
        return None
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        others = (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        if "q_norm" in attention._modules or any(module.bias is not None for module in others):
            return None
    return FusedPass(body)


class _Heads(torch.autograd.Function):
    """Norm, projections and rotation: hidden states [M, H] to queries, keys and values [h, B, S, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        layout: TokenLayout,
        rotation: PairedRotation,
        order: Tensor,
        width: int,
        epsilon: float,
        norm: Tensor,
        *weights_and_biases: Tensor,
    ) -> tuple[Tensor, ...]:
        weights, biases = weights_and_biases[:3], weights_and_biases[3:]
        normed, inverse = _normalize(hidden, epsilon)
        bias = torch.cat(biases)[order] if biases else None
        products = linear(normed, torch.cat(weights)[order] * norm, bias)
        rotation.turn_(products)
        ctx.save_for_backward(normed, inverse, norm, order, *weights)
        ctx.layout, ctx.rotation, ctx.has_biases = layout, rotation, bool(biases)
        heads = layout.to_rows(products).unflatten(2, (-1, width))  # [B, S, h, D]
        heads = heads.permute(2, 0, 1, 3).contiguous()
        return heads.split([weight.shape[0] // width for weight in weights])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        normed, inverse, norm, order, *weights = ctx.saved_tensors
        rows = torch.cat([gradient.permute(1, 2, 0, 3) for gradient in gradients], dim=2)  # [B, S, h, D]
        products = ctx.layout.sum_to_tokens(rows.flatten(2))
        ctx.rotation.turn_back_(products)
        matrix, sizes = torch.cat(weights)[order], [weight.shape[0] for weight in weights]
        hidden = _normalize_backward(linear(products, (matrix * norm).t()), normed, inverse)
        gradient, norm_gradient = _normed_weight_gradient(products, normed, norm, matrix)
        biases = _in_places(order, products.sum(dim=0)).split(sizes) if ctx.has_biases else ()
        return hidden, *[None] * 5, norm_gradient, *_in_places(order, gradient).split(sizes), *biases


class _ToTokens(torch.autograd.Function):
    """Heads [h, B, S, D] to tokens [M, h * D]."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, layout: TokenLayout) -> Tensor:
        ctx.layout, ctx.count = layout, len(heads)
        return layout.to_tokens(heads.permute(1, 2, 0, 3).flatten(2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = ctx.layout.spread(gradient).unflatten(2, (ctx.count, -1))
        return rows.permute(2, 0, 1, 3).contiguous(), None


class _Block(torch.autograd.Function):
    """What follows attention: output projection, residual, norm, gated MLP, residual; [M, H], [M, h * D] to [M, H]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        attended: Tensor,
        epsilon: float,
        norm: Tensor,
        output: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
    ) -> Tensor:
        middle = linear_onto(hidden, attended, output)
        normed, inverse = _normalize(middle, epsilon)
        # Two products, not one: halves of a row would be read and written slowly by all that follows.
        opened, raised = linear(normed, gate * norm), linear(normed, up * norm)  # [M, I]
        inner = silu(opened).mul_(raised)
        ctx.save_for_backward(attended, normed, inverse, opened, raised, inner, norm, output, gate, up, down)
        return linear_onto(middle, inner, down)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        attended, normed, inverse, opened, raised, inner, norm, output, gate, up, down = ctx.saved_tensors
        down_gradient = weight_gradient(gradient, inner)
        product_gradient = linear(gradient, down.t())  # [M, I]
        raised_gradient = silu(opened).mul_(product_gradient)
        product_gradient.mul_(raised)
        opened_gradient = torch.ops.aten.silu_backward.grad_input(product_gradient, opened, grad_input=product_gradient)
        along = linear_onto(linear(opened_gradient, (gate * norm).t()), raised_gradient, (up * norm).t())
        middle = _normalize_backward(along, normed, inverse).add_(gradient)
        gate_gradient, gate_norm = _normed_weight_gradient(opened_gradient, normed, norm, gate)
        up_gradient, up_norm = _normed_weight_gradient(raised_gradient, normed, norm, up)
        outer = linear(middle, output.t())
        output_gradient = weight_gradient(middle, attended)
        norm_gradient = gate_norm.add_(up_norm)
        return middle, outer, None, norm_gradient, output_gradient, gate_gradient, up_gradient, down_gradient


class _Norm(torch.autograd.Function):
    """RMSNorm with its weight, [M, H] to [M, H]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, epsilon: float, weight: Tensor) -> Tensor:
        normed, inverse = _normalize(hidden, epsilon)
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        normed, inverse, weight = ctx.saved_tensors
        return _normalize_backward(gradient * weight, normed, inverse), None, (gradient * normed).sum(dim=0)


def _in_places(order: Tensor, rows: Tensor) -> Tensor:
    """Undo `[order]`."""
    return torch.empty_like(rows).index_copy_(0, order, rows)


def _normalize(hidden: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """[M, H] divided by the root of its mean square, and one over that root [M, 1]."""
    inverse = (torch.linalg.vector_norm(hidden, dim=1, keepdim=True).square_() / hidden.shape[1] + epsilon).rsqrt_()
    return hidden * inverse, inverse


def _normalize_backward(gradient: Tensor, normed: Tensor, inverse: Tensor) -> Tensor:
    along = (gradient * normed).mean(dim=1, keepdim=True)
    return torch.addcmul(gradient, normed, along, value=-1.0).mul_(inverse)


def _normed_weight_gradient(gradient: Tensor, normed: Tensor, norm: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the matrix W and the norm's weight w of normed @ (W * w).T."""
    product = weight_gradient(gradient, normed)  # of W * w
    return product * norm, (product * weight).sum(dim=0)
