"""Settings of the DQN family: every piece is a switch, and any combination is allowed that means something."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from classic_rl.distributional import ScalarValues, Values
from classic_rl.optimization import OptimizerConfig
from classic_rl.prioritized import PrioritizedReplayBuffer
from classic_rl.q_networks import QNetworkConfig
from classic_rl.replay import NewestStep, ReplayBuffer
from rlhf.config import Config


class EpsilonGreedy(Config):
    """Random actions with probability epsilon, which falls linearly and then stays."""

    initial: float = Field(1.0, ge=0, le=1)
    """At step 0."""
    final: float = Field(0.05, ge=0, le=1)
    """Where it stays."""
    fraction: float = Field(0.1, ge=0, le=1)
    """Share of the run's steps over which it falls."""


def epsilon_at(exploration: EpsilonGreedy, env_steps: int, *, total_steps: int) -> float:
    """Return epsilon after `env_steps` of `total_steps` steps.

    >>> epsilon_at(EpsilonGreedy(fraction=0.5, final=0.0), 25, total_steps=100)
    0.5
    """
    span = exploration.fraction * total_steps
    done = 1.0 if env_steps >= span else env_steps / span
    return exploration.initial + done * (exploration.final - exploration.initial)


class UniformReplay(Config):
    """Transitions are drawn uniformly (Lin 1992; Mnih et al. 2013, https://arxiv.org/abs/1312.5602)."""

    type: Literal["uniform"] = "uniform"
    capacity: int = Field(100_000, ge=2)
    """Steps kept, over all environments."""

    def make(self, **shared: Any) -> ReplayBuffer:
        """Build the buffer."""
        return ReplayBuffer(self.capacity, **shared)


class PrioritizedReplay(Config):
    """Transitions are drawn by their last error (Schaul et al. 2016, https://arxiv.org/abs/1511.05952)."""

    type: Literal["proportional", "rank_based"] = "proportional"
    capacity: int = Field(100_000, ge=2)
    """Steps kept, over all environments."""
    alpha: float = Field(0.6, ge=0, le=1)
    """How much errors matter; 0 is uniform."""
    beta: float = Field(0.4, ge=0, le=1)
    """Initial exponent of the importance weights; it rises linearly to 1 at the end of the run."""
    epsilon: float = Field(1e-6, gt=0)
    """Added to every error (proportional)."""

    def beta_at(self, progress: float) -> float:
        """Return the exponent at a share of the run."""
        return self.beta + progress * (1.0 - self.beta)

    def make(self, **shared: Any) -> PrioritizedReplayBuffer:
        """Build the buffer."""
        return PrioritizedReplayBuffer(
            self.capacity, alpha=self.alpha, epsilon=self.epsilon, rank_based=self.type == "rank_based", **shared
        )


class NoReplay(Config):
    """The newest step only, as it happened: correlated batches of num_envs transitions. A baseline."""

    type: Literal["none"] = "none"

    def make(self, **shared: Any) -> ReplayBuffer:
        """Build the buffer."""
        return NewestStep(**shared)


class HardTarget(Config):
    """Targets from a copy of the network that is renewed now and then."""

    type: Literal["hard"] = "hard"
    every_steps: int = Field(1000, ge=1)
    """Environment steps between copies; they happen at the next update."""


class SoftTarget(Config):
    """Targets from a running average of the network."""

    type: Literal["soft"] = "soft"
    rate: float = Field(0.005, gt=0, le=1)
    """Share of the online network that is mixed in after every update."""


class NoTarget(Config):
    """Targets from the network itself, which moves with every update. A baseline."""

    type: Literal["none"] = "none"


class DQNConfig(Config):
    """Deep Q learning."""

    type: Literal["dqn"] = "dqn"
    discount: float = Field(0.99, ge=0, le=1)
    """gamma."""
    n_step: int = Field(1, ge=1)
    """Rewards summed before bootstrapping with gamma^n."""
    double: bool = False
    """The online network chooses the next action, the target network values it (van Hasselt et al. 2016)."""
    clip_rewards: bool = False
    """Learn from the sign of rewards; metrics and evaluation show them as they are."""
    batch_size: int = Field(32, ge=1)
    """Transitions per update."""
    values: Values = ScalarValues()
    network: QNetworkConfig = QNetworkConfig()
    replay: Annotated[UniformReplay | PrioritizedReplay | NoReplay, Field(discriminator="type")] = UniformReplay()
    target: Annotated[HardTarget | SoftTarget | NoTarget, Field(discriminator="type")] = HardTarget()
    exploration: EpsilonGreedy = EpsilonGreedy()
    optimizer: OptimizerConfig = OptimizerConfig()
    device: str = "cpu"
    """Where the networks live; small ones are fastest on cpu."""

    @model_validator(mode="after")
    def _refuse_the_meaningless(self) -> Self:
        if self.double and self.target.type == "none":
            raise ValueError("double needs a target network: the same network would choose and value; set target.type")
        if self.replay.type == "none" and self.n_step > 1:
            raise ValueError("n_step > 1 needs a replay buffer; set replay.type")
        return self
