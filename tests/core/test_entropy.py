from __future__ import annotations

import pytest

from rlhf.core.algorithm import AdaptiveEntropy
from rlhf.core.entropy import EntropyCoefficient
from rlhf.errors import TrainingError


def test_the_coefficient_follows_the_rule_of_skywork():
    """c rises by .25 while entropy < .5, falls by .25 otherwise, never below 0, and acts only at or below .5."""
    coefficient = EntropyCoefficient(0.0, AdaptiveEntropy(target=0.5, step=0.25))
    seen = []
    for entropy in (0.4, 0.4, 0.6, 0.5, 0.6, 0.4):
        coefficient.update(entropy)
        seen.append(coefficient.value)
    #  c:    .25   .5   .25 (silent)  0 (at the target: acts, but fell)  0 (silent)  .25
    assert seen == [0.25, 0.5, 0.0, 0.0, 0.0, 0.25]


def test_it_silences_but_remembers():
    coefficient = EntropyCoefficient(1.0, AdaptiveEntropy(target=0.5, step=0.25))
    assert coefficient.value == 1.0
    coefficient.update(0.9)
    assert coefficient.value == 0.0
    again = EntropyCoefficient(0.0, AdaptiveEntropy(target=0.5, step=0.25))
    again.load_state_dict(coefficient.state_dict())
    assert again.value == 0.0
    again.update(0.1)
    assert again.value == 1.0  # .75 kept, .25 added


def test_without_a_target_it_stays():
    coefficient = EntropyCoefficient(0.01, None)
    coefficient.update(float("nan"))
    assert coefficient.value == 0.01


def test_an_entropy_that_is_not_finite_is_refused():
    with pytest.raises(TrainingError, match="not finite"):
        EntropyCoefficient(0.0, AdaptiveEntropy(target=0.5)).update(float("nan"))
