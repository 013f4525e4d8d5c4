"""The off-policy agents by their `type`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from classic_rl.ddpg import DDPG, DDPGConfig
from classic_rl.discrete_sac import DiscreteSAC, DiscreteSACConfig
from classic_rl.dqn import DQN
from classic_rl.dqn_config import DQNConfig
from classic_rl.environments import EnvironmentConfig, make_environments
from classic_rl.off_policy import OffPolicySchedule, action_masks_of, start
from classic_rl.sac import SAC, SACConfig
from classic_rl.td3 import TD3, TD3Config
from rlhf.errors import ConfigError

AgentConfig = Annotated[DQNConfig | DDPGConfig | TD3Config | SACConfig | DiscreteSACConfig, Field(discriminator="type")]
"""Settings of any off-policy agent: a union by `type`."""


def make_agent(config: AgentConfig, *, environment: EnvironmentConfig, schedule: OffPolicySchedule, seed: int) -> Any:
    """Build the agent for an environment.

    Args:
        config: Which, and its settings.
        environment: Told for its spaces and the number of environments; one is made and closed again.
        schedule: The run's.
        seed: Of everything random in the agent.

    Raises:
        ConfigError: The agent cannot act in this environment.
    """
    probe = make_environments(environment, num_envs=1, images=True)
    try:
        _, infos = start(probe, seed)
        shared = {
            "observation_space": probe.single_observation_space,
            "action_space": probe.single_action_space,
            "num_envs": environment.num_envs,
            "schedule": schedule,
            "seed": seed,
        }
        masked = action_masks_of(probe, infos) is not None
        match config:
            case DQNConfig():
                return DQN(config, action_masks=masked, **shared)
            case _ if masked:
                raise ConfigError(
                    "the environment tells which actions are valid, and this agent cannot read it",
                    where="agent.type",
                    got=config.type,
                    expected="dqn",
                )
            case DDPGConfig():
                return DDPG(config, **shared)
            case TD3Config():
                return TD3(config, **shared)
            case SACConfig():
                return SAC(config, **shared)
            case DiscreteSACConfig():
                return DiscreteSAC(config, **shared)
    finally:
        probe.close()
