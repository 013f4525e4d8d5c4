"""Processes: the accelerator, sums over processes, seeds.

On GPUs start with `accelerate launch`; on CPUs with `torchrun` (`accelerate launch --cpu` starts one process only).
Collectives are few and stacked: pairing tensors by iterating over names would pair different names on different ranks.
"""

from __future__ import annotations

import atexit
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from torch import Tensor

from rlhf.core.masking import Reduce, identity
from rlhf.errors import ConfigError


def make_accelerator(*, mixed_precision: Literal["no", "bf16"] | None = None) -> Accelerator:
    """Return the accelerator of this process: GPUs where there are some, else CPU (gloo between processes).

    Args:
        mixed_precision: "bf16" runs the policy's forward in bfloat16 and returns float32; None takes what the
            launcher says.

    Raises:
        ConfigError: float16, which needs loss scaling that skips steps silently.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=mixed_precision)
    refuse_unsupported(accelerator)
    return accelerator


def refuse_unsupported(accelerator: Accelerator) -> None:
    """Refuse set-ups in which the learner's gradients would not be what it says.

    Raises:
        ConfigError: float16, DeepSpeed, Megatron, FSDP1, or FSDP2 that loads weights itself.
    """
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ConfigError(
            "this mixed precision scales losses and skips steps silently",
            where="accelerate's settings",
            got=accelerator.mixed_precision,
            expected="no or bf16",
            remedy="Set mixed_precision to bf16.",
        )
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED or kind == DistributedType.MEGATRON_LM:
        raise ConfigError(
            "this engine owns the backward pass and the step, which the learner needs",
            where="accelerate's settings",
            got=kind.value,
            expected="multi-GPU (DDP) or FSDP2",
            remedy="Choose one of them in `accelerate config`.",
        )
    if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ConfigError(
            "FSDP1 renames and flattens the parameters that checkpoints are saved by",
            where="accelerate's settings",
            expected="fsdp_version: 2",
            remedy="Set fsdp_version to 2 in accelerate's config file.",
        )
    if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "every process has loaded the policy already, and loading it anew would untie its tied weights",
            where="accelerate's settings",
            got="fsdp_cpu_ram_efficient_loading: true",
            expected="false",
            remedy="Take recipes/accelerate/fsdp2.yaml.",
        )


def make_reduce(accelerator: Accelerator) -> Reduce:
    """Return the sum over processes, as `estimate` and `standardize` want it; the identity for one process."""
    if accelerator.num_processes == 1:
        return identity

    def reduce(tensor: Tensor) -> Tensor:
        total = tensor.detach().to(accelerator.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    return reduce


def end_worker() -> NoReturn:
    """End one process of several after its run, without Python's own finalization.

    While that runs, threads of torch's process group can still ask for Python's lock, and the process then ends with
    SIGABRT ("terminate called without an active exception") after a good run: 3 of 30 runs of two processes over gloo,
    also with the group destroyed before. Exit functions run and streams are flushed as usual.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def gather_stack(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Return the tensors of all processes, stacked by rank: [P, ...] on the CPU."""
    if accelerator.num_processes == 1:
        return tensor.cpu().unsqueeze(0)
    own = tensor.detach().to(accelerator.device).contiguous()
    everywhere = [torch.empty_like(own) for _ in range(accelerator.num_processes)]
    dist.all_gather(everywhere, own)
    return torch.stack(everywhere).cpu()


def gather_objects(accelerator: Accelerator, value: Any) -> list[Any]:
    """Return the value of every process, by rank."""
    return [value] if accelerator.num_processes == 1 else gather_object([value])


def on_main_process_first_failing(accelerator: Accelerator, action: Callable[[], None]) -> None:
    """Run `action` on the main process; if it raises there, raise the same error everywhere.

    Without this the other processes would wait for the main one until their time-out.
    """
    outcome: list[Exception | None] = [None]
    if accelerator.is_main_process:
        try:
            action()
        except Exception as error:
            if accelerator.num_processes == 1:
                raise
            outcome = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if outcome[0] is not None:
        raise outcome[0]


def seed_everything(seed: int) -> None:
    """Seed the global generators of python, numpy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of the global generators, made of tensors and numbers only."""
    numpy_state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Leave the global generators as they were: looking at a run (evaluation) must not change it."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
