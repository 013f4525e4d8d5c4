"""What NumPy does in place of torch's operations, for `rlhf.training.recording`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch


class Untranslatable(Exception):
    """A call that has no counterpart here."""


def _clamped(x: Any, low: Any = None, high: Any = None) -> Any:
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def _power(x: Any, exponent: Any) -> Any:
    return x if exponent == 1 else x * x if exponent == 2 else np.power(x, exponent)


def _expand(arguments: tuple[Any, ...], rows: int) -> Callable[..., Any]:
    """Sizes equal to the number of rows follow it."""
    sizes = arguments[1]
    return lambda x, _, n: np.broadcast_to(x, tuple(n if size == rows else size for size in sizes))


def _filled(value: float) -> Callable[..., Any]:
    return lambda arguments, named: lambda x, *_: np.full_like(x, value)


def _new_zeros(arguments: tuple[Any, ...], named: dict[str, Any]) -> Callable[..., Any]:
    if arguments[1]:
        raise Untranslatable
    del named
    return lambda x, *_: x.dtype.type(0)


def _converted(arguments: tuple[Any, ...], named: dict[str, Any]) -> Callable[..., Any]:
    del arguments
    if set(named) != {"dtype"} or named["dtype"] != torch.float32:
        raise Untranslatable
    return lambda x: x.astype(np.float32)


def _constant(arguments: tuple[Any, ...], named: dict[str, Any]) -> Callable[..., Any]:
    if named.get("dtype") != torch.float32:
        raise Untranslatable
    value = np.float32(arguments[0])
    return lambda _: value


def _summed(x: Any, axes: Any = None, keep: bool = False) -> Any:
    return np.add.reduce(x, axis=None if axes is None else tuple(axes), keepdims=keep)


def _stacked(*parts: Any) -> Any:
    return np.concatenate(parts).reshape(len(parts), *parts[0].shape)


_aten = torch.ops.aten
NUMPY: dict[Any, Callable[..., Any]] = {
    _aten.add.Tensor: np.add, _aten.add.Scalar: np.add,
    _aten.sub.Scalar: np.subtract, _aten.sub.Tensor: np.subtract, _aten.mul.Tensor: np.multiply,
    _aten.div.Tensor: np.divide, _aten.mul.Scalar: np.multiply, _aten.div.Scalar: np.divide,
    _aten.neg.default: np.negative, _aten.exp.default: np.exp, _aten.expm1.default: np.expm1,
    _aten.log.default: np.log, _aten.abs.default: np.abs, _aten.sgn.default: np.sign, _aten.sign.default: np.sign,
    _aten.minimum.default: np.minimum, _aten.maximum.default: np.maximum, _aten.clamp.default: _clamped,
    _aten.pow.Tensor_Scalar: _power, _aten.sum.default: _summed, _aten.sum.dim_IntList: _summed,
    _aten.gt.Scalar: np.greater, _aten.ge.Scalar: np.greater_equal, _aten.lt.Scalar: np.less,
    _aten.le.Scalar: np.less_equal, _aten.eq.Scalar: np.equal, _aten.gt.Tensor: np.greater,
    _aten.ge.Tensor: np.greater_equal, _aten.lt.Tensor: np.less, _aten.le.Tensor: np.less_equal,
    _aten.eq.Tensor: np.equal, _aten.bitwise_and.Tensor: np.logical_and, _aten.bitwise_or.Tensor: np.logical_or,
    _aten.logical_and.default: np.logical_and, _aten.logical_and_.default: np.logical_and,
    _aten.bitwise_not.default: np.logical_not, _aten.where.self: np.where,
    _aten.masked_fill_.Scalar: lambda x, mask, value: np.where(mask, x.dtype.type(value), x),
    _aten.masked_fill.Scalar: lambda x, mask, value: np.where(mask, x.dtype.type(value), x),
    _aten.ones_like.default: _filled(1), _aten.zeros_like.default: _filled(0),
    _aten.new_zeros.default: _new_zeros, _aten.scalar_tensor.default: _constant, _aten._to_copy.default: _converted,
    _aten.stack.default: _stacked, _aten.unbind.int: tuple, _aten.expand.default: _expand,
}  # fmt: skip
"""What NumPy does in place of torch's operation. Operations on bools only: `bitwise_*` and `logical_*` agree there."""
SAME = {_aten.detach.default, _aten.alias.default}
"""Those whose result is their operand."""
MADE = {
    _aten.ones_like.default, _aten.zeros_like.default, _aten.new_zeros.default, _aten.scalar_tensor.default,
    _aten._to_copy.default,
}  # fmt: skip
"""Those whose translation depends on the call's arguments."""
EXPAND = _aten.expand.default
SIZED = {EXPAND}
"""Those that name the number of rows."""
FILLED = {_aten.ones_like.default: 1, _aten.zeros_like.default: 0}
"""Those whose result is one number everywhere."""
ELEMENTWISE = {_clamped, np.where, *(NUMPY[one] for one in (_aten.masked_fill.Scalar, _aten.masked_fill_.Scalar))}
"""Functions of NUMPY that broadcast their operands, besides NumPy's ufuncs."""
