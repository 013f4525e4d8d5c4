"""What DDPG, TD3 and SAC share beside their update rules: settings, replay, random first steps, state."""

from __future__ import annotations

import copy
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from pydantic import Field
from torch import Tensor

from classic_rl.action_noise import ActionNoise, GaussianNoise, NoiseConfig
from classic_rl.continuous_networks import ContinuousNetworkConfig
from classic_rl.continuous_policy import (
    BoxActions,
    ContinuousPolicy,
    DeterministicActor,
    policy_description,
    refuse_action_masks,
)
from classic_rl.dqn_config import UniformReplay
from classic_rl.off_policy import OffPolicySchedule, observation_form
from classic_rl.optimization import FlatNetwork, OptimizerConfig
from classic_rl.replay import Transitions
from classic_rl.spaces import is_image, observation_size
from rlhf.config import Config
from rlhf.errors import ConfigError


class OffPolicyAgentConfig(Config):
    """What actor-critics that learn from replay have in common."""

    discount: float = Field(0.99, ge=0, le=1)
    """gamma."""
    n_step: int = Field(1, ge=1)
    """Rewards summed before bootstrapping with gamma^n, uncorrected for the policy's change since then."""
    batch_size: int = Field(256, ge=1)
    """Transitions per update."""
    replay: UniformReplay = UniformReplay()
    network: ContinuousNetworkConfig = ContinuousNetworkConfig()
    learning_rate: float = Field(3e-4, gt=0)
    """Of Adam, for the actor, and for the critics where critic_learning_rate is null."""
    critic_learning_rate: float | None = Field(None, gt=0)
    """Of Adam, for the critics."""
    learning_rate_schedule: Literal["constant", "linear"] = "constant"
    """linear lets the learning rates fall to 0 at the end of the run."""
    target_rate: float = Field(0.005, gt=0, le=1)
    """Share of the online networks that is mixed into the targets (tau, Polyak averaging)."""
    device: str = "cpu"
    """Where the networks live."""

    def optimizer(self, learning_rate: float) -> OptimizerConfig:
        """Adam as torch has it: the published results in PyTorch clip no gradients."""
        return OptimizerConfig(
            name="adam", learning_rate=learning_rate, schedule=self.learning_rate_schedule, max_grad_norm=None
        )


