"""What the tests of the continuous agents share: agents with a filled replay, and an environment without end."""

from __future__ import annotations

import gymnasium
import numpy as np
from gymnasium import spaces

from classic_rl.agents import make_agent
from classic_rl.ddpg import DDPGConfig
from classic_rl.discrete_sac import DiscreteSACConfig
from classic_rl.environments import EnvironmentConfig
from classic_rl.off_policy import OffPolicySchedule, Player
from classic_rl.sac import SACConfig
from classic_rl.state_dependent_exploration import StateDependentExploration
from classic_rl.td3 import TD3Config

SMALL = {"network": {"hidden_sizes": [16, 16]}, "batch_size": 32, "replay": {"capacity": 1000}}
CONFIGS = {
    "sac": SACConfig(**SMALL),
    "sac_gsde": SACConfig(**SMALL, state_dependent=StateDependentExploration(sample_every=7)),
    "td3": TD3Config(**SMALL),
    "ddpg": DDPGConfig(**SMALL, noise={"type": "ornstein_uhlenbeck"}),
    "discrete_sac": DiscreteSACConfig(**SMALL),
}


class ForeverBox(gymnasium.Env):
    """One state, reward 1 whatever is done, no end of its own."""

    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, dtype=np.float32), {}

    def step(self, action):
        return np.ones(1, dtype=np.float32), 1.0, False, False, {}


class Odd(gymnasium.Env):
    """Refuses actions outside its uneven bounds; observes the last one."""

    observation_space = spaces.Box(-10, 10, (2, 1), np.float64)
    action_space = spaces.Box(np.array([[-1.0], [2.0]]), np.array([[3.0], [2.5]]), dtype=np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros((2, 1)), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        return action, float(-np.abs(action).sum()), False, False, {}


def register() -> None:
    """Make the environments known to gymnasium, once."""
    for identifier, entry_point, limit in (("ForeverBoxLimited-v0", ForeverBox, 8), ("OddBox-v0", Odd, 20)):
        if identifier not in gymnasium.registry:
            gymnasium.register(identifier, entry_point=entry_point, max_episode_steps=limit)


def environment_for(config) -> str:
    return "CartPole-v1" if isinstance(config, DiscreteSACConfig) else "Pendulum-v1"


def agent_for(config, identifier, *, seed=0, total_steps=1000, start_steps=0, num_envs=1, **kwargs):
    """Return (agent, environment config, schedule)."""
    environment = EnvironmentConfig(id=identifier, num_envs=num_envs, vectorization="sync", kwargs=kwargs)
    schedule = OffPolicySchedule(total_steps=total_steps, start_steps=start_steps)
    return make_agent(config, environment=environment, schedule=schedule, seed=seed), environment, schedule


def fill(agent, count=100, *, seed=0):
    """Store random transitions, one in ten of them terminal."""
    generator = np.random.default_rng(seed)
    size, discrete = agent.num_observations, not hasattr(agent.policy, "box")
    observations = generator.normal(size=(1, size)).astype(np.float32)
    for _ in range(count):
        following = generator.normal(size=(1, size)).astype(np.float32)
        shape = (1,) if discrete else (1, agent.num_actions)
        agent.replay.add(
            observations=observations,
            actions=generator.integers(agent.num_actions, size=1) if discrete else generator.uniform(-1, 1, shape),
            rewards=generator.normal(size=1),
            next_observations=following,
            terminated=generator.random(1) < 0.1,
            truncated=np.zeros(1, bool),
            mask=np.ones(1, bool),
        )
        observations = following


def train(agent, environment, schedule, *, seed=0):
    """Run the loop's player to the end of the schedule, without a run directory."""
    player = Player(agent, environment, schedule, seed=seed)
    metrics = player.play_until(schedule.total_steps)
    player.environments.close()
    return metrics


def weights(agent):
    """Every network's weights by name."""
    return {
        f"{name}.{key}": value
        for name, network in agent.networks.items()
        for key, value in network.state_dict()["weights"].items()
    }
