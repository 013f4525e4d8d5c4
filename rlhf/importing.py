"""Finding something of the user's by name: `module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.errors import UserError


def import_named(spec: str, *, kind: str, remedy: str, error: type[UserError] = UserError) -> Any:
    """Import what a config names.

    Args:
        spec: `module:name` (the working directory is searched too), or `file.py:name`, which may import its neighbours.
        kind: What it should be, for the messages, such as "reward function".
        remedy: What to do about a name of another form.
        error: Raised for every way to miss.

    Raises:
        UserError: Of the class `error`: no such file, module or name, or an error while importing.

    >>> import_named("math:sqrt", kind="function", remedy="")(4.0)
    2.0
    """
    place, separator, attribute = spec.rpartition(":")
    if not separator or not place or not attribute:
        raise error(
            f"not the name of a {kind}", got=spec, expected="module:name or path/to/file.py:name", remedy=remedy
        )
    is_file = place.endswith(".py")
    found = _import_file(Path(place).expanduser(), kind, error) if is_file else _import_module(place, error)
    for part in attribute.split("."):
        found = _attribute(found, part, place, error)
    return found


@contextmanager
def _searched(folder: Path) -> Iterator[None]:
    """Look for modules in a folder too, as `python` does in a script's; a console script has no such folder."""
    place = str(folder.resolve())
    added = place not in sys.path and not (place == str(Path.cwd()) and "" in sys.path)
    if added:
        sys.path.insert(0, place)
    try:
        yield
    finally:
        if added:
            sys.path.remove(place)


def _import_module(name: str, error: type[UserError]) -> ModuleType:
    try:
        with _searched(Path.cwd()):
            return importlib.import_module(name)
    except Exception as cause:
        raise error(
            f"cannot import the module: {type(cause).__name__}: {cause}",
            where=name,
            remedy="Give an importable module, or a file as path/to/file.py:name.",
        ) from cause


def _import_file(path: Path, kind: str, error: type[UserError]) -> ModuleType:
    if not path.is_file():
        raise error(
            f"no such file of a {kind}", where=str(path), remedy="The path is relative to the working directory."
        )
    name = f"rlhf_file_{sha256(str(path.resolve()).encode()).hexdigest()[:12]}_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # pickling and dataclasses look a module up by its name
    try:
        with _searched(path.parent):
            specification.loader.exec_module(module)
    except Exception as cause:
        del sys.modules[name]
        raise error(f"cannot import the file: {type(cause).__name__}: {cause}", where=str(path)) from cause
    return module


def _attribute(owner: Any, name: str, place: str, error: type[UserError]) -> Any:
    if hasattr(owner, name):
        return getattr(owner, name)
    known = [known for known in dir(owner) if not known.startswith("_") and callable(getattr(owner, known))]
    nearest = get_close_matches(name, known, n=1)
    remedy = f"Did you mean {nearest[0]!r}?" if nearest else f"There are: {', '.join(known) or 'none'}."
    raise error(f"there is no {name!r}", where=place, remedy=remedy)
