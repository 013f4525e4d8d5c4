"""Soft actor-critic: the policy maximizes return plus entropy, from replayed transitions.

    critics      y = R + discount x (min_i Q'_i(s', a') - alpha log pi(a'|s')),  a' ~ pi(.|s')
                 loss = sum_i 1/2 mean (Q_i(s, a) - y)^2,  y constant
    actor        loss = mean (alpha log pi(a|s) - min_i Q_i(s, a)),  a = tanh(mean(s) + std(s) x noise)
    temperature  loss = - log alpha x mean (log pi(a|s) + target entropy)
    targets      theta' <- (1 - rate) theta' + rate theta

Source: Haarnoja et al. 2018, https://arxiv.org/abs/1801.01290 (squashing: appendix C), and with the automatic
temperature 2019, https://arxiv.org/abs/1812.05905 (two critics, no value network; the loss is in log alpha, as in the
authors' code). Order of the steps as in Stable-Baselines3: critics first, and the actor learns from the new critics.
The policy is squashed by tanh; "truncated Gaussian", as it is at times called, is another distribution.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor, nn

from classic_rl.continuous_agent import ContinuousAgent, OffPolicyAgentConfig
from classic_rl.continuous_networks import ContinuousNetworkConfig
from classic_rl.continuous_policy import BoxActions, ContinuousPolicy, policy_description
from classic_rl.spaces import observation_size, space_from_json
from classic_rl.squashed import GaussianActor
from classic_rl.state_dependent_exploration import HeldMatrices, StateDependentActor, StateDependentExploration
from rlhf.config import Config
from rlhf.training.optimizer import step_alone


class AutomaticTemperature(Config):
    """alpha is learnt so that the policy keeps a given entropy."""

    type: Literal["automatic"] = "automatic"
    initial: float = Field(1.0, gt=0)
    """alpha at the beginning."""
    target_entropy: float | None = None
    """In nats, of actions in [-1, 1]; null is minus the number of action components."""


class FixedTemperature(Config):
    """alpha stays."""

    type: Literal["fixed"] = "fixed"
    value: float = Field(0.2, ge=0)
    """alpha."""


class SACConfig(OffPolicyAgentConfig):
    """Soft actor-critic."""

    type: Literal["sac"] = "sac"
    temperature: Annotated[AutomaticTemperature | FixedTemperature, Field(discriminator="type")] = (
        AutomaticTemperature()
    )
    state_dependent: StateDependentExploration | None = None
    """Exploration noise that is a function of the state (gSDE); null draws independent noise at every step."""


class Temperature:
    """log alpha and its Adam, on one number.

    Args:
        config: With `value` (`FixedTemperature`), or learnt from `initial` on.
        entropy: The target.
        learning_rate: Of Adam.
    """

    def __init__(self, config: Any, *, entropy: float, learning_rate: float, device: Any) -> None:
        fixed = isinstance(config, FixedTemperature)
        self.log_alpha = nn.Parameter(torch.tensor([config.value if fixed else config.initial], device=device).log())
        self.target_entropy = entropy
        self._optimizer = None if fixed else torch.optim.Adam([self.log_alpha], lr=learning_rate, fused=True)

    @property
    def alpha(self) -> Tensor:
        """[1], without gradient."""
        return self.log_alpha.detach().exp()

    def descend(self, mean_log_prob: Tensor, *, learning_rate: float) -> None:
        """One step: d/d log alpha of -log alpha x (mean log pi + target entropy) is minus the bracket."""
        if self._optimizer is None:
            return
        self._optimizer.param_groups[0]["lr"] = learning_rate
        self.log_alpha.grad = -(mean_log_prob.detach() + self.target_entropy).reshape(1)
        step_alone(self._optimizer, self.log_alpha)

    def state_dict(self) -> dict[str, Any]:
        """Logarithm of alpha, and Adam's state."""
        optimizer = None if self._optimizer is None else self._optimizer.state_dict()
        return {"log_alpha": self.log_alpha.detach().clone(), "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s content."""
        with torch.no_grad():
            self.log_alpha.copy_(state["log_alpha"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])


class SAC(ContinuousAgent):
    """The agent of `classic_rl.off_policy.learn_off_policy`.

    Args:
        config: Its settings.
        observation_space: Of one environment.
        action_space: A Box with finite bounds.
        shared: num_envs, schedule and seed; see `OffPolicyAgent`.
    """

    def __init__(
        self, config: SACConfig, *, observation_space: spaces.Space, action_space: spaces.Space, **shared: Any
    ) -> None:
        super().__init__(config, observation_space=observation_space, action_space=action_space, **shared)
        self.config = config
        sizes, critic_rate = (self.num_observations, self.num_actions), config.critic_learning_rate
        actor = make_actor(*sizes, network=config.network, state_dependent=config.state_dependent, seed=self.seeds[0])
        critics = config.network.make(sum(sizes), 1, members=2, seed=self.seeds[1])
        self.actor = self.flat("actor", actor, learning_rate=config.learning_rate)
        self.critics = self.flat("critics", critics, learning_rate=critic_rate or config.learning_rate)
        self.targets = self.target_of("targets", self.critics)
        wanted = getattr(config.temperature, "target_entropy", None)
        self.temperature = Temperature(
            config.temperature,
            entropy=-float(self.num_actions) if wanted is None else wanted,
            learning_rate=critic_rate or config.learning_rate,
            device=self.device,
        )
        self.policy = ContinuousPolicy(actor, observation_space, action_space)
        self._held = HeldMatrices(actor, num_envs=self.num_envs) if isinstance(actor, StateDependentActor) else None

    # --- acting ---------------------------------------------------------------------------------------------------

    def explore(self, observations: np.ndarray) -> np.ndarray:
        """Draw from the policy."""
        outputs, features = self.policy.mirror(observations)
        if self._held is None:
            return self.policy.actor.draw(outputs, features, self.generator)
        return self.policy.actor.explore(outputs, features, self._held(self.generator))

    # --- learning -------------------------------------------------------------------------------------------------

    def update(self, *, env_steps: int) -> dict[str, Any]:
        """One step of critics, actor and temperature each, and of the targets."""
        batch, actor, alpha = self.batch(), self.actor.network, self.temperature.alpha
        noise, next_noise = self._noise(len(batch.rewards))

        with torch.no_grad():
            next_actions, next_log_probs = actor(batch.next_observations, next_noise)
            following = self.targets.network(batch.next_observations, next_actions)[..., 0].amin(dim=0)
            target = batch.rewards + batch.discounts * (following - alpha * next_log_probs)
        values = self.critics.network(batch.observations, batch.actions)
        errors = values.detach() - target[:, None]
        # d/dQ of 1/2 mean (Q - y)^2
        self.descend(self.critics, values, errors / len(target), env_steps=env_steps)

        actions, log_probs = actor(batch.observations, noise)
        worth = self.critics.network(batch.observations, actions, frozen=True)[..., 0].amin(dim=0)
        actor_loss = (alpha * log_probs - worth).mean()
        self.descend(self.actor, actor_loss, env_steps=env_steps)

        entropy = -log_probs.detach().mean()
        self.temperature.descend(-entropy, learning_rate=self.temperature_rate(self.critics, env_steps))
        self.targets.move_towards(self.critics, rate=self.config.target_rate)
        return {
            "critic_loss": 0.5 * errors.square().mean(),
            "actor_loss": actor_loss.detach(),
            "q_mean": worth.detach().mean(),
            "entropy": entropy,
            "temperature": alpha[0],
        }

    def _noise(self, rows: int) -> tuple[Tensor, Tensor]:
        """What actions at s and at s' are drawn with: independent, or with gSDE one matrix for the whole update."""
        if isinstance(self.policy.actor, StateDependentActor):
            matrix = self.policy.actor.matrix(self.noise_generator)
            return matrix, matrix
        both = self.normals(2, rows, self.num_actions)
        return both[0], both[1]

    # --- state ----------------------------------------------------------------------------------------------------

    def policy_description(self) -> dict[str, Any]:
        """What `load_policy` needs beside the weights."""
        own = self.config.state_dependent
        described = None if own is None else own.model_dump(mode="json")
        return policy_description("sac", self.policy, network=self.config.network, state_dependent=described)

    def state_dict(self) -> dict[str, Any]:
        """With the temperature, and gSDE's matrices."""
        held = None if self._held is None else self._held.state_dict()
        return {**super().state_dict(), "temperature": self.temperature.state_dict(), "held": held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        super().load_state_dict(state)
        self.temperature.load_state_dict(state["temperature"])
        if self._held is not None:
            self._held.load_state_dict(state["held"])


def make_actor(
    observations: int,
    actions: int,
    *,
    network: ContinuousNetworkConfig,
    state_dependent: StateDependentExploration | None,
    seed: int,
) -> GaussianActor | StateDependentActor:
    """Build the policy network."""
    if state_dependent is None:
        return GaussianActor(observations, actions, network=network, seed=seed)
    return StateDependentActor(observations, actions, network=network, config=state_dependent, seed=seed)


def load_policy(description: dict[str, Any], tensors: dict[str, Tensor]) -> ContinuousPolicy:
    """Rebuild a saved policy."""
    observation_space = space_from_json(description["observation_space"])
    action_space = space_from_json(description["action_space"])
    own = description["state_dependent"]
    actor = make_actor(
        observation_size(observation_space),
        BoxActions(action_space).size,
        network=ContinuousNetworkConfig(**description["network"]),
        state_dependent=None if own is None else StateDependentExploration(**own),
        seed=0,
    )
    actor.load_state_dict(tensors)
    return ContinuousPolicy(actor, observation_space, action_space)
