"""Acting in running environments: one forward per step, with masks of valid actions and the memory carried along."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from classic_rl.distributions import MASKED, MultiCategorical
from classic_rl.encoders import NumpyMemory
from classic_rl.networks import NumpyMirror
from classic_rl.off_policy import action_masks_of
from classic_rl.policy import ActorCritic
from rlhf.errors import ConfigError


class Forward:
    """The actor's outputs for one step of N environments: NumPy for layers and memory, torch for convolutions.

    Args:
        policy: Only read.

    Attributes:
        mirror: Of the actor's layers.
        memory: [N, K] what is remembered of each environment's episode; None without a memory.
    """

    def __init__(self, policy: ActorCritic) -> None:
        self.policy, self.mirror = policy, NumpyMirror(policy.actor)
        self.memory: np.ndarray | None = None
        encoder = policy.encoder
        self._cell = None if encoder is None or encoder.memory is None else NumpyMemory(encoder.memory)

    def refresh(self) -> None:
        """Fetch the views of the parameters again, after an update."""
        self.mirror.refresh()
        if self._cell is not None:
            self._cell.refresh()

    def forget(self, num_envs: int) -> None:
        """Begin episodes in all environments."""
        encoder = self.policy.encoder
        self.memory = None if self._cell is None else np.zeros((num_envs, encoder.state_size), dtype=np.float32)

    def __call__(
        self, observations: np.ndarray, *, starts: np.ndarray | None = None, masks: np.ndarray | None = None
    ) -> np.ndarray:
        """Return parameters [N, K] of the distribution, and remember the observations.

        Args:
            observations: [N, ...] as the policy sees them.
            starts: [N] bool, True where an episode begins with this observation; None is nowhere.
            masks: [N, A] bool, True where an action is valid.
        """
        if self.policy.encoder is None:
            outputs = self.mirror(observations)
        else:
            outputs = self.mirror(self._encode(observations, starts))
        return outputs if masks is None else np.where(masks, outputs, np.float32(MASKED))

    def _encode(self, x: np.ndarray, starts: np.ndarray | None) -> np.ndarray:
        body = self.policy.encoder.convolutions
        if body is not None:
            with torch.inference_mode():
                x = body(torch.from_numpy(x).to(next(body.parameters()).device)).cpu().numpy()
        if self._cell is None:
            return x
        memory = self.memory
        if starts is not None and starts.any():
            memory = np.where(starts[:, None], np.float32(0), memory)
        self.memory = self._cell(x, memory)
        return self.memory[:, : self._cell.size]


def valid_actions(
    environments: VectorEnv, infos: dict[str, Any], policy: ActorCritic, *, ended: np.ndarray | None = None
) -> np.ndarray | None:
    """Return the valid actions [N, A] bool, None where the environment tells none.

    As `classic_rl.off_policy.action_masks_of`. A MultiDiscrete space's mask is the concatenation of its choices' masks.
    Where an episode has ended, everything is valid: the action of that step is ignored.

    Raises:
        ConfigError: An observation without a valid action, a mask of another size, or actions that cannot be masked.
    """
    masks = action_masks_of(environments, infos, ended=ended)
    if masks is None:
        return None
    distribution = policy.distribution
    if distribution.action_dtype != torch.int64:
        raise ConfigError("Box actions cannot be masked", where="action_mask", got=str(policy.action_space))
    if masks.shape[1:] != (distribution.num_outputs,):
        raise ConfigError(
            "a mask of another size than the action space",
            where="action_mask",
            got=masks.shape[1:],
            expected=f"[{distribution.num_outputs}], one entry for each value of each choice",
        )
    if isinstance(distribution, MultiCategorical):
        bounds = np.cumsum([0, *distribution.sizes[:-1]])
        if not np.logical_or.reduceat(masks, bounds, axis=1).all():
            raise ConfigError("a choice without any valid value", where="action_mask", got=str(masks.astype(int)))
    return masks
