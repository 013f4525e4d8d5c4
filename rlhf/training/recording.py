"""The objective's own operations and their gradient, recorded once and replayed on NumPy arrays.

On a minibatch of 128 single actions the loss is some seventy operations of less than a microsecond's arithmetic each,
and torch, with autograd, needs three to five for every one of them. So the learner of a small policy lets torch run
`rlhf.core.objective` once, notes which operations it and its backward pass consist of, and from then on lets NumPy run
the same list: one implementation of the losses, with cheaper operations. What cannot be noted this way (an operation
without an entry below, a decision that depends on the data) stays with autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf.core.algorithm import AlgorithmConfig, FixedKl, KlInLoss
from rlhf.core.objective import LossSums, Objective
from rlhf.core.types import Experience, PolicyOutput
from rlhf.training.numpy_operations import ELEMENTWISE, EXPAND, FILLED, MADE, NUMPY, SAME, SIZED, Untranslatable
from rlhf.training.update_config import UpdateConfig

MIN_ROWS = 16
"""Fewer are not recorded: a size in the list must be recognizable as the number of rows."""


def can_record(algorithm: AlgorithmConfig, update: UpdateConfig, accelerator: Accelerator) -> bool:
    """Whether recording pays: single actions on the CPU, and coefficients that stay, since they are constants in it.

    It must not depend on the course of a run: a resumed one takes the same operations.
    """
    kl = algorithm.kl
    steady_kl = not isinstance(kl, KlInLoss) or isinstance(kl.coefficient, FixedKl)
    steady = steady_kl and algorithm.adaptive_entropy is None and update.clip_schedule == "constant"
    on_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "no"
    return steady and on_cpu and update.shuffle == "actions"


class RecordedLoss:
    """Loss sums of an objective, and the gradient of its loss with respect to the policy's output.

    Args:
        objective: What is recorded.
        settings: Its keyword arguments: coefficients that stay.
    """

    def __init__(self, objective: Objective, settings: dict[str, float]) -> None:
        """Nothing is recorded yet."""
        self._objective, self.settings = objective, settings
        self._program: _Program | None = None
        self.possible = True

    def ready(self, rows: int) -> bool:
        """Whether a call with so many rows is a replay."""
        return self._program is not None and rows >= MIN_ROWS

    def __call__(
        self, output: PolicyOutput, rows: Experience, denominators: Tensor
    ) -> tuple[LossSums, PolicyOutput] | None:
        """Return the sums, and the gradients of log-probs, entropy and values (None where there is none).

        Args:
            output: [n, 1], on the CPU.
            rows: Single actions, all of which count.
            denominators: [2], of the optimizer step.

        Returns:
            None where it has to be left to autograd.
        """
        if not self.possible or len(rows) < MIN_ROWS:
            return None
        inputs = _inputs(output, rows, denominators)
        if self._program is None:
            self._program = _record(self._objective, self.settings, output, rows, denominators)
            self.possible = self._program is not None
            if self._program is None:
                return None
        return self._program(inputs, len(rows))


def _inputs(output: PolicyOutput, rows: Experience, denominators: Tensor) -> list[Tensor]:
    """Everything that the loss may read, always in this order."""
    facts = [value for value in vars(rows).values() if isinstance(value, Tensor)]
    return [*(value for value in output if value is not None), denominators, *facts]


@dataclass(frozen=True)
class _Step:
    """One function of values at `operands`; its result, or results, go to `places`."""

    function: Callable[..., Any]
    operands: list[int]
    places: list[int]
    several: bool


class _Program:
    """Steps over one list of values: constants, inputs, results."""

    def __init__(
        self, values: list[Any], steps: list[_Step], *, inputs: list[int], results: list[Any], rows_at: int
    ) -> None:
        self._run = _as_function(values, steps, arguments=[*inputs, rows_at], results=results)

    def __call__(self, inputs: Sequence[Tensor], rows: int) -> tuple[LossSums, PolicyOutput]:
        arrays = [(tensor.detach() if tensor.requires_grad else tensor).numpy() for tensor in inputs]
        policy, value, metrics, *slopes = self._run(*arrays, rows)
        gradients = [None if slope is None else _whole(slope, rows) for slope in slopes]
        # One array, because a tensor made from a single number costs as much as from many.
        measured = torch.from_numpy(np.append(metrics, (policy, value)).astype(np.float32, copy=False))
        sums = LossSums(measured[-2], measured[-1], measured[:-2])
        return sums, PolicyOutput(*gradients)  # type: ignore[arg-type]


def _as_function(
    values: list[Any], steps: list[_Step], *, arguments: list[int], results: list[int | None]
) -> Callable[..., tuple[Any, ...]]:
    """Write the steps out as one Python function: a loop over them would cost as much again as they do."""
    known = {f"v{place}": value for place, value in enumerate(values)}
    lines = [f"def run({', '.join(f'v{place}' for place in arguments)}):"]
    for index, step in enumerate(steps):
        known[f"f{index}"] = step.function
        targets = ", ".join(f"v{place}" for place in step.places) + ("," if step.several else "")
        lines.append(f"    {targets} = f{index}({', '.join(f'v{place}' for place in step.operands)})")
    lines.append(f"    return {', '.join('None' if place is None else f'v{place}' for place in results)},")
    exec("\n".join(lines), known)  # nothing but the numbers above is in it
    return known["run"]


def _whole(slope: Any, rows: int) -> Tensor:
    """[rows, 1] of a gradient that NumPy may have left as one number for all rows."""
    shape = (rows, 1)
    complete = isinstance(slope, np.ndarray) and slope.shape == shape and slope.strides[0]
    return torch.from_numpy(slope if complete else np.array(np.broadcast_to(slope, shape)))


# --- recording --------------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Keeps every operation with its tensors alive, so that identities stay unique."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


def _record(
    objective: Objective, settings: dict[str, float], output: PolicyOutput, rows: Experience, denominators: Tensor
) -> _Program | None:
    """Run the objective under torch and translate its operations; None where one has no translation."""
    leaves = PolicyOutput(*(None if x is None else x.detach().clone().requires_grad_() for x in output))  # type: ignore
    wanted = [leaf for leaf in leaves if leaf is not None]
    with torch.enable_grad(), _Recorder() as recorder:
        sums = objective(leaves, rows, **settings)
        loss = objective.loss(sums, denominators)
        found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    slopes = [None if leaf is None else next(found) for leaf in leaves]
    translation = _Translation(len(rows))
    try:
        inputs = [translation.new_place(tensor) for tensor in _inputs(leaves, rows, denominators)]
        for call in recorder.calls:
            translation.add(*call)
        results = [None if x is None else translation.place(x) for x in (*sums, *slopes)]
    except Untranslatable:
        return None
    steps = translation.needed_for([place for place in results if place is not None])
    return _Program(translation.values, steps, inputs=inputs, results=results, rows_at=translation.rows_at)


class _Translation:
    """Turns recorded calls into steps. Every operand, constants too, has a place in one list of values.

    A place is written once: what torch changes in place gets a new one. So equal calls need be made only once. A tensor
    that holds one number for all rows is kept as that number, which NumPy broadcasts where it is used.
    """

    def __init__(self, rows: int) -> None:
        self.values: list[Any] = [None]
        self.steps: list[_Step] = []
        self.rows, self.rows_at = rows, 0
        self._places: dict[int, int] = {}
        self._constants: dict[tuple[type, str], int] = {}
        self._spread: set[int] = set()
        self._made: dict[Any, list[int]] = {}

    def place(self, tensor: Tensor) -> int:
        """Where a tensor's value stands."""
        if id(tensor) not in self._places:
            raise Untranslatable
        return self._places[id(tensor)]

    def new_place(self, tensor: Tensor) -> int:
        """Where a tensor's value will stand from now on."""
        self.values.append(None)
        self._places[id(tensor)] = len(self.values) - 1
        return self._places[id(tensor)]

    def add(self, function: Any, arguments: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        """Translate one call.

        Raises:
            Untranslatable: It has no entry, or reads what is not known.
        """
        outs = [out] if isinstance(out, Tensor) else list(out)
        if function in SAME:
            self._places[id(out)] = self.place(arguments[0])
            if id(arguments[0]) in self._spread:
                self._spread.add(id(out))
            return
        make = NUMPY.get(function)
        if make is None or (named and function not in MADE):
            raise Untranslatable
        flattened = _flattened(arguments)
        if self._is_one_number(function, arguments, out):
            return
        elementwise = isinstance(make, np.ufunc) or make in ELEMENTWISE
        operands = [self._operand(argument, arguments[0] if elementwise else None) for argument in flattened]
        known = [argument for argument in flattened if isinstance(argument, Tensor)]
        spread = elementwise and all(argument.numel() == 1 or id(argument) in self._spread for argument in known)
        self._spread.difference_update(map(id, outs))
        if spread and out.numel() > 1:
            self._spread.add(id(out))
        call = (function, tuple(operands), repr(named))
        if call in self._made:
            for tensor, place in zip(outs, self._made[call], strict=True):
                self._places[id(tensor)] = place
            return
        if function in SIZED:
            operands.append(self.rows_at)
            make = make(arguments, self.rows)
        elif function in MADE:
            make = make(arguments, named)
        self._made[call] = [self.new_place(tensor) for tensor in outs]
        self.steps.append(_Step(make, operands, self._made[call], several=not isinstance(out, Tensor)))

    def _is_one_number(self, function: Any, arguments: tuple[Any, ...], out: Any) -> bool:
        """Note an expanded number, or a filled tensor, as the number; False where it is neither."""
        if function in SIZED and arguments[0].numel() == 1:
            self._places[id(out)] = self.place(arguments[0])
        elif function in FILLED and out.dtype == torch.float32:
            self._places[id(out)] = self._constant(np.array(FILLED[function], dtype=np.float32))
        else:
            return False
        if out.numel() > 1:
            self._spread.add(id(out))
        return True

    def _operand(self, argument: Any, like: Tensor | None) -> int:
        """Its place; beside `like`, as an operand of an elementwise operation, numbers may stay numbers."""
        if not isinstance(argument, Tensor):
            # With an array of float32 NumPy needs half the time that it needs with a Python number.
            converts = type(argument) in (int, float) and like is not None and like.dtype == torch.float32
            return self._constant(np.array(argument, dtype=np.float32) if converts else argument)
        place = self.place(argument)
        if like is not None or id(argument) not in self._spread:
            return place
        self.values.append(None)
        whole = len(self.values) - 1
        size = list(argument.shape)
        step = NUMPY[EXPAND]((argument, size), self.rows)
        self.steps.append(_Step(step, [place, self._constant(size), self.rows_at], [whole], several=False))
        return whole

    def _constant(self, value: Any) -> int:
        key = type(value), repr(value)
        if key not in self._constants:
            self.values.append(value)
            self._constants[key] = len(self.values) - 1
        return self._constants[key]

    def needed_for(self, results: list[int]) -> list[_Step]:
        """The steps that the results depend on, in their order."""
        wanted, kept = set(results), []
        for step in reversed(self.steps):
            if wanted.intersection(step.places):
                wanted.update(step.operands)
                kept.append(step)
        return kept[::-1]


def _flattened(arguments: tuple[Any, ...]) -> list[Any]:
    """Tensors of lists one by one; other lists stay."""
    flat: list[Any] = []
    for argument in arguments:
        of_tensors = isinstance(argument, list | tuple) and argument and isinstance(argument[0], Tensor)
        flat += argument if of_tensors else [argument]
    return flat
