"""MinAtar's five games as gymnasium environments whose state can be saved: `classic_rl.minatar:MinAtarBreakout-v1`.

Young and Tian 2019, MinAtar: An Atari-Inspired Testbed for Thorough and Reproducible Reinforcement Learning
Experiments, https://arxiv.org/abs/1903.03176. v1 has the actions that have an effect in the game; sticky actions with
probability 0.1 and difficulty ramping are as the authors have them. The package is `minatar`.
"""

from __future__ import annotations

import colorsys
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

GAMES = {
    "Asterix": "asterix",
    "Breakout": "breakout",
    "Freeway": "freeway",
    "Seaquest": "seaquest",
    "SpaceInvaders": "space_invaders",
}


class MinAtarGame(gymnasium.Env[np.ndarray, int]):
    """One game; observations are [10, 10, channels] bytes of 0 and 1.

    Args:
        game: A value of `GAMES`.
        sticky_actions: Probability that the last action is repeated.
        difficulty_ramping: Whether games get faster.
        render_mode: rgb_array draws each channel in a colour of its own; None in training.

    Raises:
        gymnasium.error.DependencyNotInstalled: The package is missing.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        game: str,
        *,
        sticky_actions: float = 0.1,
        difficulty_ramping: bool = True,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        try:
            from minatar import Environment
        except ModuleNotFoundError as error:
            if error.name != "minatar":
                raise
            raise gymnasium.error.DependencyNotInstalled("pip install minatar") from error
        self._game = Environment(game, sticky_action_prob=sticky_actions, difficulty_ramping=difficulty_ramping)
        self._actions = self._game.minimal_action_set()
        self.action_space = spaces.Discrete(len(self._actions))
        self.observation_space = spaces.Box(0, 1, tuple(self._game.state_shape()), np.uint8)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Start a game; a seed makes its random numbers repeatable from there on."""
        super().reset(seed=seed)
        if seed is not None:
            self._game.seed(seed % 2**32)
        self._game.reset()
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Play one frame."""
        reward, terminated = self._game.act(self._actions[int(action)])
        return self._observe(), float(reward), bool(terminated), False, {}

    def render(self) -> np.ndarray:
        """Return the board as a picture [10, 10, 3] uint8; of several things in a cell, the last channel's is seen."""
        state = self._observe()
        top = state.shape[2] - 1 - state[:, :, ::-1].argmax(axis=2)
        hues = [colorsys.hsv_to_rgb(channel / state.shape[2], 0.8, 1.0) for channel in range(state.shape[2])]
        picture = (255 * np.array(hues)).astype(np.uint8)[top]
        picture[~state.any(axis=2)] = 0
        return picture

    def _observe(self) -> np.ndarray:
        return self._game.state().astype(np.uint8)

    def state_dict(self) -> dict[str, Any]:
        """The game's variables and its random generator, for checkpoints."""
        name, keys, position, has_gauss, cached = self._game.random.get_state()
        variables = {key: value for key, value in vars(self._game.env).items() if key != "random"}
        return {
            "variables": variables,
            "last_action": self._game.last_action,
            "random": [name, keys.astype(np.int64), position, has_gauss, cached],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        vars(self._game.env).update(state["variables"])
        self._game.last_action = state["last_action"]
        name, keys, position, has_gauss, cached = state["random"]
        self._game.random.set_state((name, keys.astype(np.uint32), position, has_gauss, cached))
        self._game.env.random = self._game.random


def _register() -> None:
    for name, game in GAMES.items():
        identifier = f"MinAtar{name}-v1"
        if identifier not in gymnasium.registry:
            gymnasium.register(identifier, entry_point=MinAtarGame, kwargs={"game": game})


_register()
