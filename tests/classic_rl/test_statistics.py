"""Aggregates and intervals against rliable 1.2.0's numbers.

The expected numbers were computed in an environment of its own (`pip install rliable "pandas<3"`) with

    from rliable import library, metrics
    metrics.aggregate_iqm(A), .aggregate_median(A), .aggregate_mean(A), .aggregate_optimality_gap(A)
    metrics.probability_of_improvement(A, B)
    library.create_performance_profile({"a": A}, np.array([0, .25, .5, .75, 1, 1.25]))
    library.get_interval_estimates({"a": A}, lambda x: np.array([iqm(x), mean(x), gap(x)]), reps=20000)
    library.get_interval_estimates({"ab": (A, B)}, metrics.probability_of_improvement, reps=5000)
"""

from __future__ import annotations

import doctest

import numpy as np
import pytest

import classic_rl.statistics
from classic_rl.statistics import (
    Estimate,
    format_estimate,
    interquartile_mean,
    mean,
    median,
    normalised,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
    profile_band,
    stratified_interval,
)
from rlhf.errors import ConfigError

A = np.array(
    [
        [0.768, 1.001, 0.844, 0.763],
        [0.593, 0.904, 0.613, 1.248],
        [1.349, 0.537, 1.108, 0.74],
        [0.795, 1.296, 0.099, 0.122],
        [0.028, 1.166, 1.089, 1.218],
    ]
)
B = np.array(
    [
        [0.979, 0.799, 0.461, 0.781],
        [0.118, 0.64, 0.143, 0.945],
        [0.522, 0.415, 0.265, 0.774],
        [0.456, 0.568, 0.019, 0.618],
        [0.612, 0.617, 0.944, 0.682],
    ]
)


def test_the_doctests():
    assert doctest.testmod(classic_rl.statistics).failed == 0


def test_aggregates_are_rliables():
    assert interquartile_mean(A) == pytest.approx(0.8625)
    assert median(A) == pytest.approx(0.7844)
    assert mean(A) == pytest.approx(0.81405)
    assert optimality_gap(A) == pytest.approx(0.2597)
    # Nine scores: a quarter is 2.25, of which scipy's trimmed mean cuts two at each end.
    nine = np.array([[0.417, 0.72, 0.0], [0.302, 0.147, 0.092], [0.186, 0.346, 0.397]])
    assert interquartile_mean(nine) == pytest.approx(0.2756)


def test_the_probability_of_improvement_is_rliables():
    assert probability_of_improvement(A, B) == pytest.approx(0.7)
    assert probability_of_improvement(np.round(A, 1), np.round(B, 1)) == pytest.approx(0.715)  # with ties
    assert probability_of_improvement(B, A) == pytest.approx(0.3)
    assert probability_of_improvement(A, A) == 0.5
    with pytest.raises(ConfigError, match="same tasks"):
        probability_of_improvement(A, B[:, :2])


def test_the_profile_is_rliables():
    thresholds = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
    expected = [1.0, 0.85, 0.85, 0.65, 0.4, 0.1]
    np.testing.assert_allclose(performance_profile(A, thresholds), expected)
    profile, low, high = profile_band(A, thresholds, draws=500)
    np.testing.assert_allclose(profile, expected)
    assert (low <= profile).all()
    assert (profile <= high).all()
    assert low[3] < 0.65 < high[3]


@pytest.mark.parametrize(
    ("aggregate", "expected"),
    [
        (interquartile_mean, (0.8625, 0.6728, 1.0385)),
        (mean, (0.81405, 0.6490, 0.9713)),
        (optimality_gap, (0.2597, 0.1386, 0.3952)),
    ],
)
def test_intervals_are_rliables(aggregate, expected):
    # Two bootstraps with 4,000 and 20,000 draws: their quantiles agree within 0.01 (interval widths are 0.26 to 0.37).
    np.testing.assert_allclose(stratified_interval(aggregate, A, draws=4000), expected, atol=0.01)


def test_the_interval_of_two_matrices_is_rliables():
    np.testing.assert_allclose(
        stratified_interval(probability_of_improvement, A, B, draws=4000), (0.7, 0.52, 0.87), atol=0.021
    )


def test_runs_are_resampled_within_their_task():
    # Each task's runs are equal, so a stratified bootstrap has no spread; mixing tasks would give one.
    scores = np.tile([0.1, 0.5, 0.9], (5, 1))
    assert stratified_interval(mean, scores, draws=200) == pytest.approx((0.5, 0.5, 0.5))


def test_normalised_scores_and_their_limits():
    with pytest.raises(ConfigError, match="equals its lowest"):
        normalised(A, lowest=np.zeros(4), highest=np.array([1.0, 0.0, 1.0, 1.0]))
    with pytest.raises(ConfigError, match="a row per run"):
        stratified_interval(mean, np.array([1.0, 2.0]))
    with pytest.raises(ConfigError, match="finite: False"):
        stratified_interval(mean, np.array([[1.0, np.nan]]))
    assert format_estimate(Estimate(0.5, 0.25, 0.75)) == "0.50 [0.25, 0.75]"
    assert format_estimate((float("nan"), 0.0, 0.0)) == "-"
