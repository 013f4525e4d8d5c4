"""What a trained Q network does: take the action of the largest value; saved and loaded without its agent."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from pydantic import TypeAdapter
from torch import Tensor

from classic_rl.distributional import Values, expected_values, outputs_per_action
from classic_rl.dqn_config import DQNConfig
from classic_rl.networks import NumpyMirror
from classic_rl.noisy import silence_noise
from classic_rl.off_policy import observation_array, to_tensor
from classic_rl.q_networks import QNetwork, QNetworkConfig
from classic_rl.spaces import space_from_json, space_to_json
from rlhf.errors import ConfigError


class GreedyQ:
    """argmax_a Q(s, a).

    Args:
        network: Only read.
        observation_space: Of one observation.
        action_space: Discrete.
        values: What the network's outputs mean.
    """

    def __init__(
        self, network: QNetwork, observation_space: spaces.Space, action_space: spaces.Discrete, values: Values
    ) -> None:
        self.network, self.values = network, values
        self.observation_space, self.action_space = observation_space, action_space
        self.mirror = NumpyMirror(network.plain) if network.runs_in_numpy else None

    def action_values(self, observations: np.ndarray) -> np.ndarray:
        """Q [N, A] with the present noise."""
        if self.mirror is not None:
            outputs = self.mirror(observations)
            if outputs_per_action(self.values) == 1:
                return outputs
            tensor = torch.from_numpy(outputs).view(len(outputs), self.network.num_actions, -1)
            return expected_values(tensor, self.values).numpy()
        with torch.inference_mode():
            device = next(self.network.parameters()).device
            outputs = self.network(to_tensor(observations, device=device))
            return expected_values(outputs, self.values).cpu().numpy()

    def best(self, observations: np.ndarray, *, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Best actions [N] with the present noise, among the valid actions."""
        values = self.action_values(observations)
        if action_masks is not None:
            values = np.where(action_masks, values, -np.inf)
        return values.argmax(axis=1)

    def greedy(self, observations: np.ndarray, *, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Best actions [N] of the mean weights, among the valid actions."""
        if not self.network.config.noisy:
            return self.best(observations, action_masks=action_masks)
        noise = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        silence_noise(self.network.noisy_layers)
        best = self.best(observations, action_masks=action_masks)
        for name, buffer in self.network.named_buffers():
            buffer.copy_(noise[name])
        return best

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Add the space's first action."""
        return actions + self.action_space.start if self.action_space.start else actions

    def predict(self, observation: Any, *, deterministic: bool = True, action_mask: np.ndarray | None = None) -> Any:
        """Return the action for one observation, in the form `environment.step` accepts.

        Args:
            observation: As the environment returns it.
            deterministic: Must be true: a Q network has no distribution to draw from.
            action_mask: [A], True where an action is valid.

        Raises:
            ConfigError: deterministic is false.
        """
        if not deterministic:
            raise ConfigError("a Q network acts greedily only", where="predict", got="deterministic=False")
        space = self.observation_space
        batch = gymnasium.vector.utils.concatenate(
            space, [observation], gymnasium.vector.utils.create_empty_array(space, n=1)
        )
        masks = None if action_mask is None else np.asarray(action_mask, dtype=bool)[None]
        return self.to_environment(self.greedy(observation_array(space, batch), action_masks=masks))[0]


def policy_description(
    observation_space: spaces.Space, action_space: spaces.Space, config: DQNConfig
) -> dict[str, Any]:
    """JSON from which `load_policy` rebuilds the network."""
    return {
        "type": "dqn",
        "observation_space": space_to_json(observation_space),
        "action_space": space_to_json(action_space),
        "network": config.network.model_dump(mode="json"),
        "values": config.values.model_dump(mode="json"),
    }


def load_policy(description: dict[str, Any], tensors: dict[str, Tensor]) -> GreedyQ:
    """Rebuild a saved policy."""
    observation_space = space_from_json(description["observation_space"])
    action_space = space_from_json(description["action_space"])
    values: Values = TypeAdapter(Values).validate_python(description["values"])
    config = QNetworkConfig(**description["network"])
    network = QNetwork(observation_space, int(action_space.n), size=outputs_per_action(values), config=config)
    network.load_state_dict(tensors)
    return GreedyQ(network.requires_grad_(False), observation_space, action_space, values)
