"""Choosing the next token: temperature, top-k, top-p, inverse-CDF sampling."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from rlhf.config import Config


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
    cumulative = probabilities.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # u * total < total, so the index is a token of positive probability even where rounding left total short of 1.
    chosen = torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)
    chosen.clamp_(max=logits.shape[-1] - 1)
    log_probs = (probabilities.gather(1, chosen) / total).log_().squeeze(1)
    tokens = chosen if token_ids is None else token_ids.gather(1, chosen)
    return tokens.squeeze(1), log_probs


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
