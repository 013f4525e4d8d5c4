"""How many threads small networks may use: one is fastest, and more fight over a busy machine's cores."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import torch

_SETTERS = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


def limit_threads(count: int) -> None:
    """Let torch, and the OpenBLAS inside NumPy's wheels, use `count` threads in this process.

    OpenBLAS reads OMP_NUM_THREADS only while NumPy is imported, which has long happened when a config says how many.
    Its threads wait by spinning: on a busy machine that made a CartPole run thirty times slower. A NumPy built on
    another library (Accelerate, MKL) is left as it is.
    """
    torch.set_num_threads(count)
    for library in openblas_libraries():
        for name in _SETTERS:
            if hasattr(library, name):
                getattr(library, name)(count)
                break


def openblas_libraries() -> list[ctypes.CDLL]:
    """Return the OpenBLAS libraries that came with NumPy; opening a loaded library gives that very one."""
    package = Path(np.__file__).parent
    folders = (package.parent / "numpy.libs", package / ".dylibs")
    return [ctypes.CDLL(str(file)) for folder in folders for file in sorted(folder.glob("*openblas*"))]
