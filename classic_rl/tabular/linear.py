"""Q-learning with linear function approximation, on any gymnasium environment with Discrete actions.

`Q(s, a) = features(s) . w_a`. The update follows the gradient of Q only, not of the target (a semi-gradient); off
policy it can diverge even so (Baird 1995), on policy and with the features of a table it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from pydantic import Field

from classic_rl.tabular.exploration import LinearSchedule, constant, epsilon_greedy
from rlhf.config import Config
from rlhf.errors import ConfigError, TrainingError

Features = Callable[[Any], np.ndarray]
"""From an observation to [F]."""


class OneHot(Config):
    """One feature per state of a Discrete observation space: linear Q-learning is then tabular Q-learning."""

    type: Literal["one_hot"] = "one_hot"


class FourierBasis(Config):
    """`cos(pi c . x)` for all c in {0..order}^D, x scaled to [0, 1]; needs a Box observation space of few dimensions.

    Source: Konidaris, Osentoski, Thomas 2011, Value Function Approximation in Reinforcement Learning using the Fourier
    Basis; with their step size per feature, alpha / ||c||.
    """

    type: Literal["fourier"] = "fourier"
    order: int = Field(3, ge=1)
    """Highest frequency of each dimension."""
    low: list[float] | None = None
    """Scaled to 0; null takes the space's bounds. Observations beyond are scaled alike, not cut."""
    high: list[float] | None = None
    """Scaled to 1; null takes the space's bounds."""


class LinearQLearning(Config):
    """`w_a <- w_a + alpha (r + gamma max_b Q(s', b) - Q(s, a)) features(s)`."""

    type: Literal["linear_q_learning"] = "linear_q_learning"
    features: Annotated[OneHot | FourierBasis, Field(discriminator="type")] = FourierBasis()
    discount: float = Field(0.99, ge=0, le=1)
    """gamma."""
    step_size: LinearSchedule = constant(0.001)
    exploration: LinearSchedule = constant(0.1)


def make_features(space: spaces.Space, config: OneHot | FourierBasis) -> tuple[Features, np.ndarray]:
    """Return the feature function, and the factors [F] that scale each feature's step size.

    Raises:
        ConfigError: The space does not suit the features.
    """
    match config, space:
        case OneHot(), spaces.Discrete():
            rows = np.eye(int(space.n))
            return (lambda observation: rows[int(observation) - int(space.start)]), np.ones(int(space.n))
        case FourierBasis(), spaces.Box() if len(space.shape) == 1:
            low, high = (np.asarray(bound, dtype=np.float64) for bound in _bounds(space, config))
            frequencies = np.array(list(product(range(config.order + 1), repeat=space.shape[0])), dtype=np.float64)
            norms = np.linalg.norm(frequencies, axis=1)
            scaled = np.pi * frequencies / (high - low)

            def fourier(observation: Any) -> np.ndarray:
                return np.cos(scaled @ (observation - low))

            return fourier, 1 / np.where(norms > 0, norms, 1.0)
    raise ConfigError(
        "these features do not suit the observations",
        where="algorithm.features",
        got=f"{config.type} for {space}",
        expected="one_hot for Discrete observations, fourier for a Box with one axis",
    )


def _bounds(space: spaces.Box, config: FourierBasis) -> tuple[Any, Any]:
    low = config.low if config.low is not None else space.low
    high = config.high if config.high is not None else space.high
    if len(low) != space.shape[0] or len(high) != space.shape[0] or not np.isfinite([*low, *high]).all():
        raise ConfigError(
            "the Fourier basis needs finite bounds for each dimension",
            where="algorithm.features",
            got=f"{low} to {high}",
            remedy=f"Set algorithm.features.low and high, {space.shape[0]} numbers each.",
        )
    if np.max(np.abs([*low, *high])) > 1e6:
        raise ConfigError(
            "these bounds leave no resolution", where="algorithm.features", remedy="Set features.low and features.high."
        )
    return low, high


