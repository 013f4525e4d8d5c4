"""Memory of the C library between one large tensor and the next.

glibc gives the end of its heap back to the system as soon as some of it is free, and maps large tensors one by one. A
training step on a CPU makes and frees the same tensors again and again; each time the system has to find, clear and map
their pages anew, 80,000 faults in a step of `benchmarks/ppo.py`.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

MMAP_THRESHOLD = 2**26
"""Bytes from which a block is mapped on its own: 64 MiB."""
TRIM_THRESHOLD = 2**29
"""Free bytes at the heap's end that are kept: 512 MiB."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Where a user chose otherwise."""


@cache
def keep_freed_memory() -> bool:
    """Let this process keep up to 512 MiB that it freed, for its next large tensors.

    Returns:
        False where nothing was done: another C library than glibc, or environment variables that choose for themselves.
    """
    if any(os.environ.get(name) for name in _VARIABLES):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # other libraries' mallopt means something else, or is missing
    except (AttributeError, OSError, TypeError):
        return False
    done = [library.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD), library.mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)]
    return all(done)
