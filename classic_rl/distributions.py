"""Action distributions, written as few operations: no distribution objects on the hot path.

Each distribution reads the [..., K] outputs of the actor network (`parameters`). Torch methods score given actions
for the update; NumPy methods draw them during collection, from noise that is drawn for a whole rollout at once.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor, nn

from rlhf.config import Config
from rlhf.errors import ConfigError

HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)
MASKED = -1e8
"""Logit of an invalid action: its probability is exactly 0, and p log p is 0 too, which -inf would make NaN
(Huang and Ontanon 2022, https://arxiv.org/abs/2006.14171; masks are constant, so no gradient reaches the logit)."""


class Distribution(Protocol):
    """What an actor-critic needs of its action distribution."""

    num_outputs: int
    """K, the actor network's outputs."""
    action_shape: tuple[int, ...]
    """Shape of one action: () for Discrete."""
    action_dtype: torch.dtype

    def log_probs_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Score actions [..., *action_shape] under parameters [..., K]; two tensors [...]."""
        ...

    def noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Draw what `sample` needs for `shape` actions."""
        ...

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Draw actions [N, *action_shape] from parameters [N, K]."""
        ...

    def greedy(self, parameters: np.ndarray) -> np.ndarray:
        """Return the most probable actions [N, *action_shape]."""
        ...

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Turn actions into what the environment accepts."""
        ...


class Categorical(nn.Module):
    """A choice among n actions; parameters are logits."""

    action_shape: tuple[int, ...] = ()
    action_dtype = torch.int64

    def __init__(self, n: int, *, start: int = 0) -> None:
        super().__init__()
        self.num_outputs, self.start = n, start

    def log_probs_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return log softmax(z)_a, and -sum p log p."""
        all_log_probs = torch.log_softmax(parameters, dim=-1)
        log_probs = all_log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        entropy = -(all_log_probs.exp() * all_log_probs).sum(dim=-1)
        return log_probs, entropy

    def score(self, parameters: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[Any, ...]]:
        """Return log-probs [N] and entropy [N] of logits [N, n] and actions [N], and what `slope` needs."""
        all_log_probs = torch.log_softmax(torch.from_numpy(parameters), dim=-1).numpy()
        probabilities = np.exp(all_log_probs)
        taken = np.arange(0, all_log_probs.size, self.num_outputs) + actions
        entropy = -np.einsum("ij,ij->i", probabilities, all_log_probs)
        return all_log_probs.ravel().take(taken), entropy, (all_log_probs, probabilities, taken, entropy)

    def slope(
        self, scores: tuple[Any, ...], of_log_probs: np.ndarray | None, of_entropy: np.ndarray | None
    ) -> tuple[np.ndarray, None]:
        """Return the gradient of the logits: dlog p_a / dz_j = [j = a] - p_j, dH / dz_j = -p_j (log p_j + H)."""
        all_log_probs, probabilities, taken, entropy = scores
        gradient = np.zeros_like(probabilities)
        if of_log_probs is not None:
            np.multiply(probabilities, -of_log_probs[:, None], out=gradient)
            gradient.ravel()[taken] += of_log_probs
        if of_entropy is not None:
            gradient -= of_entropy[:, None] * probabilities * (all_log_probs + entropy[:, None])
        return gradient, None

    def noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Gumbel noise [..., n]: argmax(z + g) is a draw from softmax(z) (Gumbel 1954), two NumPy calls a step."""
        return generator.gumbel(size=(*shape, self.num_outputs)).astype(np.float32)

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Draw by the Gumbel-max trick."""
        return (parameters + noise).argmax(axis=-1)

    def greedy(self, parameters: np.ndarray) -> np.ndarray:
        """The largest logit."""
        return parameters.argmax(axis=-1)

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Shift by the space's start."""
        return actions + self.start if self.start else actions


class MultiCategorical(nn.Module):
    """Independent choices; parameters are the concatenated logits."""

    action_dtype = torch.int64

    def __init__(self, sizes: list[int], *, shape: tuple[int, ...], start: np.ndarray | None = None) -> None:
        super().__init__()
        self.sizes, self.num_outputs, self.action_shape = sizes, sum(sizes), (len(sizes),)
        self.environment_shape, self.start = shape, start

    def log_probs_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over the independent choices."""
        log_probs, entropy = parameters.new_zeros(()), parameters.new_zeros(())
        for index, logits in enumerate(parameters.split(self.sizes, dim=-1)):
            all_log_probs = torch.log_softmax(logits, dim=-1)
            log_probs = log_probs + all_log_probs.gather(-1, actions[..., index : index + 1]).squeeze(-1)
            entropy = entropy - (all_log_probs.exp() * all_log_probs).sum(dim=-1)
        return log_probs, entropy

    def noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Gumbel noise, as for one choice."""
        return generator.gumbel(size=(*shape, self.num_outputs)).astype(np.float32)

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Draw each choice by the Gumbel-max trick."""
        return self.greedy(parameters + noise)

    def greedy(self, parameters: np.ndarray) -> np.ndarray:
        """The largest logit of each choice."""
        parts = np.split(parameters, np.cumsum(self.sizes)[:-1], axis=-1)
        return np.stack([part.argmax(axis=-1) for part in parts], axis=-1)

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Restore the space's shape and start."""
        shaped = actions.reshape(len(actions), *self.environment_shape)
        return shaped if self.start is None else shaped + self.start


class StateDependentExploration(Config):
    """Noise that is a function of the state (gSDE, `classic_rl.state_dependent_exploration`)."""

    sample_every: int | None = Field(None, ge=1)
    """Steps that share one exploration matrix. Null is 1 off-policy, and on-policy a whole rollout's steps (at most
    128 where episodes are collected)."""
    initial_log_std: float = -2.0
    """Where the matrix's log standard deviations start; -2 to -3.7 in tuned settings, since it multiplies features."""


class BoxDistribution(nn.Module):
    """What distributions over a Box share: shapes, and the way into the environment."""

    action_dtype = torch.float32

    def __init__(self, space: spaces.Box) -> None:
        super().__init__()
        self.num_outputs = int(np.prod(space.shape))
        self.action_shape = (self.num_outputs,)
        self.environment_shape, self.environment_dtype = space.shape, space.dtype
        self.low, self.high = space.low, space.high

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Restore the space's shape and clip to its bounds."""
        shaped = actions.reshape(len(actions), *self.environment_shape)
        return np.clip(shaped, self.low, self.high).astype(self.environment_dtype, copy=False)


class DiagonalGaussian(BoxDistribution):
    """Independent normals; parameters are the means, the log standard deviations are free and state-independent.

    Actions outside the space's bounds are clipped on their way into the environment only: log-probs and entropy are
    those of the unclipped draw, as in the PPO paper's code and in Stable-Baselines3. The share of clipped
    components is logged as `rollout/clipped_action_fraction`.
    """

    def __init__(self, space: spaces.Box, *, initial_log_std: float = 0.0) -> None:
        super().__init__(space)
        self.log_std = nn.Parameter(torch.full((self.num_outputs,), float(initial_log_std)))

    def log_probs_and_entropy(self, parameters: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return -1/2 ((a - mu) / sigma)^2 - log sigma - 1/2 log 2 pi, and 1/2 + 1/2 log 2 pi + log sigma, summed."""
        scaled = (actions - parameters) * torch.exp(-self.log_std)
        log_std_sum = self.log_std.sum()
        log_probs = -0.5 * scaled.square().sum(dim=-1) - (log_std_sum + self.num_outputs * HALF_LOG_TWO_PI)
        entropy = (log_std_sum + self.num_outputs * (0.5 + HALF_LOG_TWO_PI)).expand(log_probs.shape)
        return log_probs, entropy

    def score(self, parameters: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[Any, ...]]:
        """Return log-probs [N] and entropy [N] of means [N, A] and actions [N, A], and what `slope` needs."""
        log_std = self.log_std.detach().numpy()
        precision = np.exp(-log_std)
        scaled = (actions - parameters) * precision
        squares, log_std_sum = scaled * scaled, float(log_std.sum())
        log_probs = -0.5 * squares.sum(axis=-1) - np.float32(log_std_sum + self.num_outputs * HALF_LOG_TWO_PI)
        entropy = np.full(len(scaled), log_std_sum + self.num_outputs * (0.5 + HALF_LOG_TWO_PI), dtype=np.float32)
        return log_probs, entropy, (scaled, squares, precision)

    def slope(
        self, scores: tuple[Any, ...], of_log_probs: np.ndarray | None, of_entropy: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients of the means and of the log standard deviations.

        d log p / d mu = scaled / sigma, d log p / d log sigma = scaled^2 - 1, d H / d log sigma = 1.
        """
        scaled, squares, precision = scores
        of_mean, of_log_std = np.zeros_like(scaled), np.zeros(self.num_outputs, dtype=np.float32)
        if of_log_probs is not None:
            np.multiply(scaled, of_log_probs[:, None], out=of_mean)
            of_mean *= precision
            of_log_std = of_log_probs.dot(squares) - of_log_probs.sum()
        return of_mean, of_log_std if of_entropy is None else of_log_std + of_entropy.sum()

    def noise(self, generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normals."""
        return generator.standard_normal(size=(*shape, self.num_outputs), dtype=np.float32)

    def sample(self, parameters: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Return mu + sigma x noise."""
        return parameters + np.exp(self.log_std.detach().cpu().numpy()) * noise

    def greedy(self, parameters: np.ndarray) -> np.ndarray:
        """The mean."""
        return parameters


def make_distribution(
    space: spaces.Space, *, initial_log_std: float = 0.0
) -> Categorical | MultiCategorical | DiagonalGaussian:
    """Return the distribution for an action space.

    Raises:
        ConfigError: The space is none of Discrete, MultiDiscrete, MultiBinary, Box of floats.
    """
    match space:
        case spaces.Discrete():
            return Categorical(int(space.n), start=int(space.start))
        case spaces.MultiDiscrete():
            start = space.start if np.any(space.start) else None
            return MultiCategorical([int(n) for n in space.nvec.reshape(-1)], shape=space.shape, start=start)
        case spaces.MultiBinary():
            return MultiCategorical([2] * int(np.prod(space.shape)), shape=space.shape)
        case spaces.Box() if np.issubdtype(space.dtype, np.floating):
            return DiagonalGaussian(space, initial_log_std=initial_log_std)
    raise ConfigError(
        "no action distribution for this space",
        where="environment.id",
        got=str(space),
        expected="Discrete, MultiDiscrete, MultiBinary or Box of floats",
        remedy="Wrap the environment so that its actions are one of these.",
    )
