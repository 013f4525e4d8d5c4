"""First-order policy gradients through a differentiable simulator, beside the likelihood ratio's.

With dynamics s' = f(s, a) and reward r(s, a) that can be differentiated, and a ~ N(mu_theta(s), std^2) written as
mu + std x noise, `dR/dtheta` goes through the simulator. It has the same expectation as the score-function estimate and
mostly far less variance; where the dynamics are stiff or have contacts it may be biased or vary more.
Source: Suh et al. 2022, Do Differentiable Simulators Give Better Policy Gradients?, https://arxiv.org/abs/2202.00817.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Dynamics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From states [N, D] and actions [N] to next states [N, D] and rewards [N]."""

GRAVITY, MASS, LENGTH, TIME_STEP, MAX_SPEED, MAX_TORQUE = 10.0, 1.0, 1.0, 0.05, 8.0, 2.0


def pendulum(states: Tensor, torques: Tensor) -> tuple[Tensor, Tensor]:
    """Gymnasium's Pendulum-v1 on tensors: states are (angle, angular velocity)."""
    angle, speed = states.unbind(dim=-1)
    torques = torques.clamp(-MAX_TORQUE, MAX_TORQUE)
    wrapped = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    rewards = -(wrapped.square() + 0.1 * speed.square() + 0.001 * torques.square())
    acceleration = 3 * GRAVITY / (2 * LENGTH) * torch.sin(angle) + 3.0 / (MASS * LENGTH**2) * torques
    speed = (speed + acceleration * TIME_STEP).clamp(-MAX_SPEED, MAX_SPEED)
    return torch.stack([angle + speed * TIME_STEP, speed], dim=-1), rewards


def play(
    dynamics: Dynamics, mean: Callable[[Tensor], Tensor], states: Tensor, *, noise: Tensor, std: float
) -> tuple[Tensor, Tensor]:
    """Play N episodes of T steps with a Gaussian policy.

    Args:
        dynamics: Of the simulator.
        mean: From states [N, D] to mean actions [N].
        states: [N, D] first states.
        noise: [N, T] standard normals.
        std: Of the actions.

    Returns:
        [N] returns, differentiable through simulator and policy; [N] sums of the log-probabilities of the actions,
        these taken as given.
    """
    returns, log_probs = torch.zeros(len(states)), torch.zeros(len(states))
    for draw in noise.unbind(dim=1):
        center = mean(states)
        actions = center + std * draw
        # As data: neither the action nor the state it was taken in depends on the parameters.
        given = mean(states.detach())
        log_probs = log_probs - 0.5 * ((actions.detach() - given) / std).square()
        states, rewards = dynamics(states, actions)
        returns = returns + rewards
    return returns, log_probs


def first_order_gradients(returns: Tensor, parameters: Tensor) -> Tensor:
    """[N, D]: dR/dtheta of each episode, through the simulator.

    Args:
        returns: [N] of `play`.
        parameters: [N, D], a copy for each episode, so that one backward pass gives every episode's own gradient.
    """
    return torch.autograd.grad(returns.sum(), parameters, retain_graph=True)[0]


def likelihood_ratio_gradients(returns: Tensor, log_probs: Tensor, parameters: Tensor) -> Tensor:
    """[N, D]: (R - mean R of the others) d log pi(tau) of each episode (REINFORCE); parameters as above."""
    gains = returns.detach()
    others = (gains.sum() - gains) / (len(gains) - 1)
    scores = torch.autograd.grad(log_probs.sum(), parameters, retain_graph=True)[0]
    return (gains - others).unsqueeze(1) * scores
