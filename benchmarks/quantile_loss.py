"""QR-DQN's loss over sorted targets against the same loss over all pairs of quantiles, side by side.

    python benchmarks/quantile_loss.py        # writes benchmarks/results/quantile_loss.md

The pairwise form is equation 10 of QR-DQN as it is usually written, gradient included, with as few passes as it needs.
Both sides take turns; the best of several rounds counts, one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from classic_rl.distributional import quantile_loss

SHAPES = ((64, 2, 10), (128, 2, 25), (32, 6, 200), (128, 4, 170))
"""Batch, actions, quantiles; 170 and 200 are those of the recipe for LunarLander and of QR-DQN's paper."""
ROUNDS = 7


def pairwise(outputs: Tensor, actions: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [B], and the gradient of their mean with respect to the outputs."""
    rows = torch.arange(len(actions))
    quantiles = outputs[rows, actions]
    size = quantiles.shape[1]
    levels = (torch.arange(size, dtype=quantiles.dtype) + 0.5) / size
    difference = target[:, None, :] - quantiles[:, :, None]  # [B, M, K]
    side = (levels[:, None] - (difference < 0).to(quantiles.dtype)).abs()
    slope = difference.clamp(-1.0, 1.0)
    losses = (side * slope * (difference - 0.5 * slope)).mean(dim=-1).sum(dim=-1)
    gradient = torch.zeros_like(outputs)
    gradient[rows, actions] = -(side * slope).mean(dim=-1) / len(actions)
    return losses, gradient


def mean_time(function: Callable[[], object], repeats: int) -> float:
    """Milliseconds of one call, over one round."""
    started = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - started) / repeats * 1e3


def main() -> None:
    """Measure every shape."""
    torch.set_num_threads(1)
    lines = [
        "# QR-DQN's loss and gradient: all pairs against sorted targets",
        "",
        f"Best of {ROUNDS} alternating rounds, one thread, torch {torch.__version__}. Written by "
        "`python benchmarks/quantile_loss.py`.",
        "",
        "| batch x quantiles | pairs ms | sorted ms | ratio | largest difference of gradients |",
        "|---|---|---|---|---|",
    ]
    for batch, count, size in SHAPES:
        torch.manual_seed(0)
        outputs, target = 100 * torch.randn(batch, count, size), 100 * torch.randn(batch, size)
        actions = torch.randint(count, (batch,))
        ours = lambda o=outputs, a=actions, t=target: quantile_loss(o, a, t)  # noqa: E731
        theirs = lambda o=outputs, a=actions, t=target: pairwise(o, a, t)  # noqa: E731
        gap = float((ours().gradient - theirs()[1]).abs().max())
        repeats = 10 if size > 100 else 300
        rounds = [(mean_time(theirs, repeats), mean_time(ours, repeats)) for _ in range(ROUNDS)]
        pairs, ordered = (min(column) for column in zip(*rounds, strict=True))
        lines.append(f"| {batch} x {size} | {pairs:.3f} | {ordered:.3f} | {pairs / ordered:.2f} | {gap:.1e} |")
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "results" / "quantile_loss.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
