"""Where numbers go: metrics.jsonl and samples.jsonl always, the console, and accelerate's trackers."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlhf.errors import ConfigError, TrainingError
from rlhf.training.checkpoints import write_atomically

HEADLINES = (
    "evaluation/loss",
    "evaluation/*mean",
    "evaluation/*accuracy*",
    "evaluation/*",
    "rollout/return_mean",
    "rollout/*score*mean",
    "rollout/*accuracy*",
    "rollout/length_mean",
    "kl_to_ref",
    "approx_kl",
    "clip_fraction",
    "entropy",
    "explained_variance",
    "loss",
    "grad_norm",
)
"""What the console shows, in this order; the files hold everything."""
MOST_HEADLINES, MOST_EVALUATIONS = 7, 3


class JsonLines:
    """An append-only file of one JSON object a line; every line is on its way to the disk when `write` returns.

    Args:
        path: The file; made when the first line is written.
    """

    def __init__(self, path: Path) -> None:
        """Nothing is written yet."""
        self.path = path

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records; numbers that are not finite become null, which JSON has no other word for.

        Raises:
            TrainingError: A record that is not JSON.
        """
        try:
            lines = [json.dumps(jsonable(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
        except TypeError as error:
            raise TrainingError(f"not writable as JSON: {error}", where=self.path.name) from error
        if lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))

    def read(self) -> list[dict[str, Any]]:
        """Return all records; a last line that a crash cut off is left out."""
        if not self.path.exists():
            return []
        records = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def keep_until(self, iteration: int) -> None:
        """Drop the records of later iterations: a resumed run writes them again."""
        if self.path.exists():
            kept = [record for record in self.read() if record["iteration"] <= iteration]
            write_atomically(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def jsonable(value: Any) -> Any:
    """Return `value` with floats that are not finite as None, and numbers of numpy and torch as python's."""
    if type(value) is float:
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    return value


class ConsoleLog:
    """A progress bar with its remaining time on a terminal, plain lines elsewhere, nothing on other processes.

    Args:
        total: Iterations of the run.
        enabled: False on all processes but the main one.
        bar: Whether a terminal gets a bar.
        every: Iterations between plain lines.
        name: What is shown in front.
    """

    def __init__(self, *, total: int, enabled: bool, bar: bool, every: int, name: str) -> None:
        """Print nothing yet."""
        self._total, self._enabled, self._every, self._name = total, enabled, every, name
        self._console = Console(file=sys.stdout)
        self._bar = self._make_bar() if enabled and bar and self._console.is_terminal else None
        self._task: Any = None
        self._started, self._first = time.monotonic(), 0

    def _make_bar(self) -> Progress:
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()]
        return Progress(
            *columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[headline]}"),
            console=self._console,
        )  # fmt: skip

    def start(self, *, completed: int) -> None:
        """Begin at an iteration; a resumed run has completed some."""
        self._started, self._first = time.monotonic(), completed
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total, completed=completed, headline="")

    def iteration(self, iteration: int, metrics: Mapping[str, float]) -> None:
        """Show one iteration's numbers."""
        if self._bar is not None:
            self._bar.update(self._task, completed=iteration, headline=headline(metrics))
        elif self._enabled and (iteration % self._every == 0 or iteration == self._total):
            elapsed = time.monotonic() - self._started
            remaining = elapsed / max(1, iteration - self._first) * (self._total - iteration)
            print(
                f"{self._name} {iteration}/{self._total}  {elapsed:.0f} s, {remaining:.0f} s left  {headline(metrics)}",
                flush=True,
            )

    def say(self, text: str) -> None:
        """Print a sentence above the bar."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, renderable: Any) -> None:
        """Print a table or another thing of rich's above the bar."""
        if self._enabled:
            self._console.print(renderable)

    def stop(self) -> None:
        """Leave the terminal in order."""
        if self._bar is not None:
            self._bar.stop()


def headline(metrics: Mapping[str, float]) -> str:
    """Return the few metrics that the console shows.

    >>> headline({"grad_norm": 0.5, "rollout/return_mean": 21.25, "rows": 8.0, "evaluation/return_mean": 30.0})
    'evaluated return_mean 30  return_mean 21.2  grad_norm 0.5'
    """
    chosen = list(dict.fromkeys(name for pattern in HEADLINES for name in metrics if fnmatch(name, pattern)))
    evaluated = [name for name in chosen if name.startswith("evaluation/")][:MOST_EVALUATIONS]
    shown = [*evaluated, *(name for name in chosen if not name.startswith("evaluation/"))] or list(metrics)
    return "  ".join(
        f"{name.replace('evaluation/', 'evaluated ').removeprefix('rollout/')} {metrics[name]:.3g}"
        for name in shown[:MOST_HEADLINES]
    )


class Trackers:
    """TensorBoard, Weights & Biases and others, through accelerate's classes.

    Args:
        names: As accelerate spells them.
        project: Their project or folder name.
        logging_dir: Where local ones write.
        config: Flat settings to store with the run.
    """

    def __init__(self, names: Sequence[str], *, project: str, logging_dir: Path, config: Mapping[str, Any]) -> None:
        """Start the trackers.

        Raises:
            ConfigError: An unknown name, or one whose package is not installed.
        """
        require_trackers(names)
        self._trackers: list[GeneralTracker] = []
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            tracker = kind(project, logging_dir) if kind.requires_logging_directory else kind(project)
            tracker.start()
            tracker.store_init_configuration(dict(config))
            self._trackers.append(tracker)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Send one iteration's numbers."""
        for tracker in self._trackers:
            tracker.log(dict(metrics), step=step)

    def finish(self) -> None:
        """Flush and close."""
        for tracker in self._trackers:
            tracker.finish()
        self._trackers = []


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that could not be used, before any training.

    Raises:
        ConfigError: An unknown name, or one whose package is not installed.
    """
    available = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                "no such tracker", where="run.trackers", got=name, expected=", ".join(sorted(LOGGER_TYPE_TO_CLASS))
            )
        if name not in available:
            raise ConfigError(
                f"the tracker {name!r} needs a package that is not installed",
                where="run.trackers",
                remedy=f"Install it (`pip install {name}`, or `pip install 'rlhf-toolkit[trackers]'`), or remove it "
                "from run.trackers; metrics.jsonl is written in any case.",
            )


def flatten_settings(settings: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Return nested settings as {"a.b": value} with values that every tracker takes."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten_settings(value, prefix=f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
