"""Which rows go where: permutations, shards, microbatches."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_worlds import make_experience

from rlhf.errors import TrainingError
from rlhf.training.batching import (
    MicrobatchLimits,
    Shard,
    cut_microbatches,
    local_minibatches,
    masked_filler,
    split_rows,
)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 9), st.integers(0, 5))
def test_two_processes_share_each_minibatch_of_one(first, second, minibatches, seed):
    permutation = torch.randperm(first + second, generator=torch.Generator().manual_seed(seed))
    total = first + second
    whole = local_minibatches(permutation, Shard(0, total, total), minibatches=minibatches)
    assert sorted(torch.cat(whole).tolist()) == list(range(total))
    sizes = [len(part) for part in whole]
    assert max(sizes) - min(sizes) <= 1
    own = local_minibatches(permutation, Shard(0, first, total), minibatches=minibatches)
    other = local_minibatches(permutation, Shard(first, second, total), minibatches=minibatches)
    for all_rows, mine, theirs in zip(whole, own, other, strict=True):
        assert sorted(all_rows.tolist()) == sorted(mine.tolist() + (theirs + first).tolist())


def test_microbatches_by_rows():
    assert cut_microbatches([9, 9, 9, 9, 9, 9, 9], MicrobatchLimits(rows=3)) == (3, 3, 1)
    assert cut_microbatches([9, 9], MicrobatchLimits(rows=3)) == (2,)
    assert cut_microbatches([], MicrobatchLimits(rows=3)) == ()
    assert cut_microbatches([1, 1, 1], MicrobatchLimits()) == (3,)


def test_microbatches_by_tokens():
    # 6: 6 x 1 <= 12, 6 x 2 <= 12, 6 x 3 > 12; then 4 x 3 <= 12, 4 x 4 > 12; then 1.
    assert cut_microbatches([6, 5, 4, 3, 3, 1], MicrobatchLimits(tokens=12)) == (2, 3, 1)
    # The same, never more than 2 rows.
    assert cut_microbatches([6, 5, 4, 3, 3, 1], MicrobatchLimits(tokens=12, rows=2)) == (2, 2, 2)


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(20, 60), st.none() | st.integers(1, 7))
def test_microbatches_stay_within_their_limits(lengths, tokens, rows):
    lengths = sorted(lengths, reverse=True)
    sizes = cut_microbatches(lengths, MicrobatchLimits(tokens=tokens, rows=rows))
    assert sum(sizes) == len(lengths)
    start = 0
    for size in sizes:
        assert 0 < size <= (rows or len(lengths))
        assert size * max(lengths[start : start + size]) <= tokens
        start += size


def test_a_row_beyond_the_budget_is_refused():
    with pytest.raises(TrainingError, match=r"microbatch_tokens: a row of 9 tokens .* Raise it to at least 9"):
        cut_microbatches([9, 1], MicrobatchLimits(tokens=8))


@pytest.mark.parametrize("sizes", [[1, 2, 1], [4], [3, 0, 1]])
def test_rows_are_cut_as_indices_would(sizes):
    experience = make_experience()
    experience = replace(experience, inputs={"seen": torch.arange(len(experience))}, on_policy=True)
    sizes = [*sizes, len(experience) - sum(sizes)]
    parts, start = split_rows(experience, sizes), 0
    assert len(parts) == len(sizes)
    for part, size in zip(parts, sizes, strict=True):
        expected = experience.select(torch.arange(start, start + size))
        start += size
        for item in fields(experience):
            own, other = getattr(part, item.name), getattr(expected, item.name)
            if isinstance(other, dict):
                own, other = own["seen"], other["seen"]
            assert torch.equal(own, other) if isinstance(other, torch.Tensor) else own == other, item.name


def test_a_filler_has_no_action():
    filler = masked_filler(make_experience(), row=2)
    assert len(filler) == 1
    assert not filler.action_mask.any()
