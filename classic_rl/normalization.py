"""Running normalization of observations and rewards, with state that travels in checkpoints.

Statistics change once per rollout, after it: within a rollout every observation is normalized alike, so the
recorded log-probs are those of the very inputs the learner sees, and several processes can merge their moments with one
reduction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlhf.core.masking import Reduce, identity


class RunningMoments:
    """Mean and population variance of everything seen, merged batch by batch.

    Chan, Golub and LeVeque 1979: with batch mean m, variance v, count n and running M, V, N,
    M' = M + (m - M) n / (N + n) and V' = (V N + v n + (m - M)^2 N n / (N + n)) / (N + n), all in float64.

    Args:
        size: Length of the vectors.
    """

    def __init__(self, size: int) -> None:
        self.mean, self.variance, self.count = np.zeros(size), np.ones(size), 0.0

    def update(self, batch: np.ndarray, *, reduce: Reduce = identity) -> None:
        """Merge rows [N, size], of all processes when `reduce` sums over them."""
        batch = np.asarray(batch, dtype=np.float64)
        # Shifted sums: one reduction, and no cancellation because M is near the batch mean.
        shifted = batch - self.mean
        sums = torch.from_numpy(np.concatenate([[len(batch)], shifted.sum(axis=0), (shifted**2).sum(axis=0)]))
        count, total, squares = np.split(reduce(sums).numpy(), [1, 1 + batch.shape[1]])
        if count[0] == 0:
            return
        offset = total / count
        variance = np.maximum(squares / count - offset**2, 0)
        all_count = self.count + count[0]
        between = offset**2 * self.count * count[0] / all_count
        self.variance = (self.variance * self.count + variance * count[0] + between) / all_count
        self.mean = self.mean + offset * count[0] / all_count
        self.count = float(all_count)

    def state_dict(self) -> dict[str, Any]:
        """The moments as tensors."""
        return {
            "mean": torch.from_numpy(self.mean.copy()),
            "variance": torch.from_numpy(self.variance.copy()),
            "count": self.count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s moments."""
        self.mean, self.variance = state["mean"].numpy().copy(), state["variance"].numpy().copy()
        self.count = float(state["count"])


class ObservationNormalizer(RunningMoments):
    """(observation - mean) / std, clipped; the identity until the first update (see `FirstStatistics`).

    Args:
        size: Length of an observation.
        clip: Bound of a normalized component.
    """

    def __init__(self, size: int, *, clip: float = 10.0) -> None:
        super().__init__(size)
        self.clip = clip

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Normalize [..., size] float32."""
        if self.count == 0:
            return observations
        scaled = (observations - self.mean) / np.sqrt(self.variance + 1e-8)
        return np.clip(scaled, -self.clip, self.clip).astype(np.float32)


class FirstStatistics:
    """An observation normalizer's statistics during its first rollout, renewed after 1, 2, 4, 8, ... steps.

    Later rollouts are seen with the statistics of those before. Were the first one seen raw, its update would teach
    both networks a world that is gone with the second: TRPO on LunarLanderContinuous returned 148, 167 and 176 on three
    seeds, where it returns 186, 252 and 199.

    Args:
        normalizer: Without statistics yet.
        reduce: Sums over processes, all of which take equally many steps.
    """

    def __init__(self, normalizer: ObservationNormalizer, *, reduce: Reduce = identity) -> None:
        self._normalizer, self._reduce = normalizer, reduce
        self._steps, self._waiting = 0, list[np.ndarray]()

    def add(self, observations: np.ndarray) -> None:
        """Take in one step's observations [n, size]."""
        self._waiting.append(observations.copy())
        self._steps += 1
        if self._steps & (self._steps - 1) == 0:
            self.finish()

    def finish(self) -> None:
        """Renew the statistics by everything that was taken in."""
        if self._waiting:
            self._normalizer.update(np.concatenate(self._waiting), reduce=self._reduce)
            self._waiting = []


class RewardNormalizer(RunningMoments):
    """reward / std of the running discounted return (Engstrom et al. 2020, 'reward scaling'); the mean stays.

    Args:
        num_envs: Environments of this process.
        discount: Of the running return R <- discount x R + r, which restarts with each episode.
        clip: Bound of a normalized reward.
    """

    def __init__(self, num_envs: int, *, discount: float, clip: float = 10.0) -> None:
        super().__init__(1)
        self.discount, self.clip = discount, clip
        self.running_returns = np.zeros(num_envs)

    def __call__(
        self, rewards: np.ndarray, *, episode_ends: np.ndarray, mask: np.ndarray, reduce: Reduce = identity
    ) -> np.ndarray:
        """Take a rollout's rewards into the statistics, then scale them.

        Args:
            rewards: [N, T] float32, raw.
            episode_ends: [N, T] bool, True where the episode ended.
            mask: [N, T] bool, False on reset steps and padding.
            reduce: Sums over processes.

        Returns:
            [N, T] float32.
        """
        returns = np.zeros(rewards.shape)
        for step in range(rewards.shape[1]):
            real = mask[:, step]
            self.running_returns[real] = self.running_returns[real] * self.discount + rewards[real, step]
            returns[:, step] = self.running_returns
            self.running_returns[episode_ends[:, step]] = 0
        self.update(returns[mask][:, None], reduce=reduce)
        return np.clip(rewards / np.sqrt(self.variance + 1e-8), -self.clip, self.clip).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """The moments and the returns of the running episodes."""
        return {**super().state_dict(), "running_returns": torch.from_numpy(self.running_returns.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s content."""
        super().load_state_dict(state)
        self.running_returns = state["running_returns"].numpy().copy()
