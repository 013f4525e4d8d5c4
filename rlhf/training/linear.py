"""Linear layers through oneDNN on CPUs where torch's default float32 product is slow.

torch's CPU builds multiply float32 matrices with Intel's MKL, which takes a slow path on other makers' processors:
on an AMD EPYC with AVX-512, 105 GFLOP/s on one core where oneDNN, which is in the same build, reaches 245 with the
same float32 arithmetic (`benchmarks/linear.py`). Nothing is rounded to a shorter format; results differ in the order
of their sums alone. torch's global switch (`torch.set_float32_matmul_precision`) would allow shorter formats on some
processors, and would reach into other libraries; this module changes only the layers it is given.

`RLHF_CPU_LINEAR=default` turns it off, `RLHF_CPU_LINEAR=onednn` asks for it on any processor.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from rlhf.errors import ConfigError
from rlhf.training.allocation import keep_freed_memory

VARIABLE = "RLHF_CPU_LINEAR"
MIN_PRODUCTS = 2**21
"""Multiplications below which the default is as fast: oneDNN takes some microseconds to start."""
IMAGE_HEIGHTS = (251, 127)
"""Rows of an image where a weight's gradient is computed as that of a convolution: oneDNN has a slower way, which it
takes for heights with small divisors."""
MIN_IMAGES = 16
"""Fewer images of a convolution do not go to oneDNN on one thread."""
MIN_ROWS, MAX_GRADIENT, GRADIENT_PER_ROW = 1024, 2**20, 256
"""From how many rows, and below how many numbers of the gradient, in all and for each row, a convolution is faster."""


@cache
def onednn_pays() -> bool:
    """Whether linear layers on this machine's CPU go through oneDNN: a rule, not a timing, so that runs repeat.

    Raises:
        ConfigError: The environment variable has an unknown value, or asks for what this build of torch lacks.
    """
    wish = os.environ.get(VARIABLE, "auto")
    if wish not in ("auto", "default", "onednn"):
        raise ConfigError("unknown linear layer", where=VARIABLE, got=wish, expected="auto, default or onednn")
    available = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if wish == "onednn" and not available:
        raise ConfigError("this build of torch has no oneDNN", where=VARIABLE, got=wish, expected="auto or default")
    slow_default = torch.backends.mkl.is_available() and _cpu_maker() == "AuthenticAMD"
    return wish == "onednn" or (wish == "auto" and available and slow_default)


def _cpu_maker() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)


def pack(weight: Tensor) -> Tensor | None:
    """Return weight [O, I] in oneDNN's own layout, a copy, or None where oneDNN does not compute its products.

    oneDNN rearranges a matrix in every product; decoding multiplies by the same one at every step. What it saves:
    `benchmarks/linear.py`.
    """
    plain = weight.device.type == "cpu" and weight.dtype is torch.float32
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None) if plain and onednn_pays() else None


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, packed: Tensor | None = None) -> Tensor:
    """Return rows @ weight.T + bias, as `torch.nn.functional.linear` does.

    Args:
        rows: [..., I].
        weight: [O, I].
        bias: [O] or None.
        packed: What `pack` made of `weight`, used where gradients are off.

    Returns:
        [..., O]. Differentiable once where oneDNN computes it.
    """
    if packed is not None and _is_large(rows, weight) and not torch.is_grad_enabled():
        return _product(rows, packed, bias)  # `pack` has asked the rest
    if not _goes_through_onednn(rows, weight):
        return functional.linear(rows, weight, bias)
    if torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad):
        return _Linear.apply(rows, weight, bias)  # type: ignore[return-value]
    return _product(rows, weight, bias)


def linear_onto(
    residual: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, packed: Tensor | None = None
) -> Tensor:
    """Return residual [N, O] + rows [N, I] @ weight.T + bias, in one operation where possible; not differentiable."""
    if _is_large(rows, weight) if packed is not None else _goes_through_onednn(rows, weight):
        matrix = weight if packed is None else packed
        return torch.ops.mkldnn._linear_pointwise.binary(rows, residual, matrix, bias, "add")
    if bias is not None:
        return residual + functional.linear(rows, weight, bias)
    return torch.addmm(residual, rows, weight.t())


def weight_gradient(gradient: Tensor, rows: Tensor) -> Tensor:
    """Return gradient.T @ rows, the gradient [O, I] of a weight, of its output's gradient [N, O] and its rows [N, I].

    A product reads its second operand transposed but has the first copied by one thread, so the narrower one goes
    first. The weight gradient of a 1 x 1 convolution is the same and reads both as they lie; for many rows it is the
    faster one (`benchmarks/linear.py`).
    """
    if not _goes_through_onednn(rows, gradient.t()):
        return gradient.t() @ rows
    if gradient.shape[1] < rows.shape[1]:
        return weight_gradient(rows, gradient).t()
    height = _image_height(gradient, rows)
    if height is not None:
        return convolved_gradient(gradient, rows, height=height)
    return _product(rows.t(), gradient.t(), None).t()


class FastLinear(nn.Linear):
    """`nn.Linear` computed by `linear`; the same parameters and state, so that what is saved does not change."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., I] to [..., O]."""
        return linear(input, self.weight, self.bias)


