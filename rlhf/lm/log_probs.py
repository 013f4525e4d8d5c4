"""Log-probs of chosen tokens from hidden states, without ever holding the logits of all positions.

The logits of one position take V numbers; of a batch of long completions they take more memory than the model.
Here hidden states meet the head a chunk at a time, and backward computes each chunk's logits again. Only where all of
them are one small chunk are their log-probs kept for backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from rlhf.lm.backbone import LogitsHead

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
"""Logits held at once, in numbers: 16 MiB of float32 on a CPU (about its cache), 512 MiB on a GPU."""
KEPT_ELEMENTS = 2**22
"""Log-probs kept for backward, in numbers, where all of them are one chunk."""


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
    settings = (float(temperature), chunk_tokens, best, torch.is_grad_enabled())
    return _SelectedLogProbs.apply(hidden, targets, head, *settings, *parameters)  # type: ignore[return-value]


class _Chunk(NamedTuple):
    """Hidden states that met the head."""

    hidden: Tensor
    """[n, H], a leaf."""
    logits: GradientEdge | None
    """Where the gradient [n, V] of the logits enters; None where nothing is differentiated."""
    log_p: Tensor
    """[n, V]."""


def _read_chunk(
    hidden: Tensor, head: LogitsHead, temperature: float, *, differentiate: bool, trains_hidden: bool
) -> _Chunk:
    piece = hidden.detach().requires_grad_(trains_hidden)
    with torch.set_grad_enabled(differentiate):
        logits = head(piece)
    edge = get_gradient_edge(logits) if logits.requires_grad else None
    return _Chunk(piece, edge, _log_softmax(logits.detach(), temperature))


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
        learns: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        ctx.set_materialize_grads(False)
        vocabulary = _vocabulary_size(head, hidden)
        if chunk_tokens is None:
            chunk_tokens = default_chunk_tokens(vocabulary, hidden.device)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = torch.empty(targets.shape, dtype=dtype, device=hidden.device)
        entropy = torch.empty_like(log_probs)
        is_best = torch.empty_like(targets, dtype=torch.bool) if best else None
        keep = learns and len(targets) <= min(chunk_tokens, KEPT_ELEMENTS // vocabulary)
        ctx.kept = None
        for start in range(0, len(targets), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            read = _read_chunk(
                hidden[chunk], head, temperature, differentiate=keep, trains_hidden=ctx.needs_input_grad[0]
            )
            log_p = read.log_p
            log_probs[chunk] = log_p.gather(1, targets[chunk, None]).squeeze(1)
            if is_best is not None:
                is_best[chunk] = log_probs[chunk] == log_p.amax(dim=1)
            entropy[chunk] = -(log_p.exp() * log_p).sum(dim=1)
            ctx.kept = read if keep else None
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
        kept, ctx.kept = ctx.kept, None  # what is kept serves once: its log-probs become the gradient
        for start in range(0, len(targets), ctx.chunk_tokens):
            chunk = slice(start, start + ctx.chunk_tokens)
            with torch.autocast(device_type, autocast_dtype, enabled=autocast_enabled):
                read = kept or _read_chunk(
                    hidden[chunk],
                    ctx.head,
                    ctx.temperature,
                    differentiate=True,
                    trains_hidden=hidden_gradient is not None,
                )
            slope = _logits_gradient(
                read.log_p,
                targets[chunk],
                temperature=ctx.temperature,
                entropy=entropy[chunk],
                log_prob_gradient=None if log_prob_gradient is None else log_prob_gradient[chunk],
                entropy_gradient=None if entropy_gradient is None else entropy_gradient[chunk],
            )
            leaves = [*([read.hidden] if hidden_gradient is not None else []), *parameters]
            assert read.logits is not None
            pieces = list(torch.autograd.grad(read.logits, leaves, slope))
            if hidden_gradient is not None:
                hidden_gradient[chunk] = pieces.pop(0)
            for total, part in zip(totals, pieces, strict=True):
                total += part
        return hidden_gradient, None, None, None, None, None, None, *totals


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if temperature != 1.0:
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1)


def _logits_gradient(
    log_p: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    entropy: Tensor,
    log_prob_gradient: Tensor | None,
    entropy_gradient: Tensor | None,
) -> Tensor:
    """Gradient [N, V] with respect to the logits, in the memory of log_p; equations: see `selected_log_probs`."""
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
