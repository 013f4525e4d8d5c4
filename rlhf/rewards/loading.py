"""Finding a reward function by name: `module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf.errors import RewardError


def load_reward(spec: str, *, arguments: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Import a reward function.

    Args:
        spec: `module:function` (the working directory is searched too), or `file.py:function`.
        arguments: Settings. A class is made with them; a function that takes `completions` has them bound; any
            other function is called with them and must return the reward function.

    Returns:
        The reward function.

    Raises:
        RewardError: No such file, module or function, an error while importing, arguments that do not fit, or
            something that cannot be called.

    Example:
        >>> reward = load_reward("rlhf.rewards:exact_match", arguments={"ignore_case": True})
        >>> reward(completions=["Paris"], answer=["paris"])
        [1.0]
    """
    place, separator, attribute = spec.rpartition(":")
    if not separator or not place or not attribute:
        raise RewardError(
            "not the name of a reward function",
            got=spec,
            expected="module:function or path/to/file.py:function",
            remedy="The rewards that ship are in rlhf.rewards, for instance rlhf.rewards:gsm8k_strict.",
        )
    module = _import_file(Path(place).expanduser()) if place.endswith(".py") else _import_module(place)
    reward = module
    for part in attribute.split("."):
        reward = _attribute(reward, part, place)
    return _bind(reward, dict(arguments or {}), spec)


def _import_module(name: str) -> ModuleType:
    # A console script does not have the working directory on its path, but that is where a user's module lies.
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RewardError(
            f"cannot import the module: {type(error).__name__}: {error}",
            where=name,
            remedy="Give an importable module, or a file as path/to/file.py:function.",
        ) from error
    finally:
        if added:
            sys.path.remove(here)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(
            "no such reward file", where=str(path), remedy="The path is relative to the working directory."
        )
    name = f"rlhf_reward_file_{sha256(str(path.resolve()).encode()).hexdigest()[:12]}_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # pickling and dataclasses look a module up by its name
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise RewardError(f"cannot import the file: {type(error).__name__}: {error}", where=str(path)) from error
    return module


def _attribute(owner: Any, name: str, place: str) -> Any:
    if hasattr(owner, name):
        return getattr(owner, name)
    known = [known for known in dir(owner) if not known.startswith("_") and callable(getattr(owner, known))]
    nearest = get_close_matches(name, known, n=1)
    remedy = f"Did you mean {nearest[0]!r}?" if nearest else f"There are: {', '.join(known) or 'none'}."
    raise RewardError(f"there is no {name!r}", where=place, remedy=remedy)


def _bind(reward: Any, arguments: dict[str, Any], spec: str) -> Callable[..., Any]:
    try:
        if inspect.isclass(reward):
            reward = reward(**arguments)
        elif arguments and "completions" in inspect.signature(reward).parameters:
            _check_settings(reward, arguments)
            reward = functools.partial(reward, **arguments)
        elif arguments:
            reward = reward(**arguments)
    except (TypeError, ValueError) as error:
        raise RewardError(f"cannot be made: {error}", where=spec, got=arguments) from error
    if not callable(reward):
        raise RewardError("is no function", where=spec, got=type(reward).__name__, expected="a reward function")
    return reward


def _check_settings(reward: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Raise `TypeError` for a setting that only the catch-all `**columns` would take: nobody would read it."""
    known = [name for name, one in inspect.signature(reward).parameters.items() if one.kind is not one.VAR_KEYWORD]
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise TypeError(f"{unknown[0]!r} is no setting of it; it has {', '.join(known)}")
