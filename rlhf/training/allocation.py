"""Memory of the C library between one large tensor and the next.

glibc gives the end of its heap back to the system as soon as some of it is free, and maps large tensors one by one. A
training step on a CPU makes and frees the same tensors again and again; each time the system has to find, clear and map
their pages anew, 80,000 faults in a step of `benchmarks/ppo.py`.

Kept memory has a price: tensors whose sizes change from one iteration to the next (episodes of text) leave holes in the
heap that nothing fits into, 80 MiB an iteration of the recipe `text_environment`. `release_holes` gives them back.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

MMAP_THRESHOLD = 2**26
"""Bytes from which a block is mapped on its own: 64 MiB."""
TRIM_THRESHOLD = 2**29
"""Free bytes at the heap's end that are kept: 512 MiB."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Where a user chose otherwise."""


class _HeapUse(ctypes.Structure):
    """What `mallinfo2` returns: bytes, but for the counts of chunks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


@cache
def keep_freed_memory() -> bool:
    """Let this process keep up to 512 MiB that it freed, for its next large tensors.

    Returns:
        False where nothing was done: another C library than glibc, or environment variables that choose for themselves.
    """
    library = _glibc()
    if library is None:
        return False
    done = [library.mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD), library.mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD)]
    return all(done)


def release_holes() -> bool:
    """Give the system all that is free in the heap, once more than 512 MiB of memory lie free; for between iterations.

    Returns:
        Whether it was done; never where `keep_freed_memory` does nothing.
    """
    library = _glibc()
    if library is None or _resident_bytes() - _bytes_in_use(library) <= TRIM_THRESHOLD:
        return False
    return bool(library.malloc_trim(0))


@cache
def _glibc() -> Any | None:
    """The C library, where it is glibc 2.33 or later and nobody chose settings of its allocator."""
    if any(os.environ.get(name) for name in _VARIABLES):
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # other libraries' mallopt means something else, or is missing
        library.mallinfo2.restype = _HeapUse
    except (AttributeError, OSError, TypeError):
        return None
    return library


def _resident_bytes() -> int:
    """Anonymous memory of this process that is in RAM."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _bytes_in_use(library: Any) -> int:
    use = library.mallinfo2()
    return use.uordblks + use.hblkhd
