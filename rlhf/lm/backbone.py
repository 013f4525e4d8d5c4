"""A causal language model taken apart: the body (tokens to hidden states) and the head (hidden states to logits).

Log-probs and sampling need logits at few positions. Running body and head apart keeps [B, T, V] from ever
existing, but skips what the model's own `forward` does after the head (Gemma's soft-capping, the logit scales of
Cohere and Granite). So the head here repeats it, and `split_model` checks by a probe that it repeats all of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.errors import ModelError


@dataclass(frozen=True)
class LogitsHead:
    """The output layer together with what the model does to its logits, in float32 or better."""

    module: nn.Module
    """Maps hidden states [..., H] to raw logits [..., V]."""
    scale: float = 1.0
    """Logits are multiplied by this (Cohere's `logit_scale`, one over Granite's `logits_scaling`)."""
    softcap: float | None = None
    """c * tanh(logits / c), as in Gemma 2 (https://arxiv.org/abs/2408.00118, section 2)."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return the logits [N, V] of hidden states [N, H]."""
        return self.adjust(self.module(hidden))

    def adjust(self, logits: Tensor) -> Tensor:
        """Apply scale and soft-capping to raw logits, in float32 or better."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the output layer."""
        return self.module.parameters()


@dataclass(frozen=True)
class CausalParts:
    """Body and head of one causal language model; they share its weights."""

    body: nn.Module
    head: LogitsHead
    config: PretrainedConfig
    """The text config of the model."""


@cache
def takes_positions(body: type[nn.Module]) -> bool:
    """Whether a body's forward knows `position_ids`; ALiBi models (BLOOM, MPT) do not."""
    return "position_ids" in inspect.signature(body.forward).parameters


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module inside; afterwards each has its own mode back (`train()` would set them all alike)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def autocasting(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Compute products in `dtype` inside; None leaves the precision alone."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def unwrap_adapters(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper (with its adapters in place), or the model itself."""
    if not hasattr(model, "peft_config"):
        return model
    for name, settings in model.peft_config.items():
        if getattr(settings, "is_prompt_learning", False):
            raise ModelError(
                "adapters that add virtual tokens are not supported",
                where=f"adapter {name!r}",
                got=str(settings.peft_type),
                remedy="Use LoRA.",
            )
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@torch.no_grad()
def split_model(model: Any) -> CausalParts:
    """Take a causal language model apart and make sure that the parts equal the whole.

    Args:
        model: A transformers causal language model, bare or with LoRA adapters.

    Returns:
        Its body, head and text config.

    Raises:
        ModelError: The model has no separate output layer, or does something to its hidden states or logits that
            `LogitsHead` does not repeat.
    """
    base = unwrap_adapters(model)
    config = base.config.get_text_config()
    body = getattr(base, base.base_model_prefix, None)
    module = base.get_output_embeddings()
    if body is None or body is base or module is None:
        raise ModelError(
            "the model has no separate body and output layer",
            got=type(base).__name__,
            expected="a model of AutoModelForCausalLM",
        )
    parts = CausalParts(body=body, head=_make_head(module, config), config=config)
    _probe(base, parts)
    return parts


def _make_head(module: nn.Module, config: PretrainedConfig) -> LogitsHead:
    """Read the known adjustments from the config; a wrong guess is caught by the probe."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitsHead(module=module, scale=scale, softcap=float(softcap) if softcap else None)


def _probe(base: PreTrainedModel, parts: CausalParts) -> None:
    """Run the model once on two tokens with its head replaced by known logits, and compare what comes out.

    The known logits span -60..60, so that soft-capping shows, which on a fresh model's small logits it would not.
    """
    seen: list[Tensor] = []
    vocabulary = parts.config.vocab_size
    device = base.get_input_embeddings().weight.device
    if device.type == "meta":
        return
    dtype = base.get_input_embeddings().weight.dtype
    known = torch.linspace(-60.0, 60.0, vocabulary, device=device, dtype=dtype).expand(1, 2, vocabulary)

    def replace_logits(_module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        seen.append(arguments[0])
        return known.clone()

    input_ids = torch.tensor([[0, min(1, vocabulary - 1)]], device=device)
    attended = torch.ones_like(input_ids)
    with evaluating(base), parts.head.module.register_forward_hook(replace_logits):
        logits = base(input_ids=input_ids, attention_mask=attended, use_cache=False).logits
        hidden = parts.body(input_ids=input_ids, attention_mask=attended, use_cache=False)[0]
    precision = 1e-3 if dtype in (torch.float32, torch.float64) else 2e-2
    tolerance = {"rtol": precision, "atol": precision}
    same_hidden = len(seen) == 1 and seen[0].shape == hidden.shape and torch.allclose(seen[0], hidden, **tolerance)
    expected = parts.head.adjust(known)
    same_logits = logits.shape == expected.shape and torch.allclose(logits.to(expected.dtype), expected, **tolerance)
    if not (same_hidden and same_logits):
        raise ModelError(
            "the model changes its "
            + ("logits after" if same_hidden else "hidden states before")
            + " the output layer in a way this toolkit does not know",
            got=type(base).__name__,
            expected="output layer, optional scale (logit_scale, logits_scaling), optional final_logit_softcapping",
            remedy="Please report the model type.",
        )
