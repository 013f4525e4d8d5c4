"""Sharded weights (FSDP2) made whole for a while: to generate and to measure, or to save."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlhf.training.optimizer import whole


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 holds any of a module's weights in shards."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Gather the weights of a sharded module once, and let them go again afterwards; nothing where it is not sharded.

    Inside, forwards of any part of the module need no other process: processes may make different numbers of them,
    as in generation, where one is done before another. Entering gathers, so all processes must do it alike. The
    sharded weights must not change inside.

    Args:
        module: A policy.
    """
    shards = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not shards:
        yield
        return
    # The first part whose forward runs would take itself for the root, and a layer is not. There is no public way.
    shards[0]._get_fsdp_state()._lazy_init()
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    try:
        yield
    finally:
        plugin = AcceleratorState().fsdp_plugin
        for shard in shards:
            shard.reshard()
            shard.set_reshard_after_forward(bool(plugin.reshard_after_forward), recurse=False)


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Put whole parameters in the place of sharded ones, so that a state dict taken inside is an ordinary one.

    `whole_weights` would not do: FSDP2 shards its weights again before it hands out a state dict. Entering gathers, so
    all processes must do it alike.

    Args:
        module: A policy.
    """
    places = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part._parameters.items()
        if isinstance(parameter, DTensor)
    ]
    gathered: dict[int, nn.Parameter] = {}
    for _, _, parameter in places:  # a tied one once
        if id(parameter) not in gathered:
            gathered[id(parameter)] = nn.Parameter(whole(parameter.detach()), requires_grad=parameter.requires_grad)
    try:
        for part, name, parameter in places:
            part._parameters[name] = gathered[id(parameter)]
        yield
    finally:
        for part, name, parameter in places:
            part._parameters[name] = parameter
