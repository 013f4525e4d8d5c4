"""Decode attention that reads a prompt's keys and values once for all its samples.

Decoding waits for memory: each step reads every key and value of every row. The samples of a group have the same
prompt, so its keys and values are kept once and met by the queries of the whole group in one matrix product; only
the completions' own keys and values are read row by row. One softmax runs over both parts, so the result is the
usual attention.

Source: Hydragen (https://arxiv.org/abs/2402.05099, section 3), here with joint scores instead of two softmaxes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from rlhf.lm.decode_products import match_keys

IMPLEMENTATION = "shared_prompt"


class SharedPromptError(RuntimeError):
    """A model does something between cache and attention that does not allow prompts to be kept apart."""


class PromptGroups:
    """Which active row belongs to which prompt, as gather indices between rows [n, ...] and slots [N, S, ...].

    S is the number of active rows of the largest group; slots without a row repeat row 0 and are never read back.

    Args:
        prompt_of_row: [n] index of each active row's prompt.
        prompts: Number of prompts N.
        in_order: Rows are prompt 0 G times, prompt 1 G times, ...: reshaping does, no gathering is needed.
    """

    def __init__(self, prompt_of_row: Tensor, prompts: int, *, in_order: bool = False) -> None:
        self.prompt_of_row, self.prompts, self.in_order = prompt_of_row, prompts, in_order
        rows = len(prompt_of_row)
        if in_order:
            self.slots = rows // prompts
            return
        order = torch.argsort(prompt_of_row, stable=True)
        counts = torch.bincount(prompt_of_row, minlength=prompts)
        first = counts.cumsum(0) - counts
        self.slots = int(counts.max())
        place = torch.arange(rows, device=order.device) - first[prompt_of_row[order]]
        self._slot_of_row = torch.empty_like(order)
        self._slot_of_row[order] = prompt_of_row[order] * self.slots + place
        self._row_of_slot = order.new_zeros(prompts * self.slots)
        self._row_of_slot[self._slot_of_row] = torch.arange(rows, device=order.device)

    def to_slots(self, rows: Tensor) -> Tensor:
        """[n, H, R, D] to [N, H, S * R, D]: the queries that meet one prompt, side by side."""
        if not self.in_order:
            rows = rows.index_select(0, self._row_of_slot)
        _, heads, repeats, width = rows.shape
        slots = rows.reshape(self.prompts, self.slots, heads, repeats, width).transpose(1, 2)
        return slots.reshape(self.prompts, heads, self.slots * repeats, width)

    def to_rows(self, slots: Tensor) -> Tensor:
        """[N, H, S * R, D] back to [n, H, R, D]."""
        _, heads, _, width = slots.shape
        rows = slots.view(self.prompts, heads, self.slots, -1, width).transpose(1, 2).flatten(0, 1)
        return rows if self.in_order else rows.index_select(0, self._slot_of_row)


def attend(
    query: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    *,
    prompt_keys: Tensor,
    prompt_values: Tensor,
    prompt_bias: Tensor | None,
    groups: PromptGroups,
    scaling: float,
) -> Tensor:
    """Attention of one new token per row to its prompt and its own completion so far.

    Args:
        query: [n, Hq, 1, D].
        own_keys: [n, H, t, D] completion keys; H divides Hq (grouped-query attention).
        own_values: [n, H, t, Dv].
        prompt_keys: [N, H, P, D].
        prompt_values: [N, H, P, Dv].
        prompt_bias: [N, 1, 1, P] added to the scores, very negative on padding; None without padding.
        groups: Which row belongs to which prompt.
        scaling: Factor of the scores.

    Returns:
        [n, 1, Hq, Dv].
    """
    rows, query_heads, _, width = query.shape
    prompts, heads, prompt_length, _ = prompt_keys.shape
    query = query.reshape(rows, heads, query_heads // heads, width) * scaling
    # bmm rather than matmul: on a small model, half of a product's time is what surrounds it.
    prompt_scores = torch.bmm(groups.to_slots(query).flatten(0, 1), prompt_keys.flatten(0, 1).transpose(1, 2))
    prompt_scores = prompt_scores.view(prompts, heads, -1, prompt_length)  # [N, H, S * R, P]
    if prompt_bias is not None:
        prompt_scores += prompt_bias
    own_scores = match_keys(query.flatten(0, 1), own_keys)  # [n * H, R, t]
    scores = torch.cat([groups.to_rows(prompt_scores).flatten(0, 1), own_scores], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32 if scores.dtype != torch.float64 else None)
    weights = weights.to(query.dtype)
    prompt_weights = groups.to_slots(weights[..., :prompt_length].unflatten(0, (rows, heads)))
    from_prompt = torch.bmm(prompt_weights.flatten(0, 1), prompt_values.flatten(0, 1))
    from_prompt = groups.to_rows(from_prompt.unflatten(0, (prompts, heads)))  # [n, H, R, Dv]
    output = torch.baddbmm(from_prompt.flatten(0, 1), weights[..., prompt_length:], own_values.flatten(0, 1))
    return output.reshape(rows, 1, query_heads, -1)


_active_cache: ContextVar[Any] = ContextVar("cache whose prompts are shared")


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls; the cache knows which layer it has just updated."""
    del attention_mask, dropout
    cache = _active_cache.get()
    layer = cache.last_updated
    if key is not cache.last_views[0] or value is not cache.last_views[1]:
        raise SharedPromptError(f"{type(module).__name__} changes keys or values after they were cached")
    output = attend(
        query,
        key,
        value,
        prompt_keys=layer.prompt_keys,
        prompt_values=layer.prompt_values,
        prompt_bias=cache.prompt_bias,
        groups=cache.groups,
        scaling=scaling if scaling is not None else query.shape[-1] ** -0.5,
    )
    return output, None


@contextmanager
def shared_prompt_attention(config: PretrainedConfig, cache: Any) -> Iterator[None]:
    """Let the model of `config` decode with `cache` through `attend`; its own attention is back afterwards."""
    before = config._attn_implementation
    token = _active_cache.set(cache)
    config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = before
        _active_cache.reset(token)


AttentionInterface.register(IMPLEMENTATION, _attention_forward)
