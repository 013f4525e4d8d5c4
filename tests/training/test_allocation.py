"""Freed memory is kept, unless the user chose otherwise."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from rlhf.training.allocation import keep_freed_memory
torch.set_num_threads(1)
kept = keep_freed_memory()
def use():
    torch.ones(2**22), torch.ones(2**21)  # 16 and 8 MiB
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment):
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC", "LD_PRE"))}
    command = [sys.executable, "-c", FAULTS]
    output = subprocess.run(command, env=known | environment, check=True, capture_output=True, text=True).stdout
    kept, count = output.split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_large_tensors_find_their_pages_again():
    kept, count = faults()
    assert kept
    assert count < 1000  # ten times 24 MiB are 61,440 pages of 4 KiB


def test_a_users_own_settings_stand():
    kept, _ = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