def use_fast_linear(module: nn.Module) -> None:
    """Let the plain linear layers inside a module compute through `linear`, where that pays on this machine.

    On a CPU it also asks the C library to keep freed memory, see `keep_freed_memory`.

    Layers of other types (quantized, parametrized, adapters) stay as they are. Gradients of gradients are not
    available afterwards.

    Args:
        module: Changed in place; its parameters are not touched.
    """
    if any(parameter.device.type == "cpu" for parameter in module.parameters()):
        keep_freed_memory()
    if onednn_pays():
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = FastLinear


def _is_large(rows: Tensor, weight: Tensor) -> bool:
    return rows.numel() * weight.shape[0] >= MIN_PRODUCTS


def _goes_through_onednn(rows: Tensor, weight: Tensor) -> bool:
    return (
        _is_large(rows, weight)
        and rows.device.type == "cpu"
        and rows.dtype is weight.dtype is torch.float32
        and onednn_pays()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _image_height(gradient: Tensor, rows: Tensor) -> int | None:
    """Rows of an image where a convolution is the faster way to a weight's gradient, else None."""
    count, sizes = len(rows), (gradient.shape[1], rows.shape[1])
    numbers = sizes[0] * sizes[1]
    suits = all(size % 16 == 0 for size in sizes) and gradient.is_contiguous() and rows.is_contiguous()
    if not suits or count < MIN_ROWS or numbers >= min(MAX_GRADIENT, count * GRADIENT_PER_ROW):
        return None
    least = MIN_IMAGES if torch.get_num_threads() == 1 else 1
    return next((height for height in IMAGE_HEIGHTS if count >= least * height), None)


def convolved_gradient(gradient: Tensor, rows: Tensor, *, height: int) -> Tensor:
    """As `weight_gradient`, for contiguous operands: of a 1 x 1 convolution over images of `height` x 1 pixels."""
    count = len(rows) // height
    whole = count * height
    # Channels last: [N, C] is [count, C, height, 1] without a copy.
    images = [one[:whole].view(count, height, 1, -1).permute(0, 3, 1, 2) for one in (gradient, rows)]
    shape = rows.new_empty(1).expand(gradient.shape[1], rows.shape[1], 1, 1)  # its numbers are not read
    geometry = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed or not, groups
    wanted = [False, True, False]
    product = torch.ops.aten.convolution_backward(*images, shape, None, *geometry, wanted)[1].view(shape.shape[:2])
    return product if whole == len(rows) else product.addmm_(gradient[whole:].t(), rows[whole:])


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """Y = X W^T + b; dX = dY W, dW = dY^T X, db = sum of dY over rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weight)
        return _product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight = ctx.saved_tensors
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad
        flat = gradient.reshape(-1, gradient.shape[-1])
        return (
            _product(gradient, weight.t(), None) if needs_rows else None,
            weight_gradient(flat, rows.reshape(-1, rows.shape[-1])) if needs_weight else None,
            flat.sum(dim=0) if needs_bias else None,
        )
