"""Padding, and masks that come from lengths and not from the pad id."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.collation import left_pad, right_pad

SEQUENCES = st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=5)


def test_left_and_right():
    ids, mask = left_pad([[1, 2, 3], [4]], 0)
    assert ids.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[True, True, True], [False, False, True]]
    ids, mask = right_pad([[1, 2, 3], [4]], 0)
    assert ids.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.bool)


def test_a_real_token_that_equals_the_pad_id_is_not_masked():
    assert right_pad([[5, 0], [0]], 0)[1].tolist() == [[True, True], [True, False]]


def test_nothing_to_pad():
    assert left_pad([], 0)[0].shape == (0, 0)
    assert left_pad([[], []], 0)[1].shape == (2, 0)


@given(SEQUENCES, st.booleans())
def test_the_mask_selects_exactly_the_sequences(sequences, left):
    ids, mask = (left_pad if left else right_pad)(sequences, 0)
    assert [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)] == sequences
