"""FrozenLake in words: what is said is what gymnasium does."""

import doctest

import gymnasium
import pytest

import classic_rl.frozen_lake_words
from classic_rl.frozen_lake_words import WORDS, FrozenLakeInWords


def test_the_way_round_the_holes_reaches_the_goal():
    """The 4x4 map is SFFF FHFH FFFH HFFG: down, down, right, right, down, right."""
    lake = FrozenLakeInWords()
    (first,) = lake.reset(seed=0)
    assert first["content"] == "SFFF\nFHFH\nFFFH\nHFFG\nrow 1 column 1"
    steps = [lake.step(word) for word in ("down", "down", "right", "right", "down", "right")]
    assert [step[1] for step in steps] == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert [step[2] for step in steps] == [False] * 5 + [True]
    assert steps[3][0][0]["content"] == "row 3 column 3"
    assert steps[5][0][0]["content"] == "you are there"


def test_a_hole_ends_the_episode_without_reward():
    lake = FrozenLakeInWords()
    lake.reset(seed=0)
    lake.step("right")
    (answer,), reward, terminated, truncated = lake.step("down")
    assert (answer["content"], reward, terminated, truncated) == ("you fell", 0.0, True, False)


def test_the_turn_limit_truncates_and_unknown_words_count():
    lake = FrozenLakeInWords(max_turns=3)
    lake.reset(seed=0)
    assert lake.step("jump") == (
        [{"role": "user", "content": "say left, down, right or up"}],
        -0.1,
        False,
        False,
    )
    assert lake.step("left")[2:] == (False, False)
    assert lake.step(" LEFT ")[2:] == (False, True)


@pytest.mark.parametrize("seed", range(3))
def test_slippery_ice_is_gymnasiums(seed):
    lake = FrozenLakeInWords(is_slippery=True, max_turns=200)
    theirs = gymnasium.make("FrozenLake-v1", map_name="4x4", is_slippery=True, max_episode_steps=-1)
    lake.reset(seed=seed)
    theirs.reset(seed=seed)
    over, turn = False, 0
    while not over and turn < 150:
        action = (turn * 7 + seed) % 4
        place, reward, over, _, _ = theirs.step(action)
        (answer,), ours, terminated, _ = lake.step(WORDS[action])
        assert (ours, terminated) == (float(reward), over)
        if not over:
            assert answer["content"] == f"row {place // 4 + 1} column {place % 4 + 1}"
        turn += 1


def test_every_character_is_in_the_alphabet():
    lake = FrozenLakeInWords()
    said = [message["content"] for message in lake.reset(seed=1)]
    for word in (*WORDS, "nonsense"):
        lake.reset(seed=1)
        said += [word if word in WORDS else "", *(message["content"] for message in lake.step(word)[0])]
    assert set("".join(said)) <= set(lake.alphabet)
    assert lake.demonstrate() in WORDS


@pytest.mark.parametrize(("map_name", "steps"), [("4x4", 6), ("8x8", 14)])
def test_a_walker_who_heeds_takes_a_shortest_way(map_name, steps):
    """Right and down alone reach the opposite corner in 2 (n - 1) steps, and both maps have such a way."""
    lake = FrozenLakeInWords(map_name=map_name, max_turns=100, heeding=1.0)
    lake.reset(seed=0)
    answers = [lake.step(lake.demonstrate()) for _ in range(steps)]
    assert [reward for _, reward, _, _ in answers] == [0.0] * (steps - 1) + [1.0]
    assert answers[-1][2]


def test_a_walker_who_does_not_heed_says_any_word():
    lake = FrozenLakeInWords(heeding=0.0)
    lake.reset(seed=0)
    said = [lake.demonstrate() for _ in range(400)]
    assert all(60 < said.count(word) < 140 for word in WORDS)  # 100 +- 4.6 standard deviations of 8.7
    with pytest.raises(ValueError, match="heeding"):
        FrozenLakeInWords(heeding=1.5)


def test_doctests():
    assert doctest.testmod(classic_rl.frozen_lake_words).failed == 0
