"""Experiments: many small runs side by side, kept as they finish, so that a stopped experiment goes on where it was.

    <directory>/cells/<name>.json    {"settings": ..., "result": ..., "seconds": ...}

A cell is one run, such as one algorithm on one environment with one seed. Its function returns what tables and figures
need, as JSON.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import json
import multiprocessing
import os
import re
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf.errors import ConfigError, TrainingError
from rlhf.markdown import markdown_table
from rlhf.training.checkpoints import write_atomically
from rlhf.training.metrics import ConsoleLog, jsonable

if TYPE_CHECKING:
    from rlhf.training.run import Run

__all__ = ["Cell", "markdown_table", "mean_and_interval", "run_cells", "write_report"]

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True)
class Cell:
    """One run of an experiment.

    Args:
        name: Unique in the experiment, a safe file name such as `double_dqn-CartPole-v1-seed_0`.
        settings: JSON; what the experiment's function is called with.
    """

    name: str
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        """Refuse names that are no file names."""
        if not re.fullmatch(r"[\w.+=-]+", self.name):
            raise ConfigError("a cell's name must be a file name", where="Cell.name", got=self.name)


def run_cells(
    cells: Sequence[Cell], function: str, *, directory: Path, jobs: int = 1, name: str = "experiment"
) -> list[dict[str, Any]]:
    """Run every cell that has no result yet, `jobs` at a time, and return all results.

    Each process runs one torch thread, and serves one cell after another: the global generators are seeded anew from
    the cell's name before each. With `jobs=1` the cells run in this process.

    Args:
        cells: What to run.
        function: `module:name`, called as `function(settings)`; it returns JSON.
        directory: Results are kept in its folder `cells`. A cell whose file holds equal settings is not run again; one
            with other settings is.
        jobs: Processes.
        name: What the console shows in front of the progress.

    Returns:
        Results, in the order of `cells`.

    Raises:
        ConfigError: Two cells of one name, or a function that cannot be imported.
        TrainingError: Cells failed; told after the others finished, whose results are kept.
    """
    names = [cell.name for cell in cells]
    if len(set(names)) < len(names):
        doubled = sorted({cell for cell in names if names.count(cell) > 1})
        raise ConfigError("two cells of one name", where=name, got=", ".join(doubled[:3]))
    _import(function)
    folder = directory / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    missing = [cell for cell in cells if _read(folder, cell) is None]
    console = ConsoleLog(total=len(cells), enabled=True, bar=True, every=1, name=name)
    console.start(completed=len(cells) - len(missing))
    failures: dict[str, str] = {}
    try:
        for count, (cell, error) in enumerate(
            _finished(missing, function, folder, jobs), len(cells) - len(missing) + 1
        ):
            if error is not None:
                failures[cell.name] = error
                console.say(f"{name}: {cell.name} failed\n{error}")
            console.iteration(count, {})
    finally:
        console.stop()
    if failures:
        raise TrainingError(
            f"{len(failures)} of {len(cells)} cells failed: {', '.join(sorted(failures))}",
            where=name,
            remedy=f"The other results are kept in {folder}; run it again with run.resume=true for the rest.",
        )
    return [_read(folder, cell)["result"] for cell in cells]


def _finished(cells: Sequence[Cell], function: str, folder: Path, jobs: int) -> Iterator[tuple[Cell, str | None]]:
    """Yield each cell as it finishes, with its error where it failed."""
    if jobs == 1:
        for cell in cells:
            yield cell, _run_cell(cell, function, folder)
        return
    with _one_thread_each():
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_prepare_process) as pool:
            futures = {pool.submit(_run_cell, cell, function, folder): cell for cell in cells}
            try:
                for future in concurrent.futures.as_completed(futures):
                    crash = future.exception()
                    yield futures[future], future.result() if crash is None else f"the process ended: {crash}"
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _run_cell(cell: Cell, function: str, folder: Path) -> str | None:
    """Run one cell and keep its result; returns the error as text where it failed."""
    from rlhf.training.distributed import seed_everything  # accelerate is needed by runs, not by reading results

    started = time.monotonic()
    seed_everything(zlib.crc32(cell.name.encode()))
    try:
        result = jsonable(_import(function)(dict(cell.settings)))
        record = {"settings": cell.settings, "result": result, "seconds": time.monotonic() - started}
        write_atomically(folder / f"{cell.name}.json", json.dumps(record, indent=1) + "\n")
    except Exception:
        return traceback.format_exc(limit=-6)
    return None


def _read(folder: Path, cell: Cell) -> Any:
    """Return the kept record of a cell; None where there is none, or one of other settings."""
    file = folder / f"{cell.name}.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return record if record["settings"] == json.loads(json.dumps(cell.settings)) else None


def _import(function: str) -> Callable[[dict[str, Any]], Any]:
    module, _, attribute = function.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"no such function: {error}", where="run_cells", got=function) from error


def _prepare_process() -> None:
    import torch

    torch.set_num_threads(1)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started inside use one thread: numpy reads the variables when it is imported."""
    before = {variable: os.environ.get(variable) for variable in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value


def write_report(run: Run, table: str, numbers: Any) -> None:
    """Write `table.md` and `results.json` into the run directory, and show the table.

    Args:
        run: Of the experiment.
        table: Markdown.
        numbers: What the table and the figure show, as JSON.
    """
    write_atomically(run.directory / "table.md", table)
    write_atomically(run.directory / "results.json", json.dumps(numbers, indent=2) + "\n")
    run.say(table)


def mean_and_interval(values: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Return the mean and its percentile bootstrap interval over `values` (seeds), with a generator of its own.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    Args:
        values: One number per seed; a single one has itself as its interval.
        confidence: Of the interval, in (0, 1).
    """
    numbers = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).choice(numbers, size=(BOOTSTRAP_DRAWS, len(numbers))).mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(numbers.mean()), float(low), float(high)
