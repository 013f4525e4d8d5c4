"""Domain randomization: physics, sensing and acting drawn anew for every episode.

A policy trained in many worlds survives one that differs from its simulator.

Sources: Tobin et al. 2017, https://arxiv.org/abs/1703.06907 (parameters xi ~ p(xi) per episode); Peng et al. 2018,
https://arxiv.org/abs/1710.06537 (dynamics, noise and delay); Weng 2019,
https://lilianweng.github.io/posts/2019-05-05-domain-randomization/.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import gymnasium
import numpy as np
from gymnasium.envs.classic_control import CartPoleEnv
from gymnasium.spaces import Box
from pydantic import model_validator

from rlhf.config import Config
from rlhf.errors import ConfigError

MUJOCO_PREFIX = "model."


class Range(Config):
    """Where one number is drawn from, once per episode."""

    low: float
    """Smallest value."""
    high: float
    """Largest value; equal to `low` fixes the number."""
    scale: Literal["uniform", "log"] = "uniform"
    """uniform draws evenly, log evenly in the logarithm: as often half as twice."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high ({self.high}) is below low ({self.low}); swap them")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"a log scale needs low > 0, got {self.low}; use scale: uniform")
        return self

    def draw(self, generator: np.random.Generator) -> float:
        """Return one number."""
        if self.scale == "log":
            return float(math.exp(generator.uniform(math.log(self.low), math.log(self.high))))
        return float(generator.uniform(self.low, self.high))


class RandomizationConfig(Config):
    """What differs from episode to episode."""

    physics: dict[str, Range] = {}
    """Parameter -> range. A number of the environment by its attribute (CartPole: gravity, masscart, masspole, length,
    force_mag, tau; Pendulum: g, m, l, max_torque, dt), drawn in its own unit. `model.NAME` is an array of a MuJoCo
    model (model.body_mass, model.geom_friction, model.dof_damping, model.actuator_gear, model.opt.gravity): it is all
    multiplied by the drawn factor."""
    observation_noise: Range = Range(low=0.0, high=0.0)
    """Standard deviation of Gaussian noise on every number of a Box observation, drawn per episode."""
    action_noise: Range = Range(low=0.0, high=0.0)
    """Box actions: standard deviation of Gaussian noise, as a share of half the action range; the sum is clipped to
    the range. Discrete actions: probability that a random action replaces the chosen one."""
    action_delay: tuple[int, int] = (0, 0)
    """Fewest and most steps until an action takes effect, drawn per episode; until the first does, a Box gets the
    middle of its range and a Discrete space its first action."""

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        fewest, most = self.action_delay
        if not 0 <= fewest <= most:
            raise ValueError(f"action_delay must be two numbers of steps, fewest first, got {list(self.action_delay)}")
        if min(self.observation_noise.low, self.action_noise.low) < 0:
            raise ValueError("noise cannot be negative")
        return self


class DomainRandomization(gymnasium.Wrapper):
    """Draws xi ~ p(xi) at every reset, from the environment's own generator: equal seeds give equal worlds.

    Each `reset` returns the drawn values as `info["randomization"]`.

    Args:
        env: One environment, not a vector.
        config: What is drawn.

    Raises:
        ConfigError: A parameter the environment does not have, or noise on a space that has no numbers.
    """

    def __init__(self, env: gymnasium.Env, config: RandomizationConfig) -> None:
        super().__init__(env)
        self.config = config
        self._nominal = {name: _read(env.unwrapped, name) for name in config.physics}
        if config.observation_noise.high > 0 and not isinstance(env.observation_space, Box):
            raise ConfigError(
                "noise needs observations made of numbers",
                where="randomization.observation_noise",
                got=type(env.observation_space).__name__,
                expected="Box",
            )
        self._observation_noise = self._action_noise = 0.0
        self._waiting: list[Any] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Draw a world and start an episode in it."""
        # Not the stream that the environment draws its first state from, or world and state would be correlated.
        generator = np.random.default_rng((seed, 1)) if seed is not None else self.env.unwrapped.np_random
        drawn: dict[str, float] = {name: span.draw(generator) for name, span in self.config.physics.items()}
        for name, value in drawn.items():
            _write(self.env.unwrapped, name, value, self._nominal[name])
        self._observation_noise = self.config.observation_noise.draw(generator)
        self._action_noise = self.config.action_noise.draw(generator)
        fewest, most = self.config.action_delay
        delay = int(generator.integers(fewest, most + 1))
        self._waiting = [self._neutral_action()] * delay
        observation, told = self.env.reset(seed=seed, options=options)
        world = drawn | {
            "observation_noise": self._observation_noise,
            "action_noise": self._action_noise,
            "action_delay": float(delay),
        }
        return self._sensed(observation), {**told, "randomization": world}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act late and imprecisely; see through noise. The reward is that of the true state."""
        self._waiting.append(action)
        observation, reward, terminated, truncated, told = self.env.step(self._disturbed(self._waiting.pop(0)))
        return self._sensed(observation), reward, terminated, truncated, told

    def _sensed(self, observation: Any) -> Any:
        if self._observation_noise == 0:
            return observation
        noise = self.env.unwrapped.np_random.normal(0.0, self._observation_noise, np.shape(observation))
        return (observation + noise).astype(self.env.observation_space.dtype)

    def _disturbed(self, action: Any) -> Any:
        if self._action_noise == 0:
            return action
        generator, space = self.env.unwrapped.np_random, self.env.action_space
        if isinstance(space, Box):
            half_range = (space.high - space.low) / 2
            disturbed = action + generator.normal(0.0, self._action_noise, space.shape) * half_range
            return np.clip(disturbed, space.low, space.high).astype(space.dtype)
        if generator.random() >= self._action_noise:
            return action
        return int(space.start + generator.integers(space.n))

    def _neutral_action(self) -> Any:
        space = self.env.action_space
        return (space.low + space.high) / 2 if isinstance(space, Box) else int(space.start)


def _read(environment: gymnasium.Env, name: str) -> Any:
    """Return the parameter's nominal value."""
    holder, attribute = _holder(environment, name)
    value = getattr(holder, attribute, None)
    if not isinstance(value, int | float | np.ndarray) or isinstance(value, bool):
        known = sorted(key for key, held in vars(holder).items() if isinstance(held, float) and key[0] != "_")
        raise ConfigError(
            "the environment has no such number",
            where="randomization.physics",
            got=name,
            expected=", ".join(known) or "an array of the MuJoCo model, such as model.body_mass",
        )
    return np.array(value) if isinstance(value, np.ndarray) else float(value)


def _write(environment: gymnasium.Env, name: str, value: float, nominal: Any) -> None:
    holder, attribute = _holder(environment, name)
    if isinstance(nominal, np.ndarray):
        getattr(holder, attribute)[:] = nominal * value
    else:
        setattr(holder, attribute, value)
    if isinstance(environment, CartPoleEnv):  # it keeps two products of its parameters
        environment.total_mass = environment.masspole + environment.masscart
        environment.polemass_length = environment.masspole * environment.length


def _holder(environment: gymnasium.Env, name: str) -> tuple[Any, str]:
    """Return the object that has the parameter, and the attribute's name."""
    *path, attribute = name.split(".")
    holder: Any = environment
    for part in path:
        holder = getattr(holder, part, None)
    return holder, attribute
