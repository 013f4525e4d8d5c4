"""The outer loop steers the KL coefficient by the measured KL, in its unit."""

import pytest

from rlhf.core.algorithm import AdaptiveKl, DualKl, FixedKl, KlInLoss, KlInReward, ProportionalKl
from rlhf.core.kl import make_kl_coefficient
from rlhf.core.presets import ALGORITHMS
from rlhf.training.loop import _update_coefficient

METRICS = {
    "rows": 40.0,
    "kl_to_ref": 0.5,
    "kl_to_ref_per_sequence": 6.6,
    "kl_to_old": 99.0,
    "kl_to_old_after": 0.02,
    "kl_to_old_after_per_sequence": 0.4,
}


class LearnerWith:
    def __init__(self, kl):
        self.algorithm = ALGORITHMS["ppo_rlhf"].model_copy(update={"kl": kl})


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (KlInReward(coefficient=FixedKl(value=0.3)), 0.3),
        # Ziegler et al.: 0.1 x (1 + clip(6.6 / 6 - 1, +-0.2) x 40 / 1000) = 0.1 x (1 + 0.1 x 0.04)
        (KlInReward(coefficient=ProportionalKl(initial=0.1, target=6.0, horizon=1000)), 0.1 * 1.004),
        # 0.5 nats per action is below 1 / 1.5, so the coefficient halves.
        (KlInReward(coefficient=AdaptiveKl(initial=0.1, target=1.0)), 0.05),
        # 6.6 nats per row exceed 1.5 x 4, so it doubles.
        (KlInReward(coefficient=AdaptiveKl(initial=0.1, target=4.0, unit="sequence")), 0.2),
        # 0.02 nats to the old policy, measured after the update, exceed 1.5 x 0.01.
        (KlInLoss(against="old_policy", coefficient=AdaptiveKl(initial=1.0, target=0.01)), 2.0),
        # 1 + 10 x (0.5 - 0.4)
        (KlInLoss(against="reference", coefficient=DualKl(initial=1.0, target=0.4, learning_rate=10.0)), 2.0),
        (KlInLoss(against="old_policy", coefficient=DualKl(target=0.3, learning_rate=5.0, unit="sequence")), 1.5),
    ],
)
def test_the_coefficient_follows_the_kl_that_its_term_holds_down(kl, expected):
    coefficient = make_kl_coefficient(kl)
    _update_coefficient(coefficient, METRICS, LearnerWith(kl))
    assert coefficient.value == pytest.approx(expected)


def test_without_a_kl_term_nothing_moves():
    coefficient = make_kl_coefficient(ALGORITHMS["ppo"].kl)
    learner = LearnerWith(ALGORITHMS["ppo"].kl)
    _update_coefficient(coefficient, METRICS, learner)
    assert coefficient.value == 0.0
