"""The proof that `fused_training` computes a body's own hidden states and gradients, once per model."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import get_layer_types_and_kwargs

from rlhf.lm.backbone import evaluating
from rlhf.lm.fused_probe import loud_attention
from rlhf.lm.fused_training import FusedPass, read_fused_pass
from rlhf.lm.token_layout import lay_out

_proved: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def exact_fused_pass(body: Any) -> FusedPass | None:
    """The fused pass of a body for which it was shown to be exact, or None."""
    fused = read_fused_pass(body)
    if fused is None:
        return None
    if body not in _proved:
        _proved[body] = _is_exact(body, fused)
    return fused if _proved[body] else None


def _is_exact(body: Any, fused: FusedPass) -> bool:
    """Compare on rows that share a prompt and rows that do not, of several lengths."""
    layer_types, _ = get_layer_types_and_kwargs(body.config)
    if set(layer_types) != {"full_attention"} or body.config._attn_implementation not in ("sdpa", "eager"):
        return False
    try:
        with evaluating(body), loud_attention(body.layers), torch.enable_grad():
            expected, got = _both(body, fused)
    except (RuntimeError, TypeError, ValueError):  # the rotary module takes or gives something else
        return False
    return all(_same(one, other) for one, other in zip(expected, got, strict=True))


def _both(body: Any, fused: FusedPass) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states and gradients of a few parameters, by the body and by the fused pass."""
    vocabulary = len(body.embed_tokens.weight)
    ids = torch.arange(1, 22).view(3, 7) * 11 % vocabulary
    ids[1, :3] = ids[0, :3]
    lengths, prompt_lengths = torch.tensor([7, 6, 5]), torch.tensor([3, 3, 2])
    layout = lay_out(ids, lengths, prompt_lengths)
    places = (torch.arange(7) < lengths[:, None]).flatten().nonzero().squeeze(1)
    own = body(input_ids=ids, position_ids=torch.arange(7)[None], use_cache=False)[0].flatten(0, 1)[places]
    ours = fused(layout, layout.token_of_place[places])
    slope = torch.linspace(-1.0, 1.0, own.numel()).view_as(own)
    layer = body.layers[0]
    modules = (body.embed_tokens, layer.self_attn.k_proj, layer.self_attn.o_proj, layer.post_attention_layernorm)
    modules += (layer.mlp.gate_proj, layer.mlp.down_proj)
    parameters = [module.weight for module in modules if module.weight.requires_grad]
    results = []
    for hidden in (own, ours):
        gradients = torch.autograd.grad(hidden, parameters, slope) if parameters else ()
        results.append([hidden.detach(), *gradients])
    return results[0], results[1]


def _same(expected: Tensor, got: Tensor) -> bool:
    return torch.allclose(expected, got, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
