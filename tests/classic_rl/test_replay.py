"""Replay: n-step returns across ends and the ring's seam, reset steps never drawn, exact state."""

from __future__ import annotations

import numpy as np
import pytest

from classic_rl.replay import NewestStep, ReplayBuffer
from rlhf.errors import ConfigError, TrainingError


def buffer(capacity=20, *, num_envs=1, n_step=1, discount=0.9, **settings):
    return ReplayBuffer(
        capacity,
        num_envs=num_envs,
        observation_shape=(1,),
        observation_dtype=np.float32,
        action_shape=(),
        action_dtype=np.int64,
        discount=discount,
        n_step=n_step,
        **settings,
    )


def play(replay, steps, *, ends=(), truncations=(), first=0, reward=1.0):
    """One environment whose observation counts all its steps; after an end comes a step that only resets."""
    ended = False
    for step in range(first, first + steps):
        over = step in ends or step in truncations
        replay.add(
            observations=np.array([[step]]),
            actions=np.array([step % 3]),
            rewards=np.array([0.0 if ended else reward]),
            next_observations=np.array([[step + 1]]),
            terminated=np.array([step in ends]),
            truncated=np.array([step in truncations]),
            mask=np.array([not ended]),
        )
        ended = over
    return replay


def everything(replay, draws=400):
    """All transitions that can be drawn, by their observation: (reward, next observation, discount, action)."""
    batch = replay.sample(draws)
    columns = zip(
        batch.observations, batch.rewards, batch.next_observations, batch.discounts, batch.actions, strict=True
    )
    return {
        int(seen.item()): (round(r.item(), 5), int(new.item()), round(d.item(), 5), int(a.item()))
        for seen, r, new, d, a in columns
    }


def test_one_step_transitions_are_what_happened():
    found = everything(play(buffer(), 4))
    assert found == {step: (1.0, step + 1, 0.9, step % 3) for step in range(4)}


@pytest.mark.parametrize(("n_step", "reward", "discount"), [(2, 1.9, 0.81), (3, 2.71, 0.729), (5, 4.0951, 0.59049)])
def test_n_rewards_are_summed_and_bootstrapped_with_gamma_to_the_n(n_step, reward, discount):
    """1 + .9 + .81 + ... of n terms, then .9^n: not .9, as the n-step target is at times printed."""
    found = everything(play(buffer(n_step=n_step), 12))
    assert found[0][:3] == (reward, n_step, discount)


def test_at_the_newest_step_the_return_is_shorter_and_so_is_its_discount():
    """Stable-Baselines3's test_n_step_replay has the same seam: two steps are left of three, so gamma^2."""
    found = everything(play(buffer(n_step=3), 6))
    assert found[4][:3] == (1.9, 6, 0.81)
    assert found[5][:3] == (1.0, 6, 0.9)


def test_termination_ends_the_sum_and_the_bootstrap():
    # The episode ends with step 2; step 3 only resets; step 4 is the next episode's first.
    found = everything(play(buffer(n_step=3), 9, ends=(2,)))
    assert found[0][:3] == (2.71, 3, 0.0)
    assert found[1][:3] == (1.9, 3, 0.0)
    assert found[2][:3] == (1.0, 3, 0.0)
    assert found[4][:3] == (2.71, 7, 0.729)


def test_truncation_ends_the_sum_and_keeps_the_bootstrap_of_the_true_final_observation():
    found = everything(play(buffer(n_step=3), 9, truncations=(2,)))
    assert found[1][:3] == (1.9, 3, 0.81)
    assert found[2][:3] == (1.0, 3, 0.9)


@pytest.mark.parametrize("n_step", [1, 3])
def test_steps_that_only_reset_are_never_drawn(n_step):
    replay = play(buffer(n_step=n_step), 12, ends=(2, 7))
    assert set(everything(replay)) == set(range(12)) - {3, 8}
    assert len(replay) == 10


@pytest.mark.parametrize("n_step", [1, 3])
@pytest.mark.parametrize("steps", [8, 11, 16, 23, 24, 25])
def test_the_ring_forgets_the_oldest(n_step, steps):
    replay = play(buffer(8, n_step=n_step), steps)
    assert set(everything(replay)) == set(range(steps - 8, steps))
    assert len(replay) == 8


@pytest.mark.parametrize("steps", range(9, 30))
def test_no_return_runs_over_the_seam_into_old_steps(steps):
    """Reward k at step k: three rewards from step s give s + .9 (s + 1) + .81 (s + 2), less where the data end."""
    replay = buffer(8, n_step=3)
    for step in range(steps):
        play(replay, 1, first=step, reward=float(step))
    for seen, (reward, new, discount, _) in everything(replay).items():
        count = min(3, steps - seen)
        assert reward == pytest.approx(sum(0.9**k * (seen + k) for k in range(count)), abs=1e-4)
        assert (new, discount) == (seen + count, round(0.9**count, 5))


