"""The frozen reference of the KL leash: the policy as it was before training."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from rlhf.errors import ModelError
from rlhf.lm.adapters import POLICY, AdapterSwitch
from rlhf.lm.compilation import compile_layers, compiled_backend
from rlhf.lm.policy import LanguageModelPolicy


class FrozenReference:
    """Log-probs under the policy's weights at the moment this object is made.

    A policy with LoRA adapters is its own reference with the adapters switched off: no second model in memory.
    Otherwise the weights are copied into a freshly built model. `copy.deepcopy` would not do: after a
    transformers or TRL trainer has run in the process, a deep copy's `forward` is bound to the *original* module,
    and the KL is 0 forever.

    Args:
        policy: The policy before its first update; its critic is not copied.

    Raises:
        ModelError: The policy's adapters were trained already, so that switching them off gives another model.
    """

    def __init__(self, policy: LanguageModelPolicy) -> None:
        self._switch: AdapterSwitch | None = None
        if hasattr(policy.model, "peft_config"):
            _require_untrained_adapters(policy.model)
            self._policy, self._switch = policy, AdapterSwitch(policy.model)
            return
        model = clone_model(policy.model).requires_grad_(False)
        self._policy = LanguageModelPolicy(model, temperature=policy.temperature, chunk_tokens=policy.chunk_tokens)

    @torch.no_grad()
    def log_probs(self, inputs: Mapping[str, Tensor], actions: Tensor) -> Tensor:
        """[B, T] log-probs of `actions` under the reference, float32; arguments as for `LanguageModelPolicy`."""
        with self._adapters_off():
            return self._policy.action_log_probs(inputs, actions)

    def to(self, device: torch.device | str) -> FrozenReference:
        """Move the frozen copy; adapters live with their policy."""
        if self._switch is None:
            self._policy.to(device)
        return self

    @property
    def uses_adapters(self) -> bool:
        """Whether it is the policy with its adapters off, rather than a copy."""
        return self._switch is not None

    def _adapters_off(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._switch is None else self._switch.only(None)


def clone_model(model: Any) -> Any:
    """A new model of the same class and config with a copy of the weights, sharing nothing with `model`."""
    config = copy.deepcopy(model.config)
    weights = model.state_dict()
    dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
    fresh = type(model)._from_config(config, dtype=dtype)
    fresh.load_state_dict(weights)
    backend = compiled_backend(model)
    if backend is not None:  # another arithmetic than the policy's would give a KL before the first update
        compile_layers(fresh, backend)
    return fresh.to(model.device).eval()


def _require_untrained_adapters(model: Any) -> None:
    """Fresh LoRA has B = 0; anything else means that adapters-off is not the model as it is now."""
    for name, parameter in model.named_parameters():
        changes = f"lora_B.{POLICY}." in name or f"lora_embedding_B.{POLICY}" in name
        if changes and bool(parameter.detach().ne(0).any()):
            raise ModelError(
                "the adapters were trained before, so switching them off gives the base model, not this policy",
                where=name,
                remedy="Load the adapter folder by its path: it is merged, and fresh adapters go on top.",
            )
