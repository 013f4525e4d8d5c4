"""The record of what a run ran on: versions and hardware, no host names and no paths."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "rlhf-toolkit",
    "torch",
    "accelerate",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "gymnasium",
    "pydantic",
    "vllm",
)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that matter and are installed; nothing is imported."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe_environment(*, processes: int = 1) -> dict[str, Any]:
    """Return versions, hardware and commit, ready for JSON.

    Args:
        processes: How many take part in the run.
    """
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "versions": package_versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "processes": processes,
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Return the toolkit's commit, with "+changes" where files differ from it; None outside a repository."""
    folder = Path(__file__).resolve().parent
    commit = _git(folder, "rev-parse", "HEAD")
    # An installed package may lie inside someone else's repository, whose commit says nothing about it.
    if commit is None or _git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return f"{commit}+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
