"""Noise that deterministic policies explore with."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from rlhf.config import Config


class GaussianNoise(Config):
    """Independent normals at every step (Fujimoto et al. 2018, https://arxiv.org/abs/1802.09477)."""

    type: Literal["gaussian"] = "gaussian"
    std: float = Field(0.1, ge=0)
    """Standard deviation, for actions in [-1, 1]."""


class OrnsteinUhlenbeckNoise(Config):
    """Noise that remembers: x <- x + theta (0 - x) dt + std sqrt(dt) N(0, 1), from 0 in every episode.

    It pushes in one direction for a while, which pays where single kicks do nothing (MountainCarContinuous).
    Source: Lillicrap et al. 2016, https://arxiv.org/abs/1509.02971, section 3; theta .15, and dt .01 as in OpenAI's
    baselines and Stable-Baselines3.
    """

    type: Literal["ornstein_uhlenbeck"] = "ornstein_uhlenbeck"
    std: float = Field(0.2, ge=0)
    """Of the driving noise, for actions in [-1, 1]; x itself spreads to std / sqrt(2 theta) in the long run."""
    theta: float = Field(0.15, ge=0)
    """How fast x returns to 0."""
    dt: float = Field(0.01, gt=0)
    """Time per step."""


NoiseConfig = Annotated[GaussianNoise | OrnsteinUhlenbeckNoise, Field(discriminator="type")]


class ActionNoise:
    """Noise [N, A] for N environments, step by step.

    Args:
        config: Which.
        shape: (N, A).
    """

    def __init__(self, config: GaussianNoise | OrnsteinUhlenbeckNoise, *, shape: tuple[int, int]) -> None:
        self.config, self._x = config, np.zeros(shape, dtype=np.float32)

    def __call__(self, generator: np.random.Generator, *, starts: np.ndarray) -> np.ndarray:
        """Return the next step's noise [N, A] float32.

        Args:
            generator: Draws.
            starts: [N] bool, True where an episode begins; memory starts from 0 there.
        """
        draws = generator.standard_normal(self._x.shape, dtype=np.float32)
        if isinstance(self.config, GaussianNoise):
            return self.config.std * draws
        self._x[starts] = 0.0
        theta, dt = self.config.theta, self.config.dt
        self._x += self.config.std * math.sqrt(dt) * draws - theta * dt * self._x
        return self._x.copy()

    def state_dict(self) -> dict[str, Any]:
        """The memory."""
        return {"x": self._x.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s content."""
        self._x = np.array(state["x"], dtype=np.float32)
