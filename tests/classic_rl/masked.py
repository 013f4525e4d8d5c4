"""Environments in which actions are invalid, or in which one must remember."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium import spaces


class InvalidActions(gymnasium.Env):
    """Reward 1 when the action repeats the observation; all but a few actions are invalid, and the shown one is valid.

    sb3-contrib's InvalidActionEnvDiscrete and InvalidActionEnvMultiDiscrete: 100 steps, and a policy that ignores
    masks is told at once, by the error that an invalid action raises.

    Args:
        kind: Of the actions.
        through: How masks are told: in infos, or by a method.
        size: Values of each choice.
        invalid: Of them, those that are not valid at any time.
    """

    def __init__(self, *, kind: str = "discrete", through: str = "infos", size: int = 40, invalid: int = 37) -> None:
        self.size, self.invalid = size, invalid
        self.choices = 1 if kind == "discrete" else 2
        space = spaces.Discrete(size, start=5) if kind == "discrete" else spaces.MultiDiscrete([size] * 2)
        self.action_space = self.observation_space = space
        self.start = 5 if kind == "discrete" else 0
        self.told = through == "infos"
        if through == "method":
            self.action_masks = self._masks  # what sb3-contrib's environments offer
        self.made = 0

    def _draw(self):
        self.shown = self.np_random.integers(self.size, size=self.choices)
        self.valid = np.zeros((self.choices, self.size), dtype=bool)
        for row, shown in zip(self.valid, self.shown, strict=True):
            row[self.np_random.permutation(self.size)[: self.size - self.invalid]] = True
            row[shown] = True
        shown = self.shown + self.start
        return shown[0] if isinstance(self.action_space, spaces.Discrete) else shown

    def _masks(self):
        over = self.made >= 100
        return np.zeros(self.valid.size, dtype=bool) if over else self.valid.reshape(-1)

    def _infos(self):
        return {"action_mask": self._masks()} if self.told else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.made = 0
        return self._draw(), self._infos()

    def step(self, action):
        chosen = np.atleast_1d(action) - self.start
        for row, value in zip(self.valid, chosen, strict=True):
            if not row[value]:
                raise AssertionError(f"invalid action {action}")
        reward = float((chosen == self.shown).all())
        self.made += 1
        return self._draw(), reward, False, self.made >= 100, self._infos()


class Recall(gymnasium.Env):
    """A corridor whose first observation tells which way is right at its end, and all others look alike.

    The T-maze of Bakker 2001 (https://proceedings.neurips.cc/paper/2001/hash/a38b16173474ba8b1a95bcbc30d3b8a5-Abstract),
    walked along by itself. Reward +1 or -1 for the last action: without a memory the best mean return is 0.
    """

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, *, length: int = 6) -> None:
        self.length, self.made = length, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.made, self.side = 0, int(self.np_random.integers(2))
        return np.array([2 * self.side - 1, 0], dtype=np.float32), {}

    def step(self, action):
        self.made += 1
        over = self.made >= self.length
        reward = (1.0 if action == self.side else -1.0) if over else 0.0
        return np.array([0, self.made == self.length - 1], dtype=np.float32), reward, over, False, {}


def register() -> None:
    """Make the environments known to gymnasium, once."""
    for identifier, entry_point, limit in (("InvalidActions-v0", InvalidActions, None), ("Recall-v0", Recall, 50)):
        if identifier not in gymnasium.registry:
            gymnasium.register(identifier, entry_point=entry_point, max_episode_steps=limit)
