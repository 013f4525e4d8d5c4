"""Environments whose every step can be predicted by hand."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium import spaces


class Countdown(gymnasium.Env):
    """Observes how many steps it has made; reward 1 each; ends after `length` steps, by termination or truncation."""

    def __init__(self, *, length: int = 3, terminates: bool = True) -> None:
        self.length, self.terminates = length, terminates
        self.observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.made = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.made = 0
        return self._observation(), {}

    def step(self, action):
        self.made += 1
        over = self.made >= self.length
        return self._observation(), 1.0, over and self.terminates, over and not self.terminates, {}

    def _observation(self):
        return np.array([self.made], dtype=np.float32)


class Forever(gymnasium.Env):
    """One state, reward 1, no end of its own (Stable-Baselines3's tests/test_gae.py has the same idea)."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        return np.ones(1, dtype=np.float32), 1.0, False, False, {}


class Identity(gymnasium.Env):
    """Reward 1 when the action repeats the observation; 100 steps (Stable-Baselines3's IdentityEnv)."""

    def __init__(self, *, kind: str = "discrete") -> None:
        match kind:
            case "discrete":
                self.action_space = spaces.Discrete(2)
            case "multi_discrete":
                self.action_space = spaces.MultiDiscrete([2, 2])
            case "multi_binary":
                self.action_space = spaces.MultiBinary(2)
            case "box":
                self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space = self.action_space
        self.made = 0

    def _draw(self):
        match self.observation_space:
            case spaces.Discrete(n=n):
                return self.np_random.integers(n)
            case spaces.Box():
                return self.np_random.uniform(-1, 1, (1,)).astype(np.float32)
            case _:
                return self.np_random.integers(2, size=2).astype(self.observation_space.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.made, self.shown = 0, self._draw()
        return self.shown, {}

    def step(self, action):
        if isinstance(self.action_space, spaces.Box):
            reward = float(np.all(np.abs(action - self.shown) <= 0.5))
        else:
            reward = float(np.all(np.asarray(action) == self.shown))
        self.made += 1
        self.shown = self._draw()
        return self.shown, reward, False, self.made >= 100, {}


class StartState(gymnasium.Env):
    """Observes a random start state that never changes; ends by chance, so that its dynamics draw too."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start = self.np_random.normal(size=2).astype(np.float32)
        return self.start.copy(), {}

    def step(self, action):
        return self.start.copy(), float(action), bool(self.np_random.random() < 0.2), False, {}


class Images(gymnasium.Env):
    observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)
    action_space = spaces.Discrete(2)


class TextActions(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Text(3)


class IntegerBoxActions(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(0, 5, (1,), np.int64)


def register() -> None:
    """Make the environments known to gymnasium, once."""
    ids = {
        "Countdown-v0": (Countdown, None),
        "Forever-v0": (Forever, None),
        "ForeverLimited-v0": (Forever, 8),
        "Identity-v0": (Identity, None),
        "StartState-v0": (StartState, 50),
        "Images-v0": (Images, None),
        "TextActions-v0": (TextActions, None),
        "IntegerBoxActions-v0": (IntegerBoxActions, None),
    }
    for identifier, (entry_point, limit) in ids.items():
        if identifier not in gymnasium.registry:
            gymnasium.register(identifier, entry_point=entry_point, max_episode_steps=limit)
