"""Checkpoints: a folder per iteration, written aside and renamed, so that none is ever half there.

States are saved with `torch.save` and read with `weights_only=True`: tensors, numbers, strings and containers of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlhf.errors import TrainingError

NUMPY_KEY = "__numpy__"


class CheckpointStore:
    """The `checkpoints` folder of a run.

    Args:
        directory: The folder; made when the first checkpoint is saved.
        keep: How many of the latest to keep; the best one is kept besides.
    """

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Nothing is read or written yet."""
        self.directory, self._keep = directory, keep

    def save(self, iteration: int, states: Mapping[str, Any]) -> Path:
        """Write `<name>.pt` per state, atomically, and let `latest` name it.

        Args:
            iteration: The last completed iteration.
            states: Made of tensors, arrays, numbers, strings and containers of them.

        Returns:
            The checkpoint's folder. One that is there already is left as it is.

        Raises:
            TrainingError: A state holds something that could not be read back safely, or the disk refuses.
        """
        path = self.directory / checkpoint_name(iteration)
        plain = {name: to_plain(state, where=name) for name, state in states.items()}
        if not path.exists():
            try:
                self._write(path, plain)
            except OSError as error:
                raise TrainingError(
                    f"the checkpoint could not be written: {error.strerror or error}",
                    where=str(path),
                    remedy="The earlier checkpoints are untouched. Make room, or give another run.directory.",
                ) from error
        write_atomically(self.directory / "latest", path.name)
        self._remove_old()
        return path

    def _write(self, path: Path, states: Mapping[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".writing_*"):
            shutil.rmtree(leftover)
        aside = self.directory / f".writing_{path.name}"
        aside.mkdir()
        for name, state in states.items():
            with (aside / f"{name}.pt").open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(aside)
        aside.rename(path)
        _sync_folder(self.directory)

    def load(self, path: Path, name: str) -> Any:
        """Return one state of a checkpoint, on the CPU.

        Raises:
            TrainingError: It is not there or not readable.
        """
        file = path / f"{name}.pt"
        try:
            return from_plain(torch.load(file, map_location="cpu", weights_only=True))
        except FileNotFoundError as error:
            raise TrainingError(
                f"the checkpoint holds no state of {name!r}",
                where=str(path),
                got=", ".join(sorted(found.stem for found in path.glob("*.pt"))),
                remedy="Resume with the recipe and settings that the run was started with.",
            ) from error
        except Exception as error:
            raise TrainingError(
                f"not readable as a checkpoint: {error}",
                where=str(file),
                remedy="Delete this checkpoint's folder and resume: the one before it is taken.",
            ) from error

    def latest(self) -> Path | None:
        """Return the newest checkpoint."""
        named = self._pointed("latest")
        return named if named is not None else max(self.all(), default=None)

    def best(self) -> Path | None:
        """Return the checkpoint with the best evaluation so far, if one was marked."""
        best = self.best_record()
        return None if best is None else self.directory / best["checkpoint"]

    def best_record(self) -> dict[str, Any] | None:
        """Return what `mark_best` wrote."""
        try:
            return json.loads((self.directory / "best.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def mark_best(self, path: Path, *, metric: str, value: float) -> None:
        """Keep this checkpoint until a better one is marked."""
        record = {"checkpoint": path.name, "metric": metric, "value": value}
        write_atomically(self.directory / "best.json", json.dumps(record))
        self._remove_old()

    def all(self) -> list[Path]:
        """Return all complete checkpoints, oldest first."""
        return sorted(path for path in self.directory.glob("iteration_*") if path.is_dir())

    def _pointed(self, pointer: str) -> Path | None:
        try:
            path = self.directory / (self.directory / pointer).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None
        return path if path.is_dir() else None

    def _remove_old(self) -> None:
        kept = {*self.all()[-self._keep :], self.best(), self.latest()}
        for path in self.all():
            if path not in kept:
                shutil.rmtree(path)


def checkpoint_name(iteration: int) -> str:
    """Return the folder's name; sorting names sorts iterations."""
    return f"iteration_{iteration:06d}"


def to_plain(state: Any, *, where: str) -> Any:
    """Turn a state into what `weights_only` loading accepts; arrays become tensors with their dtype's name.

    Raises:
        TrainingError: An object of another kind, with the place it was found at.
    """
    if state is None or isinstance(state, bool | int | float | str | Tensor):
        return state
    if isinstance(state, np.ndarray) and state.dtype.kind in "biuf":
        # Bytes, because torch lacks some of numpy's integer types.
        content = torch.frombuffer(bytearray(state.tobytes()), dtype=torch.uint8) if state.size else torch.empty(0)
        return {NUMPY_KEY: str(state.dtype), "shape": list(state.shape), "bytes": content}
    if isinstance(state, np.generic):
        return to_plain(state.item(), where=where)
    if isinstance(state, Mapping):
        return {key: to_plain(value, where=f"{where}[{key!r}]") for key, value in state.items()}
    if isinstance(state, list | tuple):
        items = [to_plain(value, where=f"{where}[{index}]") for index, value in enumerate(state)]
        return tuple(items) if isinstance(state, tuple) else items
    raise TrainingError(
        "a checkpoint holds only tensors, arrays, numbers, strings and containers of them",
        where=where,
        got=type(state).__name__,
        remedy="Return something plainer from state_dict().",
    )


def from_plain(state: Any) -> Any:
    """Undo `to_plain`."""
    if isinstance(state, dict):
        if NUMPY_KEY in state:
            content = state["bytes"].numpy().tobytes() if state["bytes"].numel() else b""
            return np.frombuffer(content, dtype=state[NUMPY_KEY]).reshape(state["shape"]).copy()
        return {key: from_plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(from_plain(value) for value in state)
    return state


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step: a reader sees the old or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.writing")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power cut, where the file system knows how."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
