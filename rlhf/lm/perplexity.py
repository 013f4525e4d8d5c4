"""How surprised a model is by texts it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.collation import left_pad, right_pad
from rlhf.data.records import Demonstration
from rlhf.data.tokenization import encode_completion, encode_prompt
from rlhf.errors import DataError
from rlhf.lm.measurement import measure_alone
from rlhf.lm.policy import LanguageModelPolicy


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    demonstrations: Sequence[Demonstration],
    max_length: int | None = None,
    tokens_per_batch: int = 16_384,
) -> dict[str, float]:
    """How surprised a model is by held-out texts, per completion token.

    Args:
        model: A causal language model, bare or with adapters.
        tokenizer: Its tokenizer.
        demonstrations: Prompt and completion; an empty prompt makes the whole text count (but its first token, where
            the tokenizer adds no beginning-of-text token to predict it from).
        max_length: Tokens of a text that are looked at; the rest is cut off. None looks at all.
        tokens_per_batch: Budget of one forward.

    Returns:
        "perplexity" = exp("loss"), "loss" in nats per token, "loss_standard_error" (over texts, by the delta method
        of a ratio), "tokens".

    Raises:
        DataError: No text has a token to predict.
    """
    prompts, completions = [], []
    for item in demonstrations:
        ids = encode_prompt(tokenizer, item.prompt)
        rest = encode_completion(tokenizer, item.prompt, item.completion, add_end=False)
        if not ids:
            ids, rest = rest[:1], rest[1:]
        rest = rest if max_length is None else rest[: max(0, max_length - len(ids))]
        if rest:
            prompts.append(ids)
            completions.append(rest)
    if not prompts:
        raise DataError(
            "there is no token to predict in the held-out texts",
            got=f"{len(demonstrations)} texts",
            remedy="" if max_length is None else f"Raise the limit of {max_length} tokens of a text.",
        )
    losses, counts = _losses(model, prompts, completions, tokens_per_batch=tokens_per_batch)
    total = counts.sum()
    loss = losses.sum() / total
    residuals = losses - loss * counts
    error = residuals.square().sum().sqrt() / total
    return {
        "perplexity": math.exp(loss.item()),
        "loss": loss.item(),
        "loss_standard_error": error.item(),
        "tokens": float(total),
    }


def _losses(
    model: Any, prompts: list[list[int]], completions: list[list[int]], *, tokens_per_batch: int
) -> tuple[Tensor, Tensor]:
    """[N] summed negative log-prob of each completion, and [N] its tokens, float64."""
    policy = LanguageModelPolicy(model)
    device = next(policy.parameters()).device
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in left_pad(prompts, 0))
    completion_ids, completion_mask = (tensor.to(device) for tensor in right_pad(completions, 0))
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_mask": completion_mask}
    log_probs = measure_alone(policy.action_log_probs, inputs, completion_ids, tokens=tokens_per_batch)
    return -log_probs.double().sum(dim=1).cpu(), completion_mask.sum(dim=1).double().cpu()