class OffPolicyAgent:
    """The common part of an agent of `classic_rl.off_policy.learn_off_policy`.

    A subclass makes its networks with `flat` and `target_of`, sets `policy`, and brings `update` and `explore`.

    Args:
        config: The subclass's.
        observation_space: Of one environment; vectors.
        num_envs: Environments stepped together.
        schedule: The run's: random actions before `start_steps`, learning rates that fall with its steps.
        seed: Of weights, exploration, replay and update noise.
        action_shape: Of one stored action.
        action_dtype: Of a stored action.

    Raises:
        ConfigError: Image observations.
    """

    policy: Any

    def __init__(
        self,
        config: OffPolicyAgentConfig,
        *,
        observation_space: spaces.Space,
        num_envs: int,
        schedule: OffPolicySchedule,
        seed: int,
        action_shape: tuple[int, ...],
        action_dtype: Any,
    ) -> None:
        if is_image(observation_space):
            raise ConfigError(
                "this agent's networks read vectors, not images",
                where="environment.id",
                got=str(observation_space),
                remedy="Take agent.type dqn, or wrap the environment so that it returns features.",
            )
        self.shared_config, self.schedule, self.num_envs = config, schedule, num_envs
        self.device = torch.device(config.device)
        self.num_observations = observation_size(observation_space)
        self.seeds = [int(value) for value in np.random.SeedSequence(seed).generate_state(5)]
        """Of actor, critics, exploration, update noise, replay."""
        self.generator = np.random.default_rng(self.seeds[2])
        self.noise_generator = torch.Generator(self.device).manual_seed(self.seeds[3])
        shape, dtype = observation_form(observation_space)
        self.replay = config.replay.make(
            num_envs=num_envs,
            observation_shape=shape,
            observation_dtype=dtype,
            action_shape=action_shape,
            action_dtype=action_dtype,
            discount=config.discount,
            n_step=config.n_step,
            seed=self.seeds[4],
        )
        self.networks: dict[str, FlatNetwork] = {}

    # --- parts of subclasses --------------------------------------------------------------------------------------

    def flat(self, name: str, network: torch.nn.Module, *, learning_rate: float) -> FlatNetwork:
        """Give a network its optimizer, and a place in the state."""
        optimizer = self.shared_config.optimizer(learning_rate)
        self.networks[name] = FlatNetwork(network.to(self.device), optimizer)
        return self.networks[name]

    def target_of(self, name: str, online: FlatNetwork) -> FlatNetwork:
        """Copy a network; the copy follows it, and no gradient reaches it."""
        self.networks[name] = FlatNetwork(copy.deepcopy(online.network))
        return self.networks[name]

    def progress(self, env_steps: int) -> float:
        """Share of the run that is done."""
        return min(1.0, env_steps / self.schedule.total_steps)

    def batch(self) -> Transitions:
        """Draw transitions, on the networks' device."""
        drawn = self.replay.sample(self.shared_config.batch_size)
        if self.device.type == "cpu":
            return drawn
        return Transitions(*(part.to(self.device) if isinstance(part, Tensor) else part for part in drawn))

    def descend(self, flat: FlatNetwork, outputs: Tensor, gradient: Tensor | None = None, *, env_steps: int) -> None:
        """One step of Adam down a loss: `outputs` itself, or what has `gradient` about many `outputs`."""
        flat.zero_grad()
        outputs.backward(gradient)
        flat.step(progress=self.progress(env_steps))

    def temperature_rate(self, critics: FlatNetwork, env_steps: int) -> float:
        """The critics' learning rate, which a learnt temperature shares."""
        assert critics.config is not None
        return critics.config.rate(self.progress(env_steps))

    def normals(self, *shape: int) -> Tensor:
        """Standard normals of this agent's own generator."""
        return torch.randn(*shape, generator=self.noise_generator, device=self.device)

    # --- acting ---------------------------------------------------------------------------------------------------

    def act(self, observations: np.ndarray, *, env_steps: int, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Return exploring actions; uniform ones before the schedule's `start_steps`."""
        refuse_action_masks(action_masks)
        if env_steps < self.schedule.start_steps:
            return self.uniform(len(observations))
        if self.device.type != "cpu":
            self.policy.mirror.refresh()
        return self.explore(observations)

    def uniform(self, count: int) -> np.ndarray:
        """Return `count` actions drawn uniformly."""
        raise NotImplementedError

    def explore(self, observations: np.ndarray) -> np.ndarray:
        """Return exploring actions for [N, D]."""
        raise NotImplementedError

    def greedy(self, observations: np.ndarray, *, action_masks: np.ndarray | None = None) -> np.ndarray:
        """Return deterministic actions for [N, D]."""
        if self.device.type != "cpu":
            self.policy.mirror.refresh()
        return self.policy.greedy(observations, action_masks=action_masks)

    def to_environment(self, actions: np.ndarray) -> np.ndarray:
        """Turn stored actions into what the environment accepts."""
        return self.policy.to_environment(actions)

    # --- state ----------------------------------------------------------------------------------------------------

    def policy_tensors(self) -> dict[str, Tensor]:
        """The actor's weights."""
        return self.policy.actor.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Networks with optimizers, replay, generators."""
        return {
            "networks": {name: network.state_dict() for name, network in self.networks.items()},
            "replay": self.replay.state_dict(),
            "generator": self.generator.bit_generator.state,
            "noise_generator": self.noise_generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        for name, network in self.networks.items():
            network.load_state_dict(state["networks"][name])
        self.replay.load_state_dict(state["replay"])
        self.generator.bit_generator.state = state["generator"]
        self.noise_generator.set_state(state["noise_generator"])


class ContinuousAgent(OffPolicyAgent):
    """An agent for Box actions, which it stores as vectors in [-1, 1]."""

    policy: ContinuousPolicy

    def __init__(self, config: OffPolicyAgentConfig, *, action_space: spaces.Space, **shared: Any) -> None:
        self.num_actions = BoxActions(action_space).size
        super().__init__(config, action_shape=(self.num_actions,), action_dtype=np.float32, **shared)

    def uniform(self, count: int) -> np.ndarray:
        """Return actions drawn uniformly from the box."""
        return self.generator.uniform(-1, 1, size=(count, self.num_actions)).astype(np.float32)


class WideNetworkConfig(ContinuousNetworkConfig):
    """Shape of the actor and of each critic, by default as in the papers of DDPG and TD3."""

    hidden_sizes: list[int] = Field(default=[400, 300], min_length=1)
    """Width of each hidden layer."""


class DeterministicAgentConfig(OffPolicyAgentConfig):
    """What DDPG and TD3 share."""

    network: WideNetworkConfig = WideNetworkConfig()
    learning_rate: float = Field(1e-3, gt=0)
    """Of Adam, for the actor, and for the critics where critic_learning_rate is null."""
    noise: NoiseConfig = GaussianNoise()


class DeterministicAgent(ContinuousAgent):
    """A deterministic actor that explores with added noise.

    Args:
        config: Its settings.
        observation_space: Of one environment.
        action_space: A Box with finite bounds.
        kind: The agent's `type`.
        members: How many critics.
        shared: num_envs, schedule and seed; see `OffPolicyAgent`.
    """

    def __init__(
        self,
        config: DeterministicAgentConfig,
        *,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        kind: str,
        members: int,
        **shared: Any,
    ) -> None:
        super().__init__(config, observation_space=observation_space, action_space=action_space, **shared)
        self.config, self.kind = config, kind
        sizes, critic_rate = (self.num_observations, self.num_actions), config.critic_learning_rate
        actor = DeterministicActor(*sizes, network=config.network, seed=self.seeds[0])
        critics = config.network.make(sum(sizes), 1, members=members, seed=self.seeds[1])
        self.actor = self.flat("actor", actor, learning_rate=config.learning_rate)
        self.critics = self.flat("critics", critics, learning_rate=critic_rate or config.learning_rate)
        self.target_actor = self.target_of("target_actor", self.actor)
        self.target_critics = self.target_of("target_critics", self.critics)
        self.policy = ContinuousPolicy(actor, observation_space, action_space)
        self.noise = ActionNoise(config.noise, shape=(self.num_envs, self.num_actions))

    def explore(self, observations: np.ndarray) -> np.ndarray:
        """The actor's action plus noise, clipped to [-1, 1]."""
        noise = self.noise(self.generator, starts=self.replay.starts())
        return np.clip(self.policy.greedy(observations) + noise, -1.0, 1.0)

    def follow(self) -> None:
        """Move both targets."""
        self.target_actor.move_towards(self.actor, rate=self.config.target_rate)
        self.target_critics.move_towards(self.critics, rate=self.config.target_rate)

    def policy_description(self) -> dict[str, Any]:
        """What `load_policy` needs beside the weights."""
        return policy_description(self.kind, self.policy, network=self.config.network)

    def state_dict(self) -> dict[str, Any]:
        """With the noise's memory."""
        return {**super().state_dict(), "noise": self.noise.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        super().load_state_dict(state)
        self.noise.load_state_dict(state["noise"])
