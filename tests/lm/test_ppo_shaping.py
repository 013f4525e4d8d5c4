"""What is done to scores before they become rewards, with numbers worked out by hand."""

import pytest
import torch

from rlhf.config import validate
from rlhf.errors import ConfigError
from rlhf.lm.collector_config import CollectorConfig, ShapingConfig
from rlhf.lm.judging import shape_scores

SCORES = torch.tensor([3.0, -0.5, 8.0])
ENDED = torch.tensor([True, True, False])
LENGTHS = torch.tensor([4, 10, 12])


@pytest.mark.parametrize(
    ("shaping", "expected"),
    [
        ({}, [3.0, -0.5, 8.0]),
        ({"score_clip": 5.0}, [3.0, -0.5, 5.0]),
        ({"missing_end_score": -1.0}, [3.0, -0.5, -1.0]),
        ({"missing_end_penalty": 1.5}, [3.0, -0.5, 6.5]),
        ({"length_penalty": 0.1}, [2.6, -1.5, 6.8]),
        # From 12 - 4 = 8 tokens on, -1/4 per token.
        ({"overlong_buffer": 4}, [3.0, -1.0, 7.0]),
        # Clipping comes first: a penalty is not clipped away.
        ({"score_clip": 5.0, "missing_end_penalty": 1.0, "length_penalty": 0.5}, [1.0, -5.5, -2.0]),
    ],
)
def test_scores_are_shaped_as_told(shaping, expected):
    shaped = shape_scores(SCORES, ShapingConfig(**shaping), ended=ENDED, lengths=LENGTHS, limit=12)
    torch.testing.assert_close(shaped, torch.tensor(expected))


def test_two_answers_to_a_missing_end_are_refused():
    with pytest.raises(ConfigError, match="set one of them"):
        validate(CollectorConfig, {"shaping": {"missing_end_score": -1.0, "missing_end_penalty": 1.0}})
