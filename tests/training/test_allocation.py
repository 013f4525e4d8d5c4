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


def run_python(code, **environment):
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC", "LD_PRE"))}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=known | environment, check=True, capture_output=True, text=True).stdout


def faults(**environment):
    kept, count = run_python(FAULTS, **environment).split()
    return kept == "True", int(count)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_large_tensors_find_their_pages_again():
    kept, count = faults()
    assert kept
    assert count < 1000  # ten times 24 MiB are 61,440 pages of 4 KiB


def test_a_users_own_settings_stand():
    kept, _ = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept


HOLES = """
import torch
from pathlib import Path
from rlhf.training.allocation import keep_freed_memory, release_holes
kept = keep_freed_memory()
def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) // 1024
tensors = [torch.ones(2**18) for _ in range({mib})]  # 1 MiB each
before = resident()
tensors = tensors[::2]
intact = sum(float(tensor.sum()) for tensor in tensors) == len(tensors) * 2**18
print(kept, release_holes(), before - resident(), intact)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
@pytest.mark.parametrize(("mib", "released"), [(1400, True), (600, False)])
def test_holes_are_given_back_beyond_a_limit(mib, released):
    output = run_python(HOLES.format(mib=mib))
    kept, done, fallen, intact = output.split()
    assert (kept, done, intact) == ("True", str(released), "True")
    assert (int(fallen) > 0.9 * mib / 2) == released  # MiB; the holes lie between tensors that live on
