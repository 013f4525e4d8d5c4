"""Log-probs of chosen tokens from hidden states, without ever holding the logits of all positions.

The logits of one position take V numbers; of a batch of long completions they take more memory than the model.
Here hidden states meet the head a chunk at a time, and backward computes each chunk's logits again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf.lm.backbone import LogitsHead

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Logits held at once, in numbers: 16 MiB of float32 on a CPU (about its cache), 512 MiB on a GPU."""


def default_chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Positions per chunk, so that one chunk of logits stays within `CHUNK_ELEMENTS`."""
    return max(1, CHUNK_ELEMENTS.get(device.type, 2**25) // max(1, vocabulary))


def selected_log_probs(
    hidden: Tensor,
    head: nn.Module | LogitsHead,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each target token and the entropy of its distribution.

    With z = head(hidden) / temperature and p = softmax(z):

        log_prob = z[target] - logsumexp(z)
        entropy  = -sum_v p_v log p_v
        d log_prob / dz_v = [v == target] - p_v
        d entropy  / dz_v = -p_v (log p_v + entropy)

    Source: the chunked head is the idea of Liger Kernel's fused linear cross-entropy
    (https://arxiv.org/abs/2410.10989, section 3.2); the gradients are elementary.

    Args:
        hidden: [N, H] hidden states.
        head: Maps [N, H] to logits [N, V].
        targets: [N] int64 token ids.
        temperature: > 0, divides the logits.
        chunk_tokens: Positions per chunk; None chooses by vocabulary and device.

    Returns:
        Log-probs [N] and entropies [N] in nats, float32 (float64 for float64 hidden states). Both are differentiable.
    """
    return _apply(hidden, head, targets, temperature=temperature, chunk_tokens=chunk_tokens, best=False)[:2]


def labelled_log_probs(hidden: Tensor, head: LogitsHead, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `selected_log_probs`, and [N] bool: whether the label is the most likely token."""
    return _apply(hidden, head, labels, temperature=1.0, chunk_tokens=None, best=True)


def _apply(
    hidden: Tensor,
    head: nn.Module | LogitsHead,
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int | None,
    best: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(head, LogitsHead):
        head = LogitsHead(head)
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _SelectedLogProbs.apply(hidden, targets, head, float(temperature), chunk_tokens, best, *parameters)  # type: ignore[return-value]


class _SelectedLogProbs(torch.autograd.Function):
    """The head's parameters are inputs, so that autograd (and gradient hooks such as DDP's) see one gradient each."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: LogitsHead,
        temperature: float,
        chunk_tokens: int | None,
        best: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        if chunk_tokens is None:
            chunk_tokens = default_chunk_tokens(_vocabulary_size(head, hidden), hidden.device)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(targets.shape, dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        is_best = torch.empty_like(targets, dtype=torch.bool) if best else None
        for start in range(0, len(targets), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            log_p = _log_softmax(head(hidden[chunk]), temperature)
            log_probs[chunk] = log_p.gather(1, targets[chunk, None]).squeeze(1)
            if is_best is not None:
                is_best[chunk] = log_probs[chunk] == log_p.amax(dim=1)
            entropy[chunk] = -(log_p.exp() * log_p).sum(dim=1)
        ctx.save_for_backward(hidden, targets, entropy, *parameters)
        ctx.head, ctx.temperature, ctx.chunk_tokens = head, temperature, chunk_tokens
        device_type = hidden.device.type
        ctx.autocast = (device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type))
        if is_best is not None:
            ctx.mark_non_differentiable(is_best)
        return log_probs, entropy, is_best

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        log_prob_gradient, entropy_gradient, _ = gradients
        hidden, targets, entropy, *parameters = ctx.saved_tensors
        totals: list[Tensor] = [torch.zeros_like(parameter) for parameter in parameters]
        hidden_gradient = torch.zeros_like(hidden) if ctx.needs_input_grad[0] else None
        device_type, autocast_dtype, autocast_enabled = ctx.autocast
        for start in range(0, len(targets), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            piece = hidden[chunk].detach().requires_grad_(hidden_gradient is not None)
            with torch.enable_grad(), torch.autocast(device_type, autocast_dtype, enabled=autocast_enabled):
                logits = ctx.head(piece)
            slope = _logits_gradient(
                logits.detach(),
                targets[chunk],
                temperature=ctx.temperature,
                entropy=entropy[chunk],
                log_prob_gradient=None if log_prob_gradient is None else log_prob_gradient[chunk],
                entropy_gradient=None if entropy_gradient is None else entropy_gradient[chunk],
            )
            leaves = [*([piece] if hidden_gradient is not None else []), *parameters]
            pieces = list(torch.autograd.grad(logits, leaves, slope))
            if hidden_gradient is not None:
                hidden_gradient[chunk] = pieces.pop(0)
            for total, part in zip(totals, pieces, strict=True):
                total += part
        return hidden_gradient, None, None, None, None, None, *totals


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature != 1.0:
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1)


def _logits_gradient(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    entropy: Tensor,
    log_prob_gradient: Tensor | None,
    entropy_gradient: Tensor | None,
) -> Tensor:
    """Gradient [N, V] with respect to the logits; see `selected_log_probs` for the equations."""
    log_p = _log_softmax(logits, temperature)
    if entropy_gradient is None:
        slope = log_p.exp_()
        if log_prob_gradient is None:
            return slope.zero_()
        slope.mul_(-log_prob_gradient[:, None])
    else:
        weight = -entropy_gradient[:, None] * (log_p + entropy[:, None])
        if log_prob_gradient is not None:
            weight = weight - log_prob_gradient[:, None]
        slope = log_p.exp_().mul_(weight)
    if log_prob_gradient is not None:
        slope.scatter_add_(1, targets[:, None], log_prob_gradient[:, None].to(slope.dtype))
    return slope.div_(temperature) if temperature != 1.0 else slope


def _vocabulary_size(head: LogitsHead, hidden: Tensor) -> int:
    """Width of the logits, read from the layer where it says so and from one position otherwise."""
    width = getattr(head.module, "out_features", None)
    return int(width) if width is not None else head(hidden[:1]).shape[-1] if len(hidden) else 1
