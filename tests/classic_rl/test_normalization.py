"""Running moments against NumPy over everything seen, in one batch, many, or split over processes."""

from __future__ import annotations

import numpy as np
import torch

from classic_rl.collector import CollectSteps
from classic_rl.normalization import ObservationNormalizer, RewardNormalizer, RunningMoments


def test_moments_equal_numpys_over_all_batches():
    rows = np.random.default_rng(0).normal(1000.0, 3.0, size=(500, 3))
    moments = RunningMoments(3)
    for batch in np.split(rows, [1, 10, 300]):
        moments.update(batch)
    np.testing.assert_allclose(moments.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance, rows.var(axis=0), rtol=1e-9)
    assert moments.count == 500


def test_two_processes_see_the_moments_of_both():
    rows = np.random.default_rng(1).normal(size=(60, 2))
    sent: list[torch.Tensor] = []
    for share in (rows[:20], rows[20:]):  # what each process would send
        RunningMoments(2).update(share, reduce=lambda sums: sent.append(sums.clone()) or sums)
    together = RunningMoments(2)
    together.update(rows[:20], reduce=lambda _: sent[0] + sent[1])
    np.testing.assert_allclose(together.mean, rows.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(together.variance, rows.var(axis=0), rtol=1e-12)


def test_observations_are_standardized_and_clipped():
    normalizer = ObservationNormalizer(1, clip=1.5)
    raw = np.array([[1.0], [3.0]], dtype=np.float32)
    assert normalizer(raw) is raw  # nothing is known yet
    normalizer.update(raw)  # mean 2, population variance 1
    np.testing.assert_allclose(normalizer(np.array([[3.0], [4.0]], np.float32)), [[1.0], [1.5]], rtol=1e-6)


def test_rewards_are_divided_by_the_deviation_of_the_running_return():
    # gamma .5; one row: rewards 1 1 | reset | 1 1. Running returns 1, 1.5 (ends), -, 1, 1.5 with the episode's restart.
    # Their mean is 1.25, their population variance .0625: every reward becomes 1 / .25 = 4.
    normalizer = RewardNormalizer(1, discount=0.5)
    rewards = np.array([[1, 1, 0, 1, 1]], dtype=np.float32)
    ends = np.array([[False, True, False, False, False]])
    mask = np.array([[True, True, False, True, True]])
    scaled = normalizer(rewards, episode_ends=ends, mask=mask)
    np.testing.assert_allclose(scaled, [[4, 4, 0, 4, 4]], rtol=1e-6)
    assert normalizer.running_returns.tolist() == [1.5]


def test_the_mean_running_return_is_stable_baselines3s():
    # Its tests/test_vec_normalize.py: rewards 1 3 4 0 and 3 4 0 1 in episodes of four, gamma .99, for 3000 steps; the
    # running returns 1, 3.99, 7.9501, 7.8706 and 3, 6.97, 6.9003, 7.8313 have the mean 5.689 (5.688 with its start).
    normalizer = RewardNormalizer(2, discount=0.99)
    rewards = np.tile(np.array([[1, 3, 4, 0, 0], [3, 4, 0, 1, 0]], dtype=np.float32), 750)
    step = np.arange(rewards.shape[1]) % 5
    ends, mask = np.tile(step == 3, (2, 1)), np.tile(step != 4, (2, 1))
    normalizer(rewards, episode_ends=ends, mask=mask)
    np.testing.assert_allclose(normalizer.mean, 5.688, atol=2e-3)


def test_collectors_normalize_with_what_earlier_rollouts_saw(make):
    # Countdown observes 0, 1, 2 (3 is the masked reset step): mean 1, population variance 2/3.
    _, collector = make("Countdown-v0", "ppo", CollectSteps(steps=8), normalize_observations=True)
    first, second = collector.collect(), collector.collect()
    scale = (2 / 3) ** 0.5
    # In the first rollout by what was seen up to steps 1, 2, 4, 8: 0; then 0 and 1, deviation .5; then as above.
    np.testing.assert_allclose(
        first.inputs["observations"][0, :, 0].numpy(),
        [0, 1, 3, *(np.array([2, -1, 0, 1, 2]) / scale)],
        rtol=1e-5,
        atol=1e-6,
    )
    np.testing.assert_allclose(
        second.inputs["observations"][0, :, 0].numpy(), np.array([-1, 0, 1, 2] * 2) / scale, rtol=1e-5, atol=1e-6
    )


def test_normalizers_are_in_the_collectors_state(make):
    settings = {"normalize_observations": True, "normalize_rewards": True}
    _, collector = make("Countdown-v0", "ppo", CollectSteps(steps=8), **settings)
    collector.collect()
    _, other = make("Countdown-v0", "ppo", CollectSteps(steps=8), **settings)
    other.load_state_dict(collector.state_dict())
    np.testing.assert_allclose(other.observation_normalizer.mean, [1.0])
    np.testing.assert_allclose(other.observation_normalizer.variance, [2 / 3])
    # Discount .99, rewards 1: running returns 1, 1.99, 2.9701, twice over two environments.
    np.testing.assert_allclose(other.reward_normalizer.mean, [(1 + 1.99 + 2.9701) / 3])