def test_every_transition_is_as_likely():
    """20,000 draws of 10: each count has mean 2,000 and standard deviation sqrt(20000 x .1 x .9) = 42; 5 of them."""
    replay = play(buffer(), 12, ends=(2, 7))
    counts = np.bincount(replay.sample(20_000).observations.numpy().astype(int).ravel(), minlength=12)
    assert np.abs(counts[counts > 0] - 2000).max() < 5 * 42


def test_environments_do_not_mix():
    replay = buffer(40, num_envs=2, n_step=3)
    for step in range(10):
        replay.add(
            observations=np.array([[step], [100 + step]]),
            actions=np.zeros(2),
            rewards=np.array([1.0, 10.0]),
            next_observations=np.array([[step + 1], [101 + step]]),
            terminated=np.array([False, step == 4]),
            truncated=np.zeros(2, bool),
            mask=np.array([True, step != 5]),
        )
    found = everything(replay)
    assert found[3][:3] == (2.71, 6, 0.729)
    assert found[103][:3] == (19.0, 105, 0.0)
    assert 105 not in found
    assert len(replay) == 19


def test_rewards_can_be_clipped_to_their_sign():
    replay = buffer(clip_rewards=True)
    for step, reward in enumerate((7.5, -0.2, 0.0)):
        play(replay, 1, first=step, reward=reward)
    assert [everything(replay)[step][0] for step in range(3)] == [1.0, -1.0, 0.0]


def test_a_cut_ends_the_episode_without_losing_the_bootstrap():
    replay = play(buffer(n_step=3), 3)
    replay.cut()
    play(replay, 3, first=50)
    found = everything(replay)
    assert set(found) == {0, 1, 2, 50, 51, 52}
    assert found[1][:3] == (1.9, 3, 0.81)


def test_observations_that_do_not_continue_are_refused():
    replay = play(buffer(), 3)
    with pytest.raises(TrainingError, match="do not continue"):
        play(replay, 1, first=7)


def test_observations_of_another_shape_are_refused_even_where_they_are_equal():
    replay = play(buffer(), 3)
    newest = replay._observations[replay._head]
    step = {"actions": np.zeros(1, int), "rewards": np.zeros(1), "terminated": np.zeros(1, bool)}
    with pytest.raises(TrainingError, match="do not continue"):
        replay.add(
            observations=newest[0], next_observations=newest, truncated=np.zeros(1, bool), mask=np.ones(1, bool), **step
        )


def test_action_masks_belong_to_the_next_observation():
    replay = buffer(num_actions=2)
    for step in range(4):
        replay.add(
            observations=np.array([[step]]),
            actions=np.array([0]),
            rewards=np.ones(1),
            next_observations=np.array([[step + 1]]),
            terminated=np.zeros(1, bool),
            truncated=np.zeros(1, bool),
            mask=np.ones(1, bool),
            action_masks=np.array([[step % 2 == 0, True]]),
            next_action_masks=np.array([[(step + 1) % 2 == 0, True]]),
        )
    batch = replay.sample(50)
    expected = batch.next_observations.ravel() % 2 == 0
    assert (batch.next_action_masks[:, 0] == expected).all()
    assert batch.next_action_masks[:, 1].all()


@pytest.mark.parametrize("steps", [5, 30])
def test_a_restored_buffer_goes_on_exactly(steps):
    original = play(buffer(8, n_step=3, seed=1), steps, ends=(2, 25))
    restored = buffer(8, n_step=3, seed=2)
    restored.load_state_dict(original.state_dict())
    for replay in (original, restored):
        play(replay, 3, first=steps)
    one, other = original.sample(64), restored.sample(64)
    assert (one.indices == other.indices).all()
    assert (one.rewards == other.rewards).all()
    assert (one.next_observations == other.next_observations).all()


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match="too small"):
        buffer(3, n_step=3)
    with pytest.raises(TrainingError, match="empty"):
        buffer().sample(1)
    with pytest.raises(ConfigError, match="another form"):
        buffer(8).load_state_dict(play(buffer(20), 15).state_dict())


def test_without_replay_only_the_newest_step_is_known():
    shared = {"observation_shape": (1,), "observation_dtype": np.float32, "action_shape": (), "action_dtype": np.int64}
    replay = NewestStep(num_envs=1, discount=0.9, **shared)
    for step in range(5):
        play(replay, 1, first=step)
        batch = replay.sample(32)
        assert batch.observations.flatten().tolist() == [step]
        assert batch.next_observations.flatten().tolist() == [step + 1]
