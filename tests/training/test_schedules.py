"""Schedules by arithmetic."""

import math

import pytest

from rlhf.training.schedules import clip_scale, learning_rate
from rlhf.training.update_config import UpdateConfig


@pytest.mark.parametrize(
    ("schedule", "progress", "expected"),
    [
        ("constant", 0.0, 2.0),
        ("constant", 0.9, 2.0),
        ("linear", 0.0, 2.0),
        ("linear", 0.25, 1.5),
        ("linear", 1.0, 0.0),
        ("cosine", 0.0, 2.0),
        ("cosine", 1 / 3, 1.5),  # cos(60 degrees) = 1/2
        ("cosine", 0.5, 1.0),
        ("cosine", 1.0, 0.0),
    ],
)
def test_learning_rates(schedule, progress, expected):
    update = UpdateConfig(learning_rate=2.0, learning_rate_schedule=schedule)
    assert learning_rate(update, progress=progress) == pytest.approx(expected)


def test_warmup_rises_and_the_schedule_starts_where_it_ends():
    update = UpdateConfig(learning_rate=1.0, learning_rate_schedule="linear", warmup_fraction=0.2)
    # 10 iterations: the first two warm up, to 1/2 and to 1; the other eight fall from 1 by 1/8 each.
    rates = [learning_rate(update, progress=i / 10, progress_step=0.1) for i in range(10)]
    assert rates == pytest.approx([0.5, 1.0, *(1 - i / 8 for i in range(8))])


def test_clip_ranges():
    assert clip_scale(UpdateConfig(), progress=0.5) == 1.0
    assert clip_scale(UpdateConfig(clip_schedule="linear"), progress=0.5) == 0.5


def test_no_schedule_gives_a_negative_rate():
    for schedule in ("constant", "linear", "cosine"):
        update = UpdateConfig(learning_rate_schedule=schedule, warmup_fraction=0.3)
        assert all(learning_rate(update, progress=i / 50) >= -math.ulp(1.0) for i in range(51))
