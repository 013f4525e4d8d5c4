"""Optimizers, over the policy's own parameters or over one flat tensor that they are views of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, assert_never

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf.errors import ConfigError, ModelError
from rlhf.training.update_config import UpdateConfig


def build_optimizer(parameters: Iterable[nn.Parameter], update: UpdateConfig) -> torch.optim.Optimizer:
    """Return a torch optimizer; Adam's step is fused (one kernel over all tensors), on CPU as on GPU."""
    parameters = list(parameters)
    rate, decay, epsilon = update.learning_rate, update.weight_decay, update.adam_epsilon
    match update.optimizer:
        case "adamw" | "adam":
            kind = torch.optim.AdamW if update.optimizer == "adamw" else torch.optim.Adam
            return kind(parameters, lr=rate, betas=update.adam_betas, eps=epsilon, weight_decay=decay, fused=True)
        case "rmsprop":
            alpha = update.rmsprop_alpha
            return torch.optim.RMSprop(parameters, lr=rate, alpha=alpha, eps=epsilon, weight_decay=decay)
        case _:
            assert_never(update.optimizer)


class FlatParameters:
    """One tensor that all trainable parameters are views of, and one for their gradients.

    Autograd adds into an existing `.grad` in place, so the views stay connected; the optimizer, the norm and the clip
    then see one tensor instead of a dozen. Unlike separate tensors, a parameter that the loss does not reach has a
    gradient of 0 instead of none, so weight decay acts on it too.

    Attributes:
        parameter: The flat parameter.
        gradient: Its gradient.
        named: The parameters under their names, in the order of their places.
    """

    def __init__(self, named_parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        """Move the parameters' storage into one tensor.

        Raises:
            ModelError: The parameters differ in dtype or device.
        """
        kinds = {(parameter.dtype, parameter.device) for _, parameter in named_parameters}
        if len(kinds) != 1:
            raise ModelError(
                "flat parameters need one dtype and one device",
                where="update.flatten_parameters",
                got=", ".join(sorted(str(kind) for kind in kinds)) or "no trainable parameter",
                remedy="Set update.flatten_parameters=false.",
            )
        self.named = list(named_parameters)
        flat = torch.cat([parameter.detach().reshape(-1) for _, parameter in self.named])
        self.parameter = nn.Parameter(flat)
        self.gradient = self.parameter.grad = torch.zeros_like(flat)
        for (_, parameter), data, gradient in zip(self.named, self.split(flat), self.split(self.gradient), strict=True):
            parameter.data = data
            parameter.grad = gradient

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return one view per parameter, in its shape."""
        sizes = [parameter.numel() for _, parameter in self.named]
        pieces = flat.split(sizes)
        return [piece.view(parameter.shape) for piece, (_, parameter) in zip(pieces, self.named, strict=True)]

    def require_connected(self) -> None:
        """Refuse to go on when someone moved a parameter elsewhere (`policy.to`, assigning `.data` or `.grad`).

        Raises:
            ModelError: A step would no longer reach that parameter.
        """
        start, stop = _span(self.parameter)
        grad_start, grad_stop = _span(self.gradient)
        for name, parameter in self.named:
            inside = start <= parameter.data_ptr() < stop or parameter.numel() == 0
            if not inside or parameter.grad is None or not grad_start <= parameter.grad.data_ptr() < grad_stop:
                raise ModelError(
                    f"parameter {name!r} left the flat tensor after the learner was built",
                    remedy="Move or cast the policy before building the learner, clear gradients only through the "
                    "learner, or set update.flatten_parameters=false.",
                )


def _span(tensor: Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + max(1, tensor.numel()) * tensor.element_size()


class PolicyOptimizer:
    """Gradients and the step of one policy, with a state that is saved per parameter name either way.

    Args:
        optimizer: Over the parameters, or over `flat.parameter`.
        named_parameters: The trainable parameters under their names.
        flat: Given where the parameters are flattened.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        flat: FlatParameters | None = None,
    ) -> None:
        """Keep the parts; nothing is changed."""
        self._optimizer, self._named, self.flat = optimizer, list(named_parameters), flat
        self._steppers = [flat.parameter] if flat is not None else [parameter for _, parameter in self._named]

    def set_learning_rate(self, rate: float) -> None:
        """Use `rate` from the next step on."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def zero_grad(self) -> None:
        """Clear all gradients."""
        if self.flat is not None:
            self.flat.gradient.zero_()  # None would cut the parameters' views
        else:
            for parameter in self._steppers:
                parameter.grad = None

    def drop_gradients(self, *, kept: set[str]) -> None:
        """Take the gradients away from all parameters but those named; a step then leaves the others as they are."""
        assert self.flat is None, "refused before the first update"
        for name, parameter in self._named:
            if name not in kept:
                parameter.grad = None

    def gradients(self) -> list[Tensor]:
        """Return the gradients that exist."""
        return [parameter.grad for parameter in self._steppers if parameter.grad is not None]

    def sum_over_processes(self) -> None:
        """Add up the flat gradients of all processes, in place."""
        assert self.flat is not None
        dist.all_reduce(self.flat.gradient)

    def gradient_norm(self) -> float:
        """Euclidean norm of all gradients together; nan or inf where any of them is not finite."""
        gradients = [self.flat.gradient] if self.flat is not None else self.gradients()
        if not gradients:
            return 0.0
        if len(gradients) == 1:
            return torch.linalg.vector_norm(gradients[0]).item()
        return float(whole(nn.utils.get_total_norm(gradients)))

    def step(self, *, norm: float, max_norm: float | None) -> None:
        """Scale the gradients of norm `norm` down to `max_norm`, and step."""
        if max_norm is not None and norm > 0:
            scale = max_norm / (norm + 1e-6)
            if scale < 1.0 and self.flat is not None:
                self.flat.gradient.mul_(scale)
            elif scale < 1.0:
                torch._foreach_mul_(self.gradients(), scale)  # pyright: ignore[reportPrivateImportUsage]
        if self.flat is None:
            self._optimizer.step()
        else:
            step_alone(self._optimizer, self.flat.parameter)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Return {parameter name: {moment: tensor}}; a collective call where parameters are sharded."""
        if self.flat is None:
            moments = {name: self._optimizer.state.get(parameter, {}) for name, parameter in self._named}
            wholes = {name: {key: whole(value).clone() for key, value in own.items()} for name, own in moments.items()}
            return {name: own for name, own in wholes.items() if own}  # a parameter without gradients has none
        state = self._optimizer.state.get(self.flat.parameter, {})
        named: dict[str, dict[str, Tensor]] = {name: {} for name, _ in self._named} if state else {}
        for key, value in state.items():
            pieces = [value] * len(self._named) if key == "step" else self.flat.split(value)
            for (name, _), piece in zip(self._named, pieces, strict=True):
                named[name][key] = piece.clone()
        return named

    def load_state_dict(self, named: dict[str, dict[str, Tensor]]) -> None:
        """Go on from what `state_dict` returned, flattened then or not.

        Raises:
            ConfigError: The state belongs to other parameters.
        """
        unknown = sorted(set(named) - {name for name, _ in self._named})
        missing = sorted({name for name, _ in self._named} - set(named)) if self.flat is not None and named else []
        if unknown or missing:
            raise ConfigError(
                "the checkpoint's optimizer state belongs to other parameters",
                got=", ".join((unknown + missing)[:5]),
                remedy="Resume with the settings that the run was started with.",
            )
        self._optimizer.state.clear()
        if self.flat is None:
            for name, parameter in self._named:
                if name in named:
                    state = {key: _placed(value, parameter, key) for key, value in named[name].items()}
                    self._optimizer.state[parameter] = state
        elif named:
            self._optimizer.state[self.flat.parameter] = self._flat_state(named, self.flat.parameter)

    def _flat_state(self, named: dict[str, dict[str, Tensor]], parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for key in named[self._named[0][0]]:
            pieces = [named[name][key] for name, _ in self._named]
            joined = pieces[0] if key == "step" else torch.cat([piece.reshape(-1) for piece in pieces])
            state[key] = _placed(joined, parameter, key)
        return state


@torch.no_grad()
def step_alone(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """`optimizer.step()` for an optimizer of one parameter, without what torch does around its few operations.

    Hooks, profiling and grouping by device take several times as long as the step of a small network itself.
    """
    group, state = optimizer.param_groups[0], optimizer.state.get(parameter)
    kernel, plain_rmsprop = _FUSED.get(type(optimizer)), type(optimizer) is torch.optim.RMSprop
    known = (kernel is not None and group["fused"]) or (
        plain_rmsprop and not (group["centered"] or group["momentum"] or group["maximize"] or group["differentiable"])
    )
    # The first step makes the state.
    if not known or not state or parameter.grad is None or parameter.device.type != "cpu":
        optimizer.step()
        return
    state["step"] += 1
    if kernel is None:
        _rmsprop(parameter, parameter.grad, state["square_avg"], group)
        return
    kernel(
        [parameter], [parameter.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
        lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"],
        eps=group["eps"], amsgrad=False, maximize=False,
    )  # fmt: skip


def _rmsprop(parameter: Tensor, gradient: Tensor, square: Tensor, group: dict[str, Any]) -> None:
    """RMSprop: v <- a v + (1 - a) g^2, theta <- theta - rate g / (sqrt(v) + epsilon), in torch's own operations."""
    if group["weight_decay"]:
        gradient = gradient.add(parameter, alpha=group["weight_decay"])
    square.mul_(group["alpha"]).addcmul_(gradient, gradient, value=1 - group["alpha"])
    parameter.addcdiv_(gradient, square.sqrt().add_(group["eps"]), value=-group["lr"])


_FUSED = {
    torch.optim.Adam: torch._fused_adam_,  # pyright: ignore[reportPrivateImportUsage]
    torch.optim.AdamW: torch._fused_adamw_,  # pyright: ignore[reportPrivateImportUsage]
}


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with its shards gathered (FSDP2); any other unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a copy of a whole tensor where `like` lives, sharded as it is."""
    value = value.clone().to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value


def _placed(value: Tensor, parameter: nn.Parameter, key: str) -> Tensor:
    """The step count is one number, never sharded; fused Adam wants it beside the parameter."""
    return value.clone().to(parameter.device) if key == "step" else place_like(value, parameter)
