"""The optimizer of off-policy agents: settings, and one flat tensor per network."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rlhf.config import Config
from rlhf.training.optimizer import FlatParameters, PolicyOptimizer


class OptimizerConfig(Config):
    """How weights move."""

    name: Literal["adam", "rmsprop", "sgd"] = "adam"
    """Which optimizer."""
    learning_rate: float = Field(1e-4, gt=0)
    """At the beginning."""
    schedule: Literal["constant", "linear"] = "constant"
    """linear lets the learning rate fall to 0 at the end of the run."""
    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the second moment (adam, rmsprop)."""
    rmsprop_decay: float = Field(0.95, ge=0, lt=1)
    """Smoothing of rmsprop's second moment."""
    rmsprop_centered: bool = True
    """Subtract the squared mean gradient from rmsprop's second moment, as Mnih et al. 2015 do."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of rmsprop and sgd."""
    max_grad_norm: float | None = Field(10.0, gt=0)
    """The gradient is scaled down to this Euclidean norm; null never clips."""

    def rate(self, progress: float) -> float:
        """Return the learning rate at a share of the run in [0, 1]."""
        return self.learning_rate * (1.0 - progress) if self.schedule == "linear" else self.learning_rate


class FlatNetwork:
    """A network whose parameters, gradients and optimizer state are one flat tensor each.

    One fused step, one norm, one copy or interpolation to a target network, instead of one per layer: on networks of
    two small layers that is most of an optimizer's time.

    Args:
        network: Its parameters' storage is moved into one tensor.
        config: None makes no optimizer: a target network.
    """

    def __init__(self, network: nn.Module, config: OptimizerConfig | None = None) -> None:
        self.network, self.config = network, config
        named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
        self.flat = FlatParameters(named)
        self.optimizer = None
        if config is not None:
            self.optimizer = PolicyOptimizer(
                _build(self.flat.parameter, config), named_parameters=named, flat=self.flat
            )

    @property
    def vector(self) -> Tensor:
        """All parameters."""
        return self.flat.parameter.data

    def zero_grad(self) -> None:
        """Clear the gradient."""
        self.flat.gradient.zero_()

    def step(self, *, progress: float = 0.0) -> float:
        """Clip the gradient, take one step at the schedule's learning rate; returns the gradient's norm."""
        assert self.optimizer is not None
        assert self.config is not None
        if self.config.schedule != "constant":
            self.optimizer.set_learning_rate(self.config.rate(progress))
        norm = self.optimizer.gradient_norm()
        self.optimizer.step(norm=norm, max_norm=self.config.max_grad_norm)
        return norm

    def copy_from(self, other: FlatNetwork) -> None:
        """Take over another network's parameters."""
        self.vector.copy_(other.vector)

    def move_towards(self, other: FlatNetwork, *, rate: float) -> None:
        """Replace parameters by (1 - rate) x own + rate x other's (Lillicrap et al. 2016, 1509.02971)."""
        self.vector.lerp_(other.vector, rate)

    def state_dict(self) -> dict[str, Any]:
        """Weights, buffers, and the optimizer's state."""
        weights = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        return {"weights": weights, "optimizer": None if self.optimizer is None else self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s content, in place."""
        self.network.load_state_dict(state["weights"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])


def _build(parameter: nn.Parameter, config: OptimizerConfig) -> torch.optim.Optimizer:
    rate = config.learning_rate
    match config.name:
        case "adam":
            return torch.optim.Adam([parameter], lr=rate, eps=config.epsilon, fused=True)
        case "rmsprop":
            return torch.optim.RMSprop(
                [parameter], lr=rate, alpha=config.rmsprop_decay, eps=config.epsilon, momentum=config.momentum,
                centered=config.rmsprop_centered,
            )  # fmt: skip
        case "sgd":
            return torch.optim.SGD([parameter], lr=rate, momentum=config.momentum)
