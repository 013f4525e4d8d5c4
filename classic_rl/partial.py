"""CartPole whose velocities are hidden: `classic_rl.partial:CartPoleNoVelocity-v1`, a task that needs a memory.

As sb3-contrib's CartPoleNoVelEnv: the cart's position and the pole's angle are shown; the state, the rewards and the
ends are CartPole-v1's.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

SHOWN = [0, 2]
"""Position and angle, of CartPole's position, velocity, angle, angular velocity."""


class CartPoleNoVelocity(gymnasium.Wrapper[np.ndarray, int, np.ndarray, int]):
    """CartPole-v1 that shows [position, angle]."""

    def __init__(self, **options: Any) -> None:
        super().__init__(CartPoleEnv(**options))
        space = self.env.observation_space
        assert isinstance(space, spaces.Box)
        self.observation_space = spaces.Box(space.low[SHOWN], space.high[SHOWN], dtype=np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Begin an episode."""
        observation, infos = self.env.reset(seed=seed, options=options)
        return observation[SHOWN], infos

    def step(self, action: int) -> tuple[np.ndarray, Any, bool, bool, dict]:
        """Make one step."""
        observation, reward, terminated, truncated, infos = self.env.step(action)
        return observation[SHOWN], reward, terminated, truncated, infos


if "CartPoleNoVelocity-v1" not in gymnasium.registry:
    gymnasium.register("CartPoleNoVelocity-v1", entry_point=CartPoleNoVelocity, max_episode_steps=500)
