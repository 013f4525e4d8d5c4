"""A trained policy as a folder: `policy.safetensors` with the weights, `policy.json` with everything else."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from classic_rl.acting import Forward
from classic_rl.networks import NetworkConfig
from classic_rl.normalization import ObservationNormalizer
from classic_rl.off_policy import observation_array
from classic_rl.policy import ActorCritic
from classic_rl.spaces import space_from_json, space_to_json
from rlhf.errors import ConfigError, ModelError

_FORMAT = 1
_AGENTS = {name: f"classic_rl.{name}" for name in ("dqn", "ddpg", "td3", "sac", "discrete_sac")}
_AGENTS |= dict.fromkeys(("table", "linear"), "classic_rl.tabular.policy")
"""Where each type of agent lives; the module has `load_policy(description, tensors)`."""


def save(folder: str | Path, policy: ActorCritic, *, normalizer: ObservationNormalizer | None = None) -> None:
    """Write what acting needs; `load` reads it without the environment."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in policy.state_dict().items()}
    description: dict[str, Any] = {
        "format": _FORMAT,
        "observation_space": space_to_json(policy.observation_space),
        "action_space": space_to_json(policy.action_space),
        "network": policy.network_config.model_dump(mode="json"),
        "critic": policy.critic is not None,
        "observation_clip": None,
    }
    if normalizer is not None:
        description["observation_clip"] = normalizer.clip
        description["observation_count"] = normalizer.count
        tensors["normalizer.mean"] = torch.from_numpy(normalizer.mean.copy())
        tensors["normalizer.variance"] = torch.from_numpy(normalizer.variance.copy())
    save_file(tensors, folder / "policy.safetensors")
    (folder / "policy.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


class SavableAgent(Protocol):
    """What an off-policy agent or a tabular solver tells of itself to be saved."""

    def policy_description(self) -> dict[str, Any]:
        """JSON with the key `type`, a key of `_AGENTS`, and all that its module's `load_policy` needs."""
        ...

    def policy_tensors(self) -> dict[str, torch.Tensor]:
        """The weights that acting needs."""
        ...


def save_agent(folder: str | Path, agent: SavableAgent) -> None:
    """Write what acting needs of an agent; `load` reads it without the environment."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in agent.policy_tensors().items()}
    save_file(tensors, folder / "policy.safetensors")
    description = {"format": _FORMAT, "agent": agent.policy_description()}
    (folder / "policy.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path) -> Any:
    """Read a folder that `save`, `save_agent` or AlphaZero's `BoardNetwork.save` wrote.

    Returns:
        A `TrainedPolicy`, or the agent's own kind; each has `predict(observation, deterministic=True)`.

    Raises:
        ModelError: The folder lacks a file, or a file is not what `save` writes.
    """
    folder = Path(folder)
    if (folder / "network.json").is_file():
        return importlib.import_module("classic_rl.alphazero.trained").load_player(folder)
    for name in ("policy.json", "policy.safetensors"):
        if not (folder / name).is_file():
            raise ModelError(f"no {name} in this folder", where=str(folder), remedy="Give a folder that a run saved.")
    try:
        description = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "policy.safetensors")
        if "agent" in description:
            module = importlib.import_module(_AGENTS[description["agent"]["type"]])
            return module.load_policy(description["agent"], tensors)
        policy = ActorCritic(
            space_from_json(description["observation_space"]),
            space_from_json(description["action_space"]),
            network=NetworkConfig(**description["network"]),
            critic=description["critic"],
        )
        normalizer = None
        if description["observation_clip"] is not None:
            mean, variance = tensors.pop("normalizer.mean"), tensors.pop("normalizer.variance")
            normalizer = ObservationNormalizer(len(mean), clip=description["observation_clip"])
            normalizer.load_state_dict({"mean": mean, "variance": variance, "count": description["observation_count"]})
        policy.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"not a saved policy: {error}", where=str(folder)) from error
    return TrainedPolicy(policy, normalizer)


class TrainedPolicy:
    """A policy that acts on raw observations of one environment."""

    def __init__(self, policy: ActorCritic, normalizer: ObservationNormalizer | None) -> None:
        self.policy, self.normalizer = policy, normalizer
        self._forward = Forward(policy)
        self._generator = np.random.default_rng()
        self.reset()

    def reset(self) -> None:
        """Begin an episode: a policy with a memory forgets the last one."""
        self._forward.forget(1)

    def predict(self, observation: Any, *, deterministic: bool = True, action_mask: np.ndarray | None = None) -> Any:
        """Return the action for one observation, in the form `environment.step` accepts.

        A policy with a memory remembers the observations since `reset`; call that at the start of each episode.

        Args:
            observation: As the environment returns it.
            deterministic: True takes the most probable action, False samples.
            action_mask: [A], True where an action is valid; of MultiDiscrete actions the choices' masks in a row.

        Raises:
            ConfigError: A mask for Box actions.
        """
        space, distribution = self.policy.observation_space, self.policy.distribution
        if action_mask is not None and distribution.action_dtype != torch.int64:
            raise ConfigError("Box actions cannot be masked", where="action_mask", got=str(self.policy.action_space))
        batch = gymnasium.vector.utils.concatenate(
            space, [observation], gymnasium.vector.utils.create_empty_array(space, n=1)
        )
        seen = observation_array(space, batch)
        masks = None if action_mask is None else np.asarray(action_mask, dtype=bool)[None]
        parameters = self._forward(seen if self.normalizer is None else self.normalizer(seen), masks=masks)
        if deterministic:
            actions = distribution.greedy(parameters)
        else:
            actions = distribution.sample(parameters, distribution.noise(self._generator, (1,)))
        return distribution.to_environment(actions)[0]
