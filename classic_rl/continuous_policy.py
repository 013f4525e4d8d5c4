"""What trained continuous policies share: the scale of actions, acting in NumPy, prediction, saving."""

from __future__ import annotations

from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces
from torch import Tensor, nn

from classic_rl.continuous_networks import ContinuousNetworkConfig, StackedMirror, StackedMLP
from classic_rl.off_policy import observation_array
from classic_rl.spaces import observation_size, space_from_json, space_to_json
from rlhf.errors import ConfigError


class BoxActions:
    """A Box as agents see it: vectors with every component in [-1, 1].

    Args:
        space: With finite bounds.

    Raises:
        ConfigError: Another space, or one without finite bounds.
    """

    def __init__(self, space: spaces.Space) -> None:
        if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
            raise ConfigError(
                "DDPG, TD3 and SAC choose real numbers",
                where="environment.id",
                got=str(space),
                expected="a Box of floats as action space",
                remedy="Take agent.type dqn or discrete_sac for Discrete actions.",
            )
        if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
            raise ConfigError(
                "actions are scaled from [-1, 1] to the space's bounds, which must be finite",
                where="environment.id",
                got=str(space),
                remedy="Wrap the environment in gymnasium.wrappers.RescaleAction, or give its Box bounds.",
            )
        self.space, self.size = space, int(np.prod(space.shape))
        self._center = (space.low.astype(np.float64) + space.high) / 2
        self._reach = (space.high.astype(np.float64) - space.low) / 2

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Scale actions [N, size] in [-1, 1] to the space's bounds, shape and dtype."""
        scaled = self._center + self._reach * actions.reshape(len(actions), *self.space.shape)
        # Rounding to float32 may leave the bounds by one unit in the last place.
        return np.clip(scaled.astype(self.space.dtype), self.space.low, self.space.high)


class Actor(Protocol):
    """A policy network: an nn.Module with a stack whose first outputs are the actions before tanh."""

    trunk: StackedMLP

    def greedy(self, outputs: np.ndarray) -> np.ndarray:
        """Return deterministic actions [N, A] in [-1, 1] of the trunk's outputs."""
        ...


class DeterministicActor(nn.Module):
    """a = tanh(network(s)), for DDPG and TD3.

    Args:
        observations: Length of an observation.
        actions: Length of an action.
        network: Shape of the hidden layers.
        seed: Of the initial weights.
    """

    def __init__(self, observations: int, actions: int, *, network: ContinuousNetworkConfig, seed: int) -> None:
        super().__init__()
        self.trunk = network.make(observations, actions, seed=seed)

    def forward(self, observations: Tensor) -> Tensor:
        """Map [B, D] to actions [B, A] in [-1, 1]."""
        return self.trunk(observations)[0].tanh()

    def greedy(self, outputs: np.ndarray) -> np.ndarray:
        """The actions themselves."""
        return np.tanh(outputs)


class ContinuousPolicy:
    """Acts on observations of one environment; what a saved folder is loaded as.

    Args:
        actor: Only read.
        observation_space: Of one observation.
        action_space: A Box.
    """

    def __init__(self, actor: Any, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.actor, self.observation_space, self.box = actor, observation_space, BoxActions(action_space)
        self.mirror = StackedMirror(actor.trunk)

    def greedy(self, observations: np.ndarray, *, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Return deterministic actions [N, A] in [-1, 1]."""
        refuse_action_masks(action_masks)
        return self.actor.greedy(self.mirror(observations)[0])

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Scale to the space's bounds."""
        return self.box.to_environment(actions)

    def predict(self, observation: Any, *, deterministic: bool = True) -> Any:
        """Return the action for one observation, in the form `environment.step` accepts.

        Args:
            observation: As the environment returns it.
            deterministic: False draws, where the policy has a distribution (SAC).

        Raises:
            ConfigError: deterministic is false, and the policy has no distribution.
        """
        space = self.observation_space
        batch = gymnasium.vector.utils.concatenate(
            space, [observation], gymnasium.vector.utils.create_empty_array(space, n=1)
        )
        outputs, features = self.mirror(observation_array(space, batch))
        if deterministic:
            return self.to_environment(self.actor.greedy(outputs))[0]
        if not hasattr(self.actor, "draw"):
            raise ConfigError("this policy is deterministic", where="predict", got="deterministic=False")
        return self.to_environment(self.actor.draw(outputs, features, np.random.default_rng()))[0]


def refuse_action_masks(action_masks: np.ndarray | None) -> None:
    """Raise ConfigError: these agents would learn from actions that the environment did not take."""
    if action_masks is not None:
        raise ConfigError(
            "the environment tells which actions are valid, and this agent cannot read it",
            where="agent.type",
            remedy="Take agent.type dqn, or an on-policy algorithm.",
        )


def policy_description(
    kind: str, policy: ContinuousPolicy, *, network: ContinuousNetworkConfig, **more: Any
) -> dict[str, Any]:
    """JSON from which a module's `load_policy` rebuilds the actor."""
    return {
        "type": kind,
        "observation_space": space_to_json(policy.observation_space),
        "action_space": space_to_json(policy.box.space),
        "network": network.model_dump(mode="json"),
        **more,
    }


def load_deterministic_policy(description: dict[str, Any], tensors: dict[str, Tensor]) -> ContinuousPolicy:
    """Rebuild a saved policy of DDPG or TD3."""
    observation_space = space_from_json(description["observation_space"])
    action_space = space_from_json(description["action_space"])
    network = ContinuousNetworkConfig(**description["network"])
    sizes = observation_size(observation_space), BoxActions(action_space).size
    actor = DeterministicActor(*sizes, network=network, seed=0)
    actor.load_state_dict(tensors)
    return ContinuousPolicy(actor, observation_space, action_space)
