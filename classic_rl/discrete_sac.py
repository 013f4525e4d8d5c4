"""Soft actor-critic for finitely many actions: expectations over the policy in place of draws.

    critics      y = R + discount x sum_a pi(a|s') (min_i Q'_i(s', a) - alpha log pi(a|s'))
                 loss = sum_i 1/2 mean (Q_i(s, a) - y)^2,  y constant
    actor        loss = mean sum_a pi(a|s) (alpha log pi(a|s) - min_i Q_i(s, a)),  Q constant
    temperature  loss = - log alpha x mean sum_a pi(a|s) (log pi(a|s) + target entropy)
    targets      theta' <- (1 - rate) theta' + rate theta

Source: Christodoulou 2019, https://arxiv.org/abs/1910.07207, equations 10 to 12. The target entropy is a share of the
uniform policy's, log n (.98 in the paper's text on Atari, .89 in CleanRL).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor, nn

from classic_rl.continuous_agent import OffPolicyAgent, OffPolicyAgentConfig
from classic_rl.continuous_networks import ContinuousNetworkConfig, StackedMirror
from classic_rl.continuous_policy import refuse_action_masks
from classic_rl.distributions import Categorical
from classic_rl.off_policy import observation_array
from classic_rl.sac import FixedTemperature, Temperature
from classic_rl.spaces import observation_size, space_from_json, space_to_json
from rlhf.config import Config
from rlhf.errors import ConfigError


class AutomaticDiscreteTemperature(Config):
    """alpha is learnt so that the policy keeps a share of the largest possible entropy."""

    type: Literal["automatic"] = "automatic"
    initial: float = Field(1.0, gt=0)
    """alpha at the beginning."""
    target_entropy_share: float = Field(0.5, ge=0, le=1)
    """Target entropy over log n. The paper's .98 is nearly uniform, which suits Atari's many useless actions."""


class DiscreteSACConfig(OffPolicyAgentConfig):
    """Soft actor-critic for Discrete actions."""

    type: Literal["discrete_sac"] = "discrete_sac"
    temperature: Annotated[AutomaticDiscreteTemperature | FixedTemperature, Field(discriminator="type")] = (
        AutomaticDiscreteTemperature()
    )


def soft_values(log_probs: Tensor, values: Tensor, alpha: Tensor) -> Tensor:
    """Return V = sum_a pi(a) (Q(a) - alpha log pi(a)) for [B, n] log-probabilities and values.

    >>> soft_values(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[4.0, 8.0]]), torch.tensor(0.0))
    tensor([7.])
    """
    return (log_probs.exp() * (values - alpha * log_probs)).sum(dim=-1)


class DiscretePolicy:
    """Acts on observations of one environment; what a saved folder is loaded as.

    Args:
        actor: A stack of one, from observations to logits; only read.
        observation_space: Of one observation.
        action_space: Discrete.

    Raises:
        ConfigError: Another action space.
    """

    def __init__(self, actor: Any, observation_space: spaces.Space, action_space: spaces.Space) -> None:
        self.actor, self.observation_space, self.action_space = actor, observation_space, action_space
        self.choice = Categorical(require_discrete(action_space), start=int(action_space.start))
        self.mirror = StackedMirror(actor)

    def greedy(self, observations: np.ndarray, *, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Return the most probable actions [N]."""
        refuse_action_masks(action_masks)
        return self.choice.greedy(self.mirror(observations)[0])

    def draw(self, observations: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw actions [N]."""
        logits = self.mirror(observations)[0]
        return self.choice.sample(logits, self.choice.noise(generator, (len(logits),)))

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Add the space's first action."""
        return self.choice.to_environment(actions)

    def predict(self, observation: Any, *, deterministic: bool = True) -> Any:
        """Return the action for one observation; deterministic=False draws it."""
        space = self.observation_space
        empty = gymnasium.vector.utils.create_empty_array(space, n=1)
        rows = observation_array(space, gymnasium.vector.utils.concatenate(space, [observation], empty))
        actions = self.greedy(rows) if deterministic else self.draw(rows, np.random.default_rng())
        return self.to_environment(actions)[0]


def require_discrete(space: spaces.Space) -> int:
    """Return the number of actions.

    Raises:
        ConfigError: The space is not Discrete.
    """
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    raise ConfigError(
        "discrete SAC chooses among finitely many actions",
        where="environment.id",
        got=str(space),
        expected="a Discrete action space",
        remedy="Take agent.type sac, td3 or ddpg for Box actions.",
    )


class DiscreteSAC(OffPolicyAgent):
    """The agent of `classic_rl.off_policy.learn_off_policy`.

    Args:
        config: Its settings.
        observation_space: Of one environment.
        action_space: Discrete.
        shared: num_envs, schedule and seed; see `OffPolicyAgent`.
    """

    policy: DiscretePolicy

    def __init__(
        self, config: DiscreteSACConfig, *, observation_space: spaces.Space, action_space: spaces.Space, **shared: Any
    ) -> None:
        self.num_actions = require_discrete(action_space)
        super().__init__(config, observation_space=observation_space, action_shape=(), action_dtype=np.int64, **shared)
        self.config = config
        sizes, critic_rate = (self.num_observations, self.num_actions), config.critic_learning_rate
        actor: nn.Module = config.network.make(*sizes, seed=self.seeds[0])
        critics = config.network.make(*sizes, members=2, seed=self.seeds[1])
        self.actor = self.flat("actor", actor, learning_rate=config.learning_rate)
        self.critics = self.flat("critics", critics, learning_rate=critic_rate or config.learning_rate)
        self.targets = self.target_of("targets", self.critics)
        share = getattr(config.temperature, "target_entropy_share", 0.0)
        self.temperature = Temperature(
            config.temperature,
            entropy=share * float(np.log(self.num_actions)),
            learning_rate=critic_rate or config.learning_rate,
            device=self.device,
        )
        self.policy = DiscretePolicy(actor, observation_space, action_space)

    def uniform(self, count: int) -> np.ndarray:
        """Return actions drawn uniformly."""
        return self.generator.integers(self.num_actions, size=count)

    def explore(self, observations: np.ndarray) -> np.ndarray:
        """Draw from the policy."""
        return self.policy.draw(observations, self.generator)

    def update(self, *, env_steps: int) -> dict[str, Any]:
        """One step of critics, actor and temperature each, and of the targets."""
        batch, alpha = self.batch(), self.temperature.alpha

        with torch.no_grad():
            next_log_probs = self.log_probs(batch.next_observations)
            following = self.targets.network(batch.next_observations).amin(dim=0)
            target = batch.rewards + batch.discounts * soft_values(next_log_probs, following, alpha)
        values = self.critics.network(batch.observations)
        chosen = values.gather(2, batch.actions[None, :, None].expand(2, -1, 1))[..., 0]
        errors = chosen.detach() - target
        # d/dQ of 1/2 mean (Q - y)^2
        self.descend(self.critics, chosen, errors / len(target), env_steps=env_steps)

        log_probs = self.log_probs(batch.observations)
        with torch.no_grad():
            worth = self.critics.network(batch.observations).amin(dim=0)
        actor_loss = -soft_values(log_probs, worth, alpha).mean()
        self.descend(self.actor, actor_loss, env_steps=env_steps)

        entropy = -(log_probs.exp() * log_probs).sum(dim=1).mean().detach()
        self.temperature.descend(-entropy, learning_rate=self.temperature_rate(self.critics, env_steps))
        self.targets.move_towards(self.critics, rate=self.config.target_rate)
        return {
            "critic_loss": 0.5 * errors.square().mean(),
            "actor_loss": actor_loss.detach(),
            "q_mean": chosen.detach().mean(),
            "entropy": entropy,
            "temperature": alpha[0],
        }

    def log_probs(self, observations: Tensor) -> Tensor:
        """[B, n] log pi(.|s)."""
        return torch.log_softmax(self.actor.network(observations)[0], dim=-1)

    def policy_description(self) -> dict[str, Any]:
        """What `load_policy` needs beside the weights."""
        return {
            "type": "discrete_sac",
            "observation_space": space_to_json(self.policy.observation_space),
            "action_space": space_to_json(self.policy.action_space),
            "network": self.config.network.model_dump(mode="json"),
        }

    def state_dict(self) -> dict[str, Any]:
        """With the temperature."""
        return {**super().state_dict(), "temperature": self.temperature.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        super().load_state_dict(state)
        self.temperature.load_state_dict(state["temperature"])


def load_policy(description: dict[str, Any], tensors: dict[str, Tensor]) -> DiscretePolicy:
    """Rebuild a saved policy."""
    observation_space = space_from_json(description["observation_space"])
    action_space = space_from_json(description["action_space"])
    network = ContinuousNetworkConfig(**description["network"])
    actor = network.make(observation_size(observation_space), require_discrete(action_space), seed=0)
    actor.load_state_dict(tensors)
    return DiscretePolicy(actor, observation_space, action_space)
