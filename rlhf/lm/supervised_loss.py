"""What supervised fine-tuning needs of a model on a CPU, through the passes that reinforcement learning has.

TRL's trainer asks its model for the log-probs of labels instead of logits (`fused_lm_head=True`). TRL's own answer runs
the model's layers over padding too and, on a CPU, the head over every position. Here padding is never computed where
the body has a fused pass, the head sees only the positions that have a label, and its logits exist a chunk at a time.
On other devices, and for models that cannot be taken apart, TRL's answer stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from rlhf.errors import ModelError
from rlhf.lm.backbone import CausalParts, split_model, unwrap_adapters
from rlhf.lm.fused_training_probe import exact_fused_pass
from rlhf.lm.log_probs import labelled_log_probs
from rlhf.lm.token_layout import rows_alone

UNLABELLED = -100
"""The label of a position that nothing is learned from, in transformers and TRL."""
_KNOWN = {"input_ids", "attention_mask", "position_ids", "use_cache"}
"""Arguments under which the computation here is the model's own."""


@dataclass
class ScoredLabels(ModelOutput):
    """What TRL's trainer reads, each [B, S - 1]: of position t, the label of t + 1."""

    log_probs: Tensor | None = None
    """Nats; 0 without a label."""
    entropy: Tensor | None = None
    """Nats; 0 without a label."""
    is_top1: Tensor | None = None
    """Whether the label is the most likely token; False without one."""
    label_mask: Tensor | None = None
    """Whether there is a label."""


def score_labels_on_cpu(model: Any) -> None:
    """Let a model that TRL's SFTTrainer prepared answer for its labels as the module says.

    Args:
        model: Bare or with adapters; its `forward` is replaced, everything but `fused_lm_head=True` goes to the former.
    """
    base = unwrap_adapters(model)
    try:
        parts = split_model(model)
    except ModelError:  # the model does more to its logits than is known here
        return
    former = base.forward

    @wraps(type(base).forward)  # `generate` reads the signature
    def forward(self: Any, *arguments: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        del self
        if not fused_lm_head:
            return former(*arguments, **named)
        labels = named.get("labels")
        if arguments or labels is None or not _is_known(parts, {name for name in named if name != "labels"}):
            return former(*arguments, fused_lm_head=True, **named)
        return _score(parts, labels, **{name: value for name, value in named.items() if name != "labels"})

    base.forward = MethodType(forward, base)


def _is_known(parts: CausalParts, names: set[str]) -> bool:
    """Whether the arguments are known and all weights lie, whole, in the CPU's memory."""
    weights = [*parts.body.parameters(), *parts.head.parameters()]
    return names <= _KNOWN and all(
        weight.device.type == "cpu" and not hasattr(weight, "placements") for weight in weights
    )


def _score(parts: CausalParts, labels: Tensor, **named: Any) -> ScoredLabels:
    following = labels[:, 1:]
    mask = following != UNLABELLED
    places = torch.nn.functional.pad(mask, (0, 1)).flatten().nonzero().squeeze(1)  # of [B * S]
    hidden = _hidden_states(parts, places, **named)
    scored = labelled_log_probs(hidden, parts.head, following[mask])
    log_probs, entropy, is_top1 = (one.new_zeros(mask.shape).masked_scatter(mask, one) for one in scored)
    return ScoredLabels(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)


def _hidden_states(parts: CausalParts, places: Tensor, **named: Any) -> Tensor:
    """[N, H] at `places` of the flattened rows."""
    ids, mask = named["input_ids"], named.get("attention_mask")
    fused = exact_fused_pass(parts.body) if mask is not None and "position_ids" not in named else None
    if fused is not None and mask is not None:
        lengths = mask.sum(dim=1)
        if bool((mask[:, 1:] <= mask[:, :-1]).all()):  # padding is on the right
            layout = rows_alone(ids, lengths)
            return fused(layout, layout.token_of_place[places])
    hidden = parts.body(**named | {"use_cache": False})[0]
    return hidden.flatten(0, 1).index_select(0, places)
