"""Length and end-token shaping against the papers' formulas and TRL's implementation."""

import pytest
import torch

from rlhf.errors import RewardError
from rlhf.rewards.shaping import LengthPenalty, SoftOverlong, length_penalty, missing_end_penalty, soft_overlong


def test_soft_overlong_is_equation_13():
    # DAPO: L_max 20480, cache 4096. 0 up to 16384; (16384 - |y|) / 4096 up to 20480; -1 beyond.
    lengths = torch.tensor([1, 16384, 17408, 18432, 20480, 20481, 30000])
    assert soft_overlong(lengths, limit=20480, buffer=4096).tolist() == [0, 0, -0.25, -0.5, -1, -1, -1]


def test_soft_overlong_equals_trl():
    trl = pytest.importorskip("trl.rewards")
    ids = [[1] * length for length in range(1, 130)]
    theirs = trl.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)(completion_ids=ids)
    assert SoftOverlong(limit=100, buffer=20)(completion_ids=ids) == pytest.approx(theirs)


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_soft_overlong_refuses_a_buffer_outside_the_limit(buffer):
    with pytest.raises(RewardError, match="expected 1 to 100"):
        soft_overlong(torch.tensor([1]), limit=100, buffer=buffer)
    with pytest.raises(RewardError, match="expected 1 to 100"):
        SoftOverlong(limit=100, buffer=buffer)


def test_missing_end_penalty_replaces_the_score():
    scores, ended = torch.tensor([5.0, -3.0, 2.0]), torch.tensor([False, False, True])
    assert missing_end_penalty(scores, ended).tolist() == [-1, -1, 2]
    assert missing_end_penalty(scores, ended, score=-10.0).tolist() == [-10, -10, 2]


def test_length_penalty():
    assert length_penalty(torch.tensor([10, 200]), per_token=0.25).tolist() == [-2.5, -50]
    assert LengthPenalty(per_token=0.25)(completion_ids=[[1] * 10, []]) == [-2.5, 0]
    with pytest.raises(RewardError, match="cannot be negative"):
        LengthPenalty(per_token=-1)
