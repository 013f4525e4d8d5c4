"""GAE over [512, 4096] float32: the scan of `rlhf.core.advantages` against one dependent step after another.

    python benchmarks/core.py [--rows 512] [--steps 4096] [--repeats 5] [--write]

Both are timed in turn within one run, on one thread, and the ratio of their medians is printed; the absolute times
belong to the machine and to what else runs on it. `--write` replaces benchmarks/results/core.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rlhf.core.advantages import gae

DISCOUNT, GAE_LAMBDA = 0.99, 0.95
RESULTS = Path(__file__).parent / "results" / "core.md"


def make_segment(rows: int, steps: int) -> dict[str, Tensor]:
    """Random rewards and values, one end in 200 steps, one masked step in 20."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(rows, steps, generator=generator) < 0.95
    return {
        "rewards": torch.randn(rows, steps, generator=generator),
        "values": torch.randn(rows, steps, generator=generator),
        "next_values": torch.randn(rows, steps, generator=generator),
        "episode_ends": (torch.rand(rows, steps, generator=generator) < 0.005) & mask,
        "mask": mask,
    }


def gae_by_scan(segment: dict[str, Tensor]) -> Tensor:
    return gae(**segment, discount=DISCOUNT, gae_lambda=GAE_LAMBDA)[0]


def gae_by_loop(segment: dict[str, Tensor]) -> Tensor:
    """The usual loop, vectorised over rows, with its [T, B] storage, which spares it strided columns."""
    rewards, values, next_values, ends, mask = (
        segment[name].T.contiguous() for name in ("rewards", "values", "next_values", "episode_ends", "mask")
    )
    going_on = (~ends).to(values.dtype)
    advantages, later = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + DISCOUNT * next_values[t] - values[t]
        later = torch.where(mask[t], delta + DISCOUNT * GAE_LAMBDA * going_on[t] * later, later)
        advantages[t] = torch.where(mask[t], later, 0.0)
    return advantages.T


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="replace benchmarks/results/core.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "| shape | loop ms | scan ms | loop / scan | largest difference |",
        "|---|---|---|---|---|",
    ]
    for rows, steps in [(8, 128), (64, 512), (arguments.rows, arguments.steps)]:
        segment = make_segment(rows, steps)
        difference = (gae_by_scan(segment) - gae_by_loop(segment)).abs().max().item()
        loops, scans = [], []
        for _ in range(arguments.repeats):
            loops.append(seconds(lambda segment=segment: gae_by_loop(segment)))
            scans.append(seconds(lambda segment=segment: gae_by_scan(segment)))
        loop, scan = statistics.median(loops), statistics.median(scans)
        lines.append(
            f"| [{rows}, {steps}] | {1e3 * loop:.1f} | {1e3 * scan:.2f} | {loop / scan:.1f} | {difference:.1e} |"
        )
        print(lines[-1] if len(lines) > 3 else "\n".join(lines))
    if arguments.write:
        head = (
            "# GAE: scan against loop\n\n`python benchmarks/core.py --write`; float32, one thread, median of "
            f"{arguments.repeats}; torch {torch.__version__}, {platform.machine()} {platform.system()}.\n\n"
        )
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
