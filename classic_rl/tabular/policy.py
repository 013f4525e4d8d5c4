"""What a tabular or linear run leaves behind to act with; `classic_rl.load` reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium import spaces
from pydantic import TypeAdapter
from torch import Tensor

from classic_rl.spaces import space_from_json
from classic_rl.tabular.linear import Features, LinearQLearning, make_features
from rlhf.errors import ConfigError


class TablePolicy:
    """Acts by a table of probabilities.

    Args:
        probabilities: [S, A] of each action in each state; one-hot where the policy is greedy.
        action_values: [S, A] Q.
    """

    def __init__(self, probabilities: np.ndarray, action_values: np.ndarray) -> None:
        self.probabilities, self.action_values = probabilities, action_values
        self._generator = np.random.default_rng()

    def predict(self, observation: Any, *, deterministic: bool = True) -> int:
        """Return the action in one state, the observation of a toy-text environment.

        Args:
            observation: The state's number.
            deterministic: True takes the most probable action, False draws one.
        """
        probabilities = self.probabilities[int(observation)]
        if deterministic:
            return int(probabilities.argmax())
        return int(self._generator.choice(len(probabilities), p=probabilities))


class LinearPolicy:
    """Takes the action with the largest `features(s) . w_a`.

    Args:
        features: From an observation to [F].
        weights: [A, F].
        first_action: What action 0 is called in the environment.
    """

    def __init__(self, features: Features, weights: np.ndarray, *, first_action: int = 0) -> None:
        self.features, self.weights, self.first_action = features, weights, first_action

    def predict(self, observation: Any, *, deterministic: bool = True) -> int:
        """Return the action for one observation.

        Args:
            observation: As the environment returns it.
            deterministic: Must be true: action values have no distribution to draw from.

        Raises:
            ConfigError: deterministic is false.
        """
        if not deterministic:
            raise ConfigError("action values act greedily only", where="predict", got="deterministic=False")
        return int((self.weights @ self.features(observation)).argmax()) + self.first_action


def load_policy(description: dict[str, Any], tensors: dict[str, Tensor]) -> TablePolicy | LinearPolicy:
    """Rebuild what a solver saved."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    if description["type"] == "table":
        return TablePolicy(arrays["policy"], arrays["action_values"])
    observations, actions = (space_from_json(description[f"{name}_space"]) for name in ("observation", "action"))
    assert isinstance(actions, spaces.Discrete)
    config = TypeAdapter(LinearQLearning).validate_python(description["algorithm"])
    features, _ = make_features(observations, config.features)
    return LinearPolicy(features, arrays["weights"], first_action=int(actions.start))