class LinearLearner:
    """Learns in one environment; each call of `learn` begins with a new episode, so that resuming is exact.

    Attributes:
        weights: [A, F].
        steps: Made so far.
    """

    replicated = True

    def __init__(
        self,
        environment: gymnasium.Env,
        config: LinearQLearning,
        *,
        total_steps: int,
        seed: int = 0,
        features: Features | None = None,
    ) -> None:
        """Start from weights of 0.

        Args:
            environment: One environment, not a vector of them.
            config: How to learn.
            total_steps: Of the run; the schedules run over them.
            seed: Of episodes and exploration.
            features: Replaces `config.features`.

        Raises:
            ConfigError: Actions that are not Discrete, or features that do not suit the observations.
        """
        if not isinstance(environment.action_space, spaces.Discrete):
            raise ConfigError("Q-learning needs Discrete actions", where="environment.id", got=environment.action_space)
        self.environment, self.config, self.total_steps, self.seed = environment, config, total_steps, seed
        if features is None:
            self.features, self._scales = make_features(environment.observation_space, config.features)
        else:
            self.features = features
            self._scales = np.ones(len(features(environment.observation_space.sample())))
        self.weights = np.zeros((int(environment.action_space.n), len(self._scales)))
        self.steps = 0

    def learn(self, steps: int) -> dict[str, float]:
        """Make `steps` steps; returns the metrics of the episodes that ended in them.

        Raises:
            TrainingError: The weights diverged.
        """
        generator = np.random.default_rng((self.seed, self.steps))
        returns: list[float] = []
        seen = self._reset(int(generator.integers(2**31)))
        total = 0.0
        for uniform in generator.random(steps).tolist():
            seen, reward, ended = self._step(seen, uniform)
            total += reward
            if ended:
                returns.append(total)
                seen, total = self._reset(None), 0.0
        if not np.isfinite(self.weights).all():
            raise TrainingError(
                "the weights are not finite", where=f"step {self.steps}", remedy="Lower algorithm.step_size."
            )
        metrics = {"rollout/episodes": float(len(returns)), "rollout/total_env_steps": float(self.steps)}
        return metrics | ({"rollout/return_mean": float(np.mean(returns))} if returns else {})

    def _reset(self, seed: int | None) -> np.ndarray:
        return self.features(self.environment.reset(seed=seed)[0])

    def _step(self, seen: np.ndarray, uniform: float) -> tuple[np.ndarray, float, bool]:
        progress = self.steps / self.total_steps
        values = self.weights @ seen
        probabilities = epsilon_greedy(values, exploration=self.config.exploration(progress))
        action = int(np.searchsorted(probabilities.cumsum(), uniform * probabilities.sum(), side="right"))
        observation, reward, terminated, truncated, _ = self.environment.step(self._accepted(action))
        following = self.features(observation)
        target = float(reward)
        if not terminated:
            target += self.config.discount * (self.weights @ following).max()
        rate = self.config.step_size(progress)
        self.weights[action] += rate * (target - values[action]) * self._scales * seen
        self.steps += 1
        return following, float(reward), terminated or truncated

    def _accepted(self, action: int) -> int:
        return action + int(self.environment.action_space.start)

    def play(self, episodes: int, *, seed: int = 1_000_000, max_steps: int = 10_000) -> dict[str, float]:
        """Play greedily, each episode with a seed of its own; returns return_mean, return_std, length_mean."""
        returns, lengths = np.zeros(episodes), np.zeros(episodes)
        for episode in range(episodes):
            seen, ended = self._reset(seed + episode), False
            while not ended and lengths[episode] < max_steps:
                action = self._accepted(int((self.weights @ seen).argmax()))
                observation, reward, terminated, truncated, _ = self.environment.step(action)
                seen, ended = self.features(observation), terminated or truncated
                returns[episode] += float(reward)
                lengths[episode] += 1
        return {
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std()),
            "length_mean": float(lengths.mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        """Weights and steps."""
        return {"weights": self.weights.copy(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.weights, self.steps = state["weights"].copy(), state["steps"]
