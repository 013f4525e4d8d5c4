"""Choosing the next token: temperature, top-k, top-p, inverse-CDF sampling."""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from rlhf.config import Config

BLOCKED_WIDTH = 2048
"""Vocabularies from here on are searched in two levels; below, one cumulative sum is as fast."""


class SamplingConfig(Config):
    """How completions are drawn."""

    temperature: float = Field(1.0, gt=0)
    """Logits are divided by this. The policy's log-probs must use the same temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Keep the most likely tokens whose probabilities reach this sum; 1 keeps all."""
    top_k: int = Field(0, ge=0)
    """Keep this many most likely tokens; 0 keeps all."""
    max_completion_length: int = Field(128, ge=1)
    """Tokens after the prompt, the end token included."""
    greedy: bool = False
    """Take the most likely token instead of sampling."""

    @property
    def full_support(self) -> bool:
        """Whether every token can be drawn, so that sampling log-probs are the policy's own."""
        return self.greedy or (self.top_p == 1.0 and self.top_k == 0)


def choose_tokens(logits: Tensor, sampling: SamplingConfig, *, uniforms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Choose one token per row and report its log-prob.

    Sampling inverts the cumulative distribution: the first token whose cumulative probability exceeds u. On a CPU
    this is many times faster than `torch.multinomial`, and one uniform number per row decides, whatever rows are
    beside it.

    The log-prob is that of the distribution that was sampled from: softmax(logits / temperature), and with
    `top_p` or `top_k` the *filtered and renormalised* one. The policy's log-probs are unfiltered, so with a filter
    the two differ by the log of the kept mass. Greedy choices report softmax(logits / temperature).

    Args:
        logits: [N, V] float32.
        sampling: Temperature and filters.
        uniforms: [N] in [0, 1), float32; not needed when greedy.

    Returns:
        Tokens [N] int64 and their log-probs [N] float32.
    """
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    probabilities = torch.softmax(logits, dim=-1)
    if sampling.greedy:
        tokens = logits.argmax(dim=-1, keepdim=True)
        return tokens.squeeze(1), probabilities.gather(1, tokens).log_().squeeze(1)
    assert uniforms is not None, "sampling needs uniform numbers"
    token_ids = None
    if not sampling.full_support:
        probabilities, token_ids = _filter(probabilities, sampling)
    chosen, total = invert_cdf(probabilities, uniforms[:, None])
    log_probs = (probabilities.gather(1, chosen) / total).log_().squeeze(1)
    tokens = chosen if token_ids is None else token_ids.gather(1, chosen)
    return tokens.squeeze(1), log_probs


def invert_cdf(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first index whose cumulative weight exceeds u times the total.

    Sums of blocks choose a block, and cumulative sums within it the index: a cumulative sum cannot be vectorised, and
    over a vocabulary of 150,000 it takes longer than the softmax.

    Args:
        weights: [N, V] at least 0, with a positive sum a row.
        uniforms: [N, 1] in [0, 1).

    Returns:
        Indices [N, 1] of positive weight, and the total [N, 1].
    """
    width = weights.shape[1]
    block = 1 if width < BLOCKED_WIDTH else 2 ** round(math.log2(width) / 2)
    if block == 1:
        return _first_above(weights, uniforms)
    whole = width // block * block
    sums = weights[:, :whole].unflatten(1, (-1, block)).sum(dim=2)
    if whole < width:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=1, keepdim=True)], dim=1)
    chosen, total = _first_above(sums, uniforms)
    before = torch.where(chosen > 0, sums.cumsum(dim=1).gather(1, (chosen - 1).clamp(min=0)), 0.0)
    # The place within the block, again as a uniform number: rounding must not carry it past the block's end.
    inside = ((uniforms * total - before) / sums.gather(1, chosen)).clamp_(0.0, 1 - torch.finfo(sums.dtype).eps)
    columns = chosen * block + torch.arange(block, device=weights.device)
    members = weights.gather(1, columns.clamp(max=width - 1)).masked_fill_(columns >= width, 0.0)
    return chosen * block + _first_above(members, inside)[0], total


def _first_above(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """`invert_cdf` by one cumulative sum."""
    cumulative = weights.cumsum(dim=1)
    total = cumulative[:, -1:]
    # u * total < total, so the index is one of positive weight even where rounding left total short of 1.
    return torch.searchsorted(cumulative, uniforms * total, right=True).clamp_(max=weights.shape[1] - 1), total


def _filter(probabilities: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Keep the most likely tokens, top-k before top-p as in transformers: sorted probabilities and their token ids.

    A token is kept while the mass before it is below `top_p`, so at least one always is.
    """
    count = probabilities.shape[-1]
    kept, token_ids = probabilities.topk(min(sampling.top_k or count, count), dim=-1)
    if sampling.top_p < 1.0:
        before = kept.cumsum(dim=-1) - kept
        kept = kept.masked_fill(before >= sampling.top_p * kept.sum(dim=-1, keepdim=True), 0.0)
    return kept, token_ids
