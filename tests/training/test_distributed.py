"""Set-ups of accelerate that the learner cannot honour are refused; seeds and generator states."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType

from rlhf.errors import ConfigError
from rlhf.training.distributed import (
    preserved_random_state,
    random_state,
    refuse_unsupported,
    seed_everything,
    set_random_state,
)


def draws():
    return random.random(), float(np.random.rand()), torch.rand(1).item(), float(np.random.randn())


def stand_in(kind, *, fsdp2=True, precision="bf16", loads=False):
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(cpu_ram_efficient_loading=loads))
    return SimpleNamespace(distributed_type=kind, is_fsdp2=fsdp2, mixed_precision=precision, state=state)


@pytest.mark.parametrize(
    ("kind", "fsdp2", "precision", "message"),
    [
        (DistributedType.MULTI_GPU, False, "fp16", "Set mixed_precision to bf16"),
        (DistributedType.DEEPSPEED, False, "bf16", "owns the backward pass"),
        (DistributedType.FSDP, False, "bf16", "fsdp_version to 2"),
    ],
)
def test_unsupported_set_ups_are_refused(kind, fsdp2, precision, message):
    accelerator = stand_in(kind, fsdp2=fsdp2, precision=precision)
    with pytest.raises(ConfigError, match=message):
        refuse_unsupported(accelerator)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.FSDP])
def test_supported_set_ups_are_not(kind):
    assert refuse_unsupported(stand_in(kind)) is None


def test_weights_that_accelerate_would_load_anew_are_refused():
    with pytest.raises(ConfigError, match=r"fsdp2\.yaml"):
        refuse_unsupported(stand_in(DistributedType.FSDP, loads=True))


def test_a_seed_and_a_saved_state_repeat_all_draws():
    seed_everything(5)
    first = draws()
    state = random_state()
    second = draws()
    seed_everything(5)
    assert draws() == first
    set_random_state(state)
    assert draws() == second
    assert first != second


def test_a_preserved_state_survives_what_happens_inside():
    seed_everything(6)
    expected = draws()
    seed_everything(6)
    with preserved_random_state():
        draws()
    assert draws() == expected
