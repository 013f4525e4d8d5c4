"""Prioritized replay: probabilities and weights of the paper, the tree against plain sums, ranks, exact state."""

from __future__ import annotations

import numpy as np
import pytest

from classic_rl.prioritized import PrioritizedReplayBuffer, SumTree

SHARED = {
    "num_envs": 1,
    "observation_shape": (1,),
    "observation_dtype": np.float32,
    "action_shape": (),
    "action_dtype": np.int64,
    "discount": 0.9,
}


def filled(steps, *, capacity=100, ends=(), **settings):
    replay = PrioritizedReplayBuffer(capacity, **SHARED, **settings)
    add(replay, range(steps), ends=ends)
    return replay


def add(replay, steps, *, ends=()):
    for step in steps:
        replay.add(
            observations=np.array([[step]]),
            actions=np.array([0]),
            rewards=np.ones(1),
            next_observations=np.array([[step + 1]]),
            terminated=np.array([step in ends]),
            truncated=np.zeros(1, bool),
            mask=np.array([step - 1 not in ends]),
        )


def shares(replay, *, batch=64, batches=500):
    """How often each observation is drawn."""
    drawn = np.concatenate([replay.sample(batch).observations.numpy().ravel() for _ in range(batches)]).astype(int)
    return np.bincount(drawn, minlength=12) / len(drawn)


def test_probabilities_and_weights_are_the_papers():
    """|delta| = 2, .5, 1, 0; alpha .6, beta .4, epsilon 1e-6: computed apart from any library."""
    replay = filled(4, alpha=0.6, epsilon=1e-6)
    replay.beta = 0.4
    replay.update_priorities(np.arange(4), np.array([2.0, 0.5, 1.0, 0.0]))
    expected = [0.47728241896364193, 0.20774942631423343, 0.3148890582143066, 7.909650781803953e-05]
    total = replay._tree.total
    assert replay._tree.leaves[:4] / total == pytest.approx(expected, rel=1e-6)
    # A batch with all four: the weights are relative to that of the least likely one.
    weights = (4 * np.array(expected)) ** -0.4
    assert weights / weights.max() == pytest.approx(
        [0.03074346040061427, 0.04287923123894452, 0.03630779676314222, 1.0], rel=1e-6
    )
    batch = replay.sample(64)
    places = batch.observations.numpy().astype(int).ravel()
    ratio = weights[places] / weights[places].max()
    assert batch.weights.numpy() == pytest.approx(ratio, rel=1e-5)


def test_draws_follow_the_priorities():
    """Stratified draws deviate less than independent ones: 32,000 of them, standard deviation below .0028."""
    replay = filled(4, alpha=1.0, epsilon=1e-9)
    replay.update_priorities(np.arange(4), np.array([4.0, 3.0, 2.0, 1.0]))
    assert shares(replay)[:4] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.01)


def test_alpha_zero_is_uniform_and_weighs_alike():
    replay = filled(4, alpha=0.0)
    replay.update_priorities(np.arange(4), np.array([4.0, 3.0, 2.0, 1.0]))
    assert shares(replay)[:4] == pytest.approx([0.25] * 4, abs=0.01)
    assert replay.sample(8).weights.tolist() == [1.0] * 8


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_ranks_follow_the_power_law(alpha):
    """P(rank) = rank^-alpha / sum; |delta| = 1, 9, 4, 2 has the ranks 4, 1, 2, 3, whatever the sizes."""
    replay = filled(4, alpha=alpha, rank_based=True, sort_every=1)
    replay.update_priorities(np.arange(4), np.array([1.0, 9.0, 4.0, 2.0]))
    law = np.array([4.0, 1.0, 2.0, 3.0]) ** -alpha
    assert shares(replay)[:4] == pytest.approx(law / law.sum(), abs=0.01)
    replay.beta = 1.0
    batch = replay.sample(64)
    inverse = 1 / law[batch.observations.numpy().astype(int).ravel()]
    assert batch.weights.numpy() == pytest.approx(inverse / inverse.max(), rel=1e-5)


@pytest.mark.parametrize("rank_based", [False, True])
def test_new_transitions_get_the_largest_priority(rank_based):
    replay = filled(3, alpha=1.0, rank_based=rank_based, sort_every=1)
    replay.update_priorities(np.arange(3), np.array([5.0, 1.0, 1.0]))
    add(replay, [3])
    assert replay._errors[3] == replay._errors[0] == pytest.approx(5.0, abs=1e-5)


@pytest.mark.parametrize("rank_based", [False, True])
def test_steps_that_only_reset_and_overwritten_ones_are_never_drawn(rank_based):
    replay = filled(21, capacity=8, ends=(15,), rank_based=rank_based)
    drawn = set(replay.sample(512).observations.numpy().astype(int).ravel())
    assert drawn == {13, 14, 15, 17, 18, 19, 20}
    add(replay, [21, 22])
    assert set(replay.sample(512).observations.numpy().astype(int).ravel()) <= {15, 17, 18, 19, 20, 21, 22}


@pytest.mark.parametrize("size", [1, 63, 64, 65, 5000])
def test_the_tree_finds_what_running_sums_find(size):
    generator = np.random.default_rng(size)
    numbers = generator.random(size) * (generator.random(size) < 0.7)
    numbers[-1] = 1.0
    tree = SumTree(size)
    tree.set(np.arange(size), numbers)
    assert tree.total == pytest.approx(numbers.sum())
    prefixes = generator.random(1000) * numbers.sum() * (1 - 1e-12)
    expected = np.searchsorted(numbers.cumsum(), prefixes, side="right")
    found = tree.find(prefixes)
    assert (found == expected).mean() > 0.999  # sums in another order may round a prefix over a border
    assert (numbers[found] > 0).all()


def test_the_tree_changes_leaves_and_sums():
    tree = SumTree(200)
    tree.set(np.arange(200), 1.0)
    tree.set(np.array([3, 150]), np.array([0.0, 5.0]))
    assert tree.total == 203.0
    assert tree.find(np.array([2.5, 3.5, 202.9])).tolist() == [2, 4, 199]


@pytest.mark.parametrize("rank_based", [False, True])
def test_a_restored_buffer_goes_on_exactly(rank_based):
    original = filled(30, capacity=20, rank_based=rank_based, seed=1)
    original.update_priorities(original.sample(16).indices, np.linspace(0, 3, 16))
    restored = PrioritizedReplayBuffer(20, **SHARED, rank_based=rank_based, seed=2)
    restored.load_state_dict(original.state_dict())
    for replay in (original, restored):
        add(replay, range(30, 35))
    for _ in range(3):
        one, other = original.sample(16), restored.sample(16)
        assert (one.indices == other.indices).all()
        assert (one.weights == other.weights).all()
