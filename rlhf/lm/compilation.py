"""torch.compile, layer by layer: one graph serves all layers of a kind, whatever the batch's shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.errors import ModelError

CompileBackend = Literal["inductor", "aot_eager", "eager"]

_BACKEND = "_compiled_by"
"""Attribute of a compiled layer: the backend's name."""


def compile_layers(model: nn.Module, backend: CompileBackend) -> None:
    """Compile the forward of every transformer layer in place, names and weights untouched.

    Layers rather than the whole model: they are compiled once for all, checkpointing and adapters stay outside or
    inside as they are, and the head with its chunks is not part of them. Shapes are dynamic, because every microbatch
    has another one.

    Args:
        model: A transformers model, bare or with adapters, or a part of one.
        backend: `inductor` writes fused kernels; the others run the traced graph as it is, which shows whether a model
            can be traced.

    Raises:
        ModelError: The model has no layers of the kind transformers marks.
    """
    layers = list(_layers(model))
    if not layers:
        raise ModelError(
            "the model has no layers that could be compiled one by one",
            where="model.compile",
            got=type(model).__name__,
            remedy="Set model.compile to null.",
        )
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)
        setattr(layer, _BACKEND, backend)


def compiled_backend(model: nn.Module) -> CompileBackend | None:
    """What `compile_layers` was told, None where it was not called."""
    return next((getattr(layer, _BACKEND) for layer in _layers(model) if hasattr(layer, _BACKEND)), None)


def uncompiled(model: nn.Module) -> AbstractContextManager[Any]:
    """Run the layers as they were written inside: decoding has a cache, for which every step would be traced anew."""
    return nullcontext() if compiled_backend(model) is None else torch.compiler.set_stance("force_eager")


def _layers(model: nn.Module) -> Iterator[GradientCheckpointingLayer]:
    return (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
