"""Grids of runs: kept as they finish, not run twice, told when they fail."""

import json

import numpy as np
import pytest

from rlhf.errors import ConfigError, TrainingError
from rlhf.training.experiment import Cell, markdown_table, mean_and_interval, run_cells

FUNCTION = f"{__name__}:square"


def square(settings: dict) -> dict:
    """The square of x, after a line in a journal that tells that it ran; x = 13 fails."""
    with open(settings["journal"], "a", encoding="utf-8") as journal:
        journal.write(f"{settings['x']}\n")
    if settings["x"] == 13:
        raise ValueError("thirteen")
    return {"square": settings["x"] ** 2, "draw": float(np.random.random())}


def cells_of(numbers, folder) -> list[Cell]:
    return [Cell(f"x_{x}", {"x": x, "journal": str(folder / "journal")}) for x in numbers]


def test_results_come_in_the_order_of_the_cells_and_are_not_made_twice(tmp_path):
    first = run_cells(cells_of([3, 1, 2], tmp_path), FUNCTION, directory=tmp_path)
    again = run_cells(cells_of([3, 1, 2, 4], tmp_path), FUNCTION, directory=tmp_path)
    assert [result["square"] for result in again] == [9, 1, 4, 16]
    assert again[:3] == first
    assert (tmp_path / "journal").read_text().split() == ["3", "1", "2", "4"]


def test_a_cell_with_other_settings_is_run_again(tmp_path):
    run_cells([Cell("a", {"x": 2, "journal": str(tmp_path / "journal")})], FUNCTION, directory=tmp_path)
    results = run_cells([Cell("a", {"x": 5, "journal": str(tmp_path / "journal")})], FUNCTION, directory=tmp_path)
    assert results[0]["square"] == 25


def test_a_failing_cell_is_named_and_the_others_are_kept(tmp_path):
    with pytest.raises(TrainingError, match="1 of 3 cells failed: x_13"):
        run_cells(cells_of([2, 13, 3], tmp_path), FUNCTION, directory=tmp_path)
    assert json.loads((tmp_path / "cells" / "x_3.json").read_text())["result"]["square"] == 9
    assert not (tmp_path / "cells" / "x_13.json").exists()


@pytest.mark.slow
def test_processes_give_the_same_results_as_one_whatever_their_order(tmp_path):
    alone = run_cells(cells_of([1, 2, 3], tmp_path), FUNCTION, directory=tmp_path / "alone")
    together = run_cells(cells_of([3, 2, 1], tmp_path), FUNCTION, directory=tmp_path / "together", jobs=2)
    assert together[::-1] == alone  # the draws too: generators are seeded by the cell's name


def test_bad_names_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="must be a file name"):
        Cell("a/b", {})
    with pytest.raises(ConfigError, match="two cells of one name"):
        run_cells([Cell("a", {}), Cell("a", {})], FUNCTION, directory=tmp_path)
    with pytest.raises(ConfigError, match="no such function"):
        run_cells([], "json:nothing", directory=tmp_path)


def test_interval_of_a_mean_matches_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    mean, low, high = mean_and_interval(values)
    half_width = 1.96 * values.std() / 20  # standard error: 2 / sqrt(400) = 0.1
    assert mean == pytest.approx(values.mean())
    assert high - mean == pytest.approx(half_width, rel=0.05)
    assert mean - low == pytest.approx(half_width, rel=0.05)
    assert mean_and_interval([7.0]) == (7.0, 7.0, 7.0)


def test_table_escapes_bars():
    assert markdown_table(["a"], [["x|y"]]).splitlines()[-1] == "| x\\|y |"
