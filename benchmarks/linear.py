"""Linear layers through oneDNN against torch's own: forward and backward, exact float32 on both sides.

    python benchmarks/linear.py              # prints a table, writes benchmarks/results/linear.md

Both compute the same products; `rlhf/training/linear.py` says when it chooses which. "Packed" multiplies by a weight
that lies in oneDNN's own layout already, as in decoding. The other tables have the weight's gradient on one and on two
threads: as oneDNN's product of a transposed copy, and as the gradient of a 1 x 1 convolution. Each figure is the best
of several rounds, the sides taking turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf.training.linear import _image_height, _Linear, _product, convolved_gradient, linear, pack

SHAPES = [
    (2048, 128, 512),
    (2048, 512, 128),
    (2048, 384, 1536),
    (64, 128, 1024),
    (64, 384, 1536),
    (256, 256, 256),
    (16, 128, 1024),
    (16, 384, 3072),
]
"""Rows, inputs, outputs."""
GRADIENT_SHAPES = [
    (rows, *widths)
    for rows in (1024, 2064, 4128, 9216)
    for widths in ((128, 128), (128, 384), (128, 512), (384, 1536), (896, 896), (1024, 1024))
]
RESULTS = Path(__file__).parent / "results" / "linear.md"


def seconds_of(action: Callable[[], object], repeats: int) -> float:
    """Mean seconds of one call over a round."""
    started = time.perf_counter()
    for _ in range(repeats):
        action()
    return (time.perf_counter() - started) / repeats


def best_of(sides: list[Callable[[], object]], *, work: float, rounds: int) -> list[float]:
    """Best seconds of each side over the rounds, taking turns."""
    repeats = max(1, int(1e9 / work))
    best = [float("inf")] * len(sides)
    for _ in range(rounds):
        best = [min(known, seconds_of(side, repeats)) for known, side in zip(best, sides, strict=True)]
    return best


def measure(rows: int, inputs: int, outputs: int, *, rounds: int) -> str:
    """One row of the table."""
    data = torch.randn(rows, inputs, requires_grad=True)
    weight = torch.randn(outputs, inputs, requires_grad=True)
    slope = torch.randn(rows, outputs)

    def forward_of(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                function(data, weight)

        return run

    def step_of(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(data, weight), [data, weight], slope)

    def onednn(one: Tensor, other: Tensor) -> Tensor:
        return _Linear.apply(one, other, None)  # type: ignore[return-value]

    work = 2.0 * rows * inputs * outputs
    packed = pack(weight)
    sides = [nn.functional.linear, onednn, lambda one, other: linear(one, other, packed=packed)]
    *forward, repeated = best_of([forward_of(side) for side in sides], work=work, rounds=rounds)
    both = best_of([step_of(nn.functional.linear), step_of(onednn)], work=3 * work, rounds=rounds)
    rates = [work / forward[0], work / forward[1], 3 * work / both[0], 3 * work / both[1]]
    default, ours, default_both, ours_both = (rate / 1e9 for rate in rates)
    return (
        f"| {rows} x {inputs} x {outputs} | {default:.0f} | {ours:.0f} | {ours / default:.2f} "
        f"| {work / repeated / 1e9:.0f} | {forward[1] / repeated:.2f} "
        f"| {default_both:.0f} | {ours_both:.0f} | {ours_both / default_both:.2f} |"
    )


def measure_gradient(rows: int, inputs: int, outputs: int, *, rounds: int) -> str:
    """One row of a table of gradients."""
    data, slope = torch.randn(rows, inputs), torch.randn(rows, outputs)
    work = 2.0 * rows * inputs * outputs
    height = _image_height(slope, data)
    tried = height or (251 if rows > 16 * 251 else 127)
    sides = [lambda: _product(data.t(), slope.t(), None).t(), lambda: convolved_gradient(slope, data, height=tried)]
    product, convolved = (work / seconds / 1e9 for seconds in best_of(sides, work=work, rounds=rounds))
    chosen = "product" if height is None else "convolution"
    return f"| {rows} x {inputs} x {outputs} | {product:.0f} | {convolved:.0f} | {convolved / product:.2f} | {chosen} |"


def main() -> None:
    """Measure every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [
        "# Linear layers: torch's own product and oneDNN's",
        "",
        f"GFLOP/s, float32, {options.threads} thread(s), torch {torch.__version__}, "
        "written by `python benchmarks/linear.py`.",
        "",
        "| rows x inputs x outputs | torch, forward | oneDNN | ratio "
        "| oneDNN, packed | to oneDNN | torch, forward and backward | oneDNN | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape in SHAPES:
        lines.append(measure(*shape, rounds=options.rounds))
        print(lines[-1], flush=True)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        lines += [
            "",
            f"The weight's gradient on {threads} thread(s), and what `weight_gradient` chooses:",
            "",
            "| rows x inputs x outputs | product | convolution | ratio | chosen |",
            "|---|---|---|---|---|",
        ]
        for shape in GRADIENT_SHAPES:
            lines.append(measure_gradient(*shape, rounds=options.rounds))
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
