"""Replay: transitions in preallocated rings, one row per step of all environments.

Under gymnasium's NEXT_STEP autoreset the observation after step t is always the one that step t + 1 starts from: within
an episode the next one, after its end the true final one (and step t + 1 then only resets, so it can never be drawn).
So every observation is stored once, and s_{t+n} is row t + n of the same environment: half the memory of a buffer that
keeps (s, s') pairs, and nothing to be patched at the ends of episodes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import ConfigError, TrainingError


class Transitions(NamedTuple):
    """A batch to learn from."""

    observations: Tensor
    """[B, ...] s_t, as stored (float32 vectors, uint8 images)."""
    actions: Tensor
    """[B] int64 or [B, A] float32, as the agent stored them."""
    rewards: Tensor
    """[B] float32, sum over i < k of gamma^i r_{t+i}; k = n steps, or fewer where the episode or the data end."""
    next_observations: Tensor
    """[B, ...] s_{t+k}."""
    discounts: Tensor
    """[B] float32, gamma^k, and 0 where s_{t+k} is terminal. A truncated episode keeps its bootstrap."""
    weights: Tensor | None
    """[B] float32 importance weights of prioritized replay; None where all are 1."""
    indices: np.ndarray
    """[B] where the transitions stand, for `update_priorities`."""
    next_action_masks: Tensor | None = None
    """[B, A] bool, True where an action is valid in s_{t+k}; None where every action always is."""


class ReplayBuffer:
    """Uniform replay with n-step returns.

    R = sum_{i<k} gamma^i r_{t+i}, bootstrapped with gamma^k from s_{t+k}, where k is n unless the episode ends before
    or the newest step is reached (at the ring's seam the return is shorter, and so is its discount).
    Source: Sutton 1988; the target's discount is gamma^k, not gamma (Hessel et al. 2018, section 3,
    https://arxiv.org/abs/1710.02298).

    Args:
        capacity: Steps that are kept, over all environments; steps that only reset take a place too.
        num_envs: N, environments stepped together.
        observation_shape: Of one observation.
        observation_dtype: float32 for vectors, uint8 for images.
        action_shape: Of one action; () for Discrete.
        action_dtype: int64 or float32.
        discount: gamma.
        n_step: n.
        seed: Of the draws.
        clip_rewards: Store sign(r) instead of r (Mnih et al. 2015, https://www.nature.com/articles/nature14236).
        num_actions: Given, the valid actions of every observation are stored as well.

    Raises:
        ConfigError: A capacity that holds fewer than n + 1 steps of each environment.
    """

    def __init__(
        self,
        capacity: int,
        *,
        num_envs: int,
        observation_shape: tuple[int, ...],
        observation_dtype: Any,
        action_shape: tuple[int, ...],
        action_dtype: Any,
        discount: float,
        n_step: int = 1,
        seed: int = 0,
        clip_rewards: bool = False,
        num_actions: int | None = None,
    ) -> None:
        # One row more than asked for: the newest row holds an observation whose action is not known yet.
        self._rows = capacity // num_envs + 1
        if self._rows < n_step + 2:
            raise ConfigError(
                "the replay buffer is too small",
                where="replay.capacity",
                got=capacity,
                expected=f"at least {num_envs * (n_step + 1)}: {n_step + 1} steps of each of {num_envs} environments",
            )
        self.capacity, self.num_envs, self.n_step, self.discount = capacity, num_envs, n_step, discount
        self.clip_rewards = clip_rewards
        shape = (self._rows, num_envs)
        # np.zeros maps memory lazily: a large buffer takes memory only as it fills.
        self._arrays = {
            "observations": np.zeros((*shape, *observation_shape), observation_dtype),
            "actions": np.zeros((*shape, *action_shape), action_dtype),
            "rewards": np.zeros(shape, np.float32),
            "terminated": np.zeros(shape, bool),
            "ends": np.zeros(shape, bool),
            "valid": np.zeros(shape, bool),
        }
        if num_actions is not None:
            self._arrays["action_masks"] = np.ones((*shape, num_actions), bool)
        self._bind()
        self._head, self._filled, self._count = 0, 0, 0
        self._continues = False
        self._generator = np.random.default_rng(seed)

    def _bind(self) -> None:
        """Name the arrays, and their views with row and environment merged into one axis."""
        self._observations, self._actions = self._arrays["observations"], self._arrays["actions"]
        self._rewards, self._valid = self._arrays["rewards"], self._arrays["valid"]
        self._terminated, self._ends = self._arrays["terminated"], self._arrays["ends"]
        self._masks = self._arrays.get("action_masks")
        self._flat = {name: array.reshape(-1, *array.shape[2:]) for name, array in self._arrays.items()}

    def __len__(self) -> int:
        """How many transitions can be drawn."""
        return self._count

    # --- storing --------------------------------------------------------------------------------------------------

    def add(
        self,
        *,
        observations: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray,
        next_observations: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        mask: np.ndarray,
        action_masks: np.ndarray | None = None,
        next_action_masks: np.ndarray | None = None,
    ) -> None:
        """Store one step of every environment.

        Args:
            observations: [N, ...], what the last call's `next_observations` were.
            actions: [N, ...].
            rewards: [N].
            next_observations: [N, ...], the final observation where the episode ended.
            terminated: [N] bool.
            truncated: [N] bool.
            mask: [N] bool, False on the reset steps of NEXT_STEP autoreset: they are never drawn.
            action_masks: [N, A] bool, valid actions of `observations`; with `num_actions`.
            next_action_masks: [N, A] bool, those of `next_observations`.

        Raises:
            TrainingError: The observations do not continue those of the last call.
        """
        head = self._head
        if not self._continues:
            self._observations[head] = observations
            self._filled, self._continues = max(1, self._filled), True
        elif observations.shape != self._observations[head].shape or (observations != self._observations[head]).any():
            raise TrainingError(
                "the observations do not continue the steps stored before",
                where="ReplayBuffer.add",
                expected="the next_observations of the last call (NEXT_STEP autoreset)",
                remedy="Call cut() where the environments were reset by hand.",
            )
        self._actions[head] = actions
        self._rewards[head] = np.sign(rewards) if self.clip_rewards else rewards
        self._terminated[head] = terminated
        np.logical_or(terminated, truncated, out=self._ends[head])
        self._valid[head] = mask
        self._count += int(np.count_nonzero(mask))
        if self._masks is not None and action_masks is not None:
            self._masks[head] = action_masks
        self._advance()
        self._observations[self._head] = next_observations
        if self._masks is not None and next_action_masks is not None:
            self._masks[self._head] = next_action_masks

    def _advance(self) -> None:
        """Let the newest row become the next one, over the oldest where the ring is full."""
        self._head += 1
        if self._head == self._rows:
            self._head = 0
        if self._filled < self._rows:
            self._filled += 1
        else:
            self._count -= int(np.count_nonzero(self._valid[self._head]))
        self._valid[self._head] = False

    def starts(self) -> np.ndarray:
        """[N] bool, True where the next step begins an episode: the newest one only reset, or nothing is stored."""
        return ~self._valid[self._head - 1]

    def cut(self) -> None:
        """End every running episode as truncated: the environments were reset, and the next step starts elsewhere."""
        if not self._continues:
            return
        # The newest observation stays as s' of the last step; its own row is none that can be drawn.
        self._ends[self._head - 1] = True
        self._advance()
        self._continues = False

    # --- drawing --------------------------------------------------------------------------------------------------

    def sample(self, batch_size: int) -> Transitions:
        """Draw transitions uniformly, with replacement.

        Raises:
            TrainingError: Nothing is stored.
        """
        return self._gather(self._draw(batch_size), None)

    def _draw(self, batch_size: int) -> np.ndarray:
        """[B] flat places of valid steps, by rejection: at least half of the places are valid, as a rule nearly all."""
        if self._count == 0:
            raise TrainingError("nothing can be drawn from an empty replay buffer", where="ReplayBuffer.sample")
        valid, places = self._flat["valid"], self._filled * self.num_envs
        drawn = self._generator.integers(places, size=batch_size)
        rejected = np.flatnonzero(~valid[drawn])
        while len(rejected):
            drawn[rejected] = self._generator.integers(places, size=len(rejected))
            rejected = rejected[~valid[drawn[rejected]]]
        return drawn

    def _gather(self, indices: np.ndarray, weights: np.ndarray | None) -> Transitions:
        rewards, discounts, following = self._returns(indices)
        flat, masks = self._flat, self._flat.get("action_masks")
        return Transitions(
            observations=torch.from_numpy(flat["observations"].take(indices, axis=0)),
            actions=torch.from_numpy(flat["actions"].take(indices, axis=0)),
            rewards=torch.from_numpy(rewards),
            next_observations=torch.from_numpy(flat["observations"].take(following, axis=0)),
            discounts=torch.from_numpy(discounts),
            weights=None if weights is None else torch.from_numpy(weights.astype(np.float32)),
            indices=indices,
            next_action_masks=None if masks is None else torch.from_numpy(masks.take(following, axis=0)),
        )

    def _returns(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """R [B], gamma^k or 0 [B], and the place of s_{t+k} [B]."""
        flat, places = self._flat, self._rows * self.num_envs
        rewards = flat["rewards"].take(indices)
        terminated = flat["terminated"].take(indices)
        following = indices + self.num_envs
        following[following >= places] -= places
        if self.n_step == 1:
            return rewards, np.where(terminated, 0.0, self.discount).astype(np.float32), following
        sums, discounts = rewards.astype(np.float64), np.full(len(indices), self.discount)
        running = ~flat["ends"].take(indices)
        newest = self._head * self.num_envs
        for _ in range(self.n_step - 1):
            # s_{t+k} may be the newest observation, whose step is not made yet.
            running &= (following < newest) | (following >= newest + self.num_envs)
            if not running.any():
                break
            here = following[running]
            sums[running] += discounts[running] * flat["rewards"].take(here)
            discounts[running] *= self.discount
            terminated[running] = flat["terminated"].take(here)
            ended = flat["ends"].take(here)
            here = here + self.num_envs
            here[here >= places] -= places
            following[running] = here
            running[running] = ~ended
        return sums.astype(np.float32), np.where(terminated, 0.0, discounts).astype(np.float32), following

    # --- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything stored, and the generator."""
        return {
            "arrays": {name: array[: self._filled].copy() for name, array in self._arrays.items()},
            "head": self._head,
            "filled": self._filled,
            "count": self._count,
            "continues": self._continues,
            "generator": self._generator.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s content.

        Raises:
            ConfigError: It was saved by a buffer of other sizes.
        """
        for name, array in self._arrays.items():
            theirs = state["arrays"].get(name)
            if theirs is None or theirs.shape[1:] != array.shape[1:] or len(theirs) > len(array):
                raise ConfigError(
                    f"the saved replay buffer's {name} have another form",
                    where="resume",
                    got="none" if theirs is None else str(theirs.shape),
                    expected=f"up to {array.shape}",
                    remedy="Resume with the config that the run was started with.",
                )
            array[: len(theirs)] = theirs
        self._head, self._filled, self._count = state["head"], state["filled"], state["count"]
        self._continues = state["continues"]
        self._generator.bit_generator.state = state["generator"]


class NewestStep(ReplayBuffer):
    """No replay: a "batch" is what has just happened, one transition of each environment that did not only reset."""

    def __init__(self, **shared: Any) -> None:
        super().__init__(2 * shared["num_envs"], **shared)

    def sample(self, batch_size: int) -> Transitions:
        """Return the newest transitions, whatever the batch size.

        Raises:
            TrainingError: Every environment has just been reset.
        """
        row = self._head - 1 if self._head else self._rows - 1
        places = row * self.num_envs + np.flatnonzero(self._valid[row])
        if len(places) == 0:
            raise TrainingError("nothing has happened since the reset", where="NewestStep.sample")
        return self._gather(places, None)
