"""Finding a reward function by name: `module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from rlhf.errors import RewardError
from rlhf.importing import import_named


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
    reward = import_named(
        spec,
        kind="reward function",
        remedy="The rewards that ship are in rlhf.rewards, for instance rlhf.rewards:gsm8k_strict.",
        error=RewardError,
    )
    return _bind(reward, dict(arguments or {}), spec)


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
