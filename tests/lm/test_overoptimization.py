"""Fits of over-optimization: known parameters come back, peaks are where the curves are highest, reports say it."""

import math

import numpy as np
import pytest
from matplotlib.image import imread

from rlhf.errors import DataError
from rlhf.lm.overoptimization import Curve, Fit, fit_gain
from rlhf.lm.overoptimization_report import (
    Panel,
    answer_table,
    best_of_n_table,
    draw,
    fit_numbers,
    run_table,
    seed_fits,
    seed_table,
)

DISTANCES = np.linspace(0, 4, 17)


def best_of_n(d, alpha, beta):
    return d * (alpha - beta * d)


def rl(d, alpha, beta):
    return np.array([0.0 if x == 0 else x * (alpha - beta * math.log(x)) for x in d])


FORMS = {"best_of_n": best_of_n, "rl": rl}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.1), (0.3, 0.4), (-0.2, 0.1)])
def test_known_parameters_come_back(form, alpha, beta):
    fit = fit_gain(DISTANCES, FORMS[form](DISTANCES, alpha, beta), form)
    assert (fit.alpha, fit.beta) == pytest.approx((alpha, beta), abs=1e-9)
    assert fit.r_squared == pytest.approx(1.0)
    assert fit.residual == pytest.approx(0.0, abs=1e-9)
    assert fit.points == 16  # d = 0 says nothing
    assert fit(DISTANCES) == pytest.approx(FORMS[form](DISTANCES, alpha, beta), abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_noise_is_reported_as_residual(form):
    """Noise of deviation .05 on 20,000 points: parameters within 4 standard errors, the residual is the noise."""
    random = np.random.default_rng(0)
    d = random.uniform(0.2, 4, size=20_000)
    clean = FORMS[form](d, 0.4, 0.15)
    fit = fit_gain(d, clean + random.normal(0, 0.05, size=d.shape), form)
    columns = np.stack([d, -(d**2) if form == "best_of_n" else -d * np.log(d)], axis=1)
    errors = 0.05 * np.sqrt(np.diag(np.linalg.inv(columns.T @ columns)))
    assert abs(fit.alpha - 0.4) < 4 * errors[0]
    assert abs(fit.beta - 0.15) < 4 * errors[1]
    assert fit.residual == pytest.approx(0.05, rel=0.03)
    assert fit.r_squared == pytest.approx(1 - 0.05**2 / (clean.var() + 0.05**2), abs=0.01)


@pytest.mark.parametrize("form", FORMS)
def test_the_peak_is_where_the_curve_is_highest(form):
    fit = Fit(form, alpha=0.5, beta=0.2, residual=0.0, r_squared=1.0, points=9)
    grid = np.linspace(0, 12, 120_001)
    values = fit(grid)
    distance, gain = fit.peak
    assert distance == pytest.approx(grid[values.argmax()], abs=1e-3)
    assert gain == pytest.approx(values.max(), abs=1e-6)


def test_a_curve_that_only_rises_or_falls_has_no_peak():
    assert Fit("best_of_n", 0.5, -0.1, 0.0, 1.0, 9).peak is None
    assert Fit("best_of_n", -0.5, 0.1, 0.0, 1.0, 9).peak is None
    assert Fit("rl", 0.5, 0.0, 0.0, 1.0, 9).peak is None
    assert Fit("rl", 0.5, 1e-4, 0.0, 1.0, 9).peak is None  # exp(5000) is no distance


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(DataError, match="Evaluate more often"):
        fit_gain([0.0, 1.0, 1.0], [0.0, 0.1, 0.2], "rl")
    with pytest.raises(DataError, match="not negative"):
        fit_gain([-1.0, 1.0, 2.0], [0.0, 0.1, 0.2], "rl")
    with pytest.raises(DataError, match="finite"):
        fit_gain([0.5, 1.0, 2.0], [0.0, float("nan"), 0.2], "rl")


def curve(gold, proxy=(0.0, 1.0, 2.0, 3.0), kl=(-0.01, 1.0, 4.0, 9.0), error=0.01):
    return Curve(kl=list(kl), gold=list(gold), proxy=list(proxy), gold_errors=[error] * len(kl))


def test_a_curve_knows_its_peak_and_its_distances():
    one = curve([0.2, 0.5, 0.6, 0.1])
    assert one.distances == [0.0, 1.0, 2.0, 3.0]  # an estimate of -0.01 nats is 0
    assert one.peak == 2
    assert one.gains == pytest.approx([0.0, 0.3, 0.4, -0.1])
    assert one.lost == pytest.approx(1.25)  # of .4 gained, .5 is lost
    assert one.overoptimized
    assert math.isnan(curve([0.2, 0.1, 0.1, 0.0]).lost)  # there never was a gain


@pytest.mark.parametrize(
    ("gold", "proxy"),
    [
        ([0.2, 0.4, 0.5, 0.6], [0, 1, 2, 3]),  # gold rises to the end
        ([0.2, 0.4, 0.6, 0.5], [0, 1, 2, 3]),  # a quarter of the gain is lost
        ([0.2, 0.1, 0.1, 0.0], [0, 1, 2, 3]),  # there never was a gain to lose
        ([0.2, 0.5, 0.4, 0.1], [0, 2, 1, 0]),  # the proxy falls, too: that is a failing run
    ],
)
def test_not_every_fall_is_overoptimization(gold, proxy):
    assert not curve(gold, proxy).overoptimized


def panels():
    runs = {
        "kl_0": [curve([0.2, 0.5, 0.6, 0.1]), curve([0.2, 0.6, 0.5, 0.2])],
        "kl_0.1": [curve([0.2, 0.4, 0.5, 0.6])] * 2,
    }
    return [Panel("best of n", "best_of_n", {"one": [curve([0.2, 0.3, 0.4, 0.5])] * 2}), Panel("PPO", "rl", runs)]


def test_tables_hold_means_over_seeds_and_of_their_fits():
    text = run_table(panels())
    row = next(line for line in text.splitlines() if line.startswith("| kl_0 "))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["kl_0", "0.200 ± 0.000", "0.600 ± 0.000", "0.150 ± 0.071"]  # sample deviation of .1 and .2
    assert cells[4] == "1.500 ± 0.707"  # peaks at d = 2 and d = 1
    assert cells[8:10] == ["112%", "2 of 2"]  # lost: .5 of .4, and .4 of .4
    # By hand: points d = 1, 2, 3 with gains (.3, .4, -.1) and (.4, .3, 0), columns d and -d log d.
    columns = np.array([[d, -d * math.log(d)] for d in (1, 2, 3)])
    gains = np.array([[0.3, 0.4, -0.1], [0.4, 0.3, 0.0]])
    fitted = np.linalg.solve(columns.T @ columns, columns.T @ gains.T)  # [alpha and beta, seeds]
    for cell, values in zip(cells[10:12], fitted, strict=True):
        assert cell == f"{values.mean():.3f} ± {abs(values[0] - values[1]) / math.sqrt(2):.3f}"
    errors = gains.T - columns @ fitted
    assert cells[13] == f"{np.sqrt((errors**2).mean(axis=0)).mean():.3f}"
    by_seed = seed_table(panels(), [4, 7]).splitlines()
    assert by_seed[0] == "| optimized by | seed 4 | seed 7 |"
    assert "| kl_0 | 0.200, 0.600 (4.0), 0.100 (9.0) | 0.200, 0.600 (1.0), 0.200 (9.0) |" in by_seed


def test_the_table_of_best_of_n_has_a_row_per_n():
    text = best_of_n_table([1, 2, 4, 8], {"one": [curve([0.2, 0.3, 0.4, 0.5])]}).splitlines()
    assert text[-1] == "| 8 | 9.00 | 3.00 | 0.500 | 3.000 |"


def test_answers_are_shown_at_the_start_the_peak_and_the_end():
    told = [[{"prompt": "ab>", "completion": word, "gold": 0.5, "proxy": 1.0}] for word in ("w0", "w1", "w2", "w3")]
    row = answer_table(curve([0.2, 0.5, 0.6, 0.1]), told).splitlines()[-1]
    assert row == "| ab> | w0 (0.50, 1.00) | w2 (0.50, 1.00) | w3 (0.50, 1.00) |"


def test_fits_are_kept_as_numbers_and_too_few_points_as_none():
    short = [Panel("PPO", "rl", {"ended": [curve([0.2, 0.3], proxy=(0, 1), kl=(0.0, 1.0))]})]
    assert seed_fits(short[0].curves["ended"], "rl") == [None]
    assert fit_numbers(short) == {"ended": [None]}
    assert run_table(short).splitlines()[-1].endswith("| - | - | - | - |")
    first, second = fit_numbers(panels())["kl_0"]
    assert first["form"] == "rl"
    assert first["points"] == 3
    assert first["alpha"] != second["alpha"]


def test_the_figure_is_drawn(tmp_path):
    draw(panels(), tmp_path / "figure.png", gold_label="gold", proxy_label="proxy")
    height, width = imread(tmp_path / "figure.png").shape[:2]
    assert width > height > 500
