"""NumPy's OpenBLAS obeys after it was imported."""

from __future__ import annotations

import pytest
import torch

from classic_rl.threads import limit_threads, openblas_libraries


def test_torch_and_openblas_are_limited():
    libraries = openblas_libraries()
    if not libraries:
        pytest.skip("this NumPy brings no OpenBLAS")
    name = "scipy_openblas_get_num_threads64_"
    if not hasattr(libraries[0], name):
        name = "scipy_openblas_get_num_threads"
    before = (torch.get_num_threads(), getattr(libraries[0], name)())
    limit_threads(1)
    assert torch.get_num_threads() == 1
    assert getattr(libraries[0], name)() == 1
    limit_threads(2)
    assert getattr(libraries[0], name)() == 2
    limit_threads(before[1])
    torch.set_num_threads(before[0])
