"""The proof that `fused_decoding` computes what a body's own forward computes, once per model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.lm.backbone import evaluating
from rlhf.lm.cache import InPlaceCache, padding_bias
from rlhf.lm.fused_decoding import FusedStep, read_fused_step


@torch.no_grad()
def fusing_is_exact(body: Any) -> bool:
    """Decode three tokens after padded prompts by the body's own forward and by `FusedStep`, and compare.

    Both kinds of step are compared: with a table of positions and without. So are norms on their own, on an input whose
    mean is far from 0, where other norms show.
    """
    if read_fused_step(body) is None:
        return False
    try:
        with evaluating(body), loud_attention(body.layers):
            steps = [FusedStep(body, positions=positions) for positions in (0, 6)]
            return _same_norms(body, steps[0]) and all(_same(*_decode_both(body, step)) for step in steps)
    except (RuntimeError, TypeError, ValueError):  # the rotary module takes or gives something else
        return False


@contextmanager
def loud_attention(layers: Any) -> Iterator[None]:
    """Make attention matter: a fresh model's scores are near 0, and no probe would see how they are made.

    Queries are W (w * x) with the norm's weight w and x of size 1, so of the size of the rows of W * w. Scaling w to
    make queries and keys of size 2 makes scores q . k / sqrt(D) of size 4.
    """
    norms = [layer.input_layernorm for layer in layers]
    weights = [norm.weight for norm in norms]
    try:
        for layer, norm, weight in zip(layers, norms, weights, strict=True):
            sizes = [
                (module.weight.float() * weight.float()).norm() / module.out_features**0.5
                for module in (layer.self_attn.q_proj, layer.self_attn.k_proj)
            ]
            gain = 2.0 / (sizes[0] * sizes[1]).sqrt().clamp(min=1e-3)
            norm._parameters["weight"] = nn.Parameter((weight * gain).to(weight.dtype), requires_grad=False)
        yield
    finally:
        for norm, weight in zip(norms, weights, strict=True):
            norm._parameters["weight"] = weight


def _same_norms(body: Any, step: FusedStep) -> bool:
    pairs = [(body.norm, step.norm)]
    for module, layer in zip(body.layers, step.layers, strict=True):
        pairs += [(module.input_layernorm, layer.qkv.norm), (module.post_attention_layernorm, layer.gate_up.norm)]
    probe = torch.linspace(-1.0, 3.0, step.embedding.shape[1], dtype=step.embedding.dtype, device=step.embedding.device)
    return all(_same(module(probe[None]), norm(probe[None])) for module, norm in pairs)


def _decode_both(body: Any, step: FusedStep) -> tuple[Tensor, Tensor]:
    """Hidden states [2, 3, H] of three tokens after prompts of 3 and 1 tokens, by `body` and by `step`."""
    vocabulary, device = len(step.embedding), step.embedding.device
    tokens = torch.arange(1, 13, device=device).view(2, 6) * 7 % vocabulary
    visible = torch.ones(2, 6, dtype=torch.bool, device=device)
    visible[1, :2] = False
    positions = (visible.cumsum(dim=1) - 1).clamp(min=0)
    results: list[list[Tensor]] = [[], []]
    for fused, hidden in enumerate(results):
        cache = InPlaceCache(len(step.layers), capacity=6)
        settings = {"past_key_values": cache, "use_cache": True}
        body(input_ids=tokens[:, :3], attention_mask=visible[:, :3], position_ids=positions[:, :3], **settings)
        if fused:
            step.take_over(cache)
        cache.start_decoding(1, share=False, prompt_mask=visible[:, :3])
        bias = padding_bias(visible, step.embedding.dtype)
        for column in range(3, 6):
            mask, place = bias[..., : column + 1], positions[:, column, None]
            if fused:
                hidden.append(step(tokens[:, column], place, cache=cache, mask=mask))
            else:
                new = tokens[:, column, None]
                hidden.append(body(input_ids=new, attention_mask=mask, position_ids=place, **settings)[0][:, -1])
    return torch.stack(results[0], dim=1), torch.stack(results[1], dim=1)


def _same(expected: Tensor, got: Tensor) -> bool:
    """Equal but for rounding, which is measured against the greatest entry."""
    tolerance = 1e-4 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    return expected.dtype == got.dtype and torch.allclose(
        expected, got, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )
