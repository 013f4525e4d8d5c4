"""Environments that talk: a conversation as an episode, in the shape of gymnasium's `reset` and `step`.

An environment is any object with the two methods of `TextEnvironment`; it needs nothing from this package. Those that
ship: `rlhf.lm.guessing:GuessingGame`, and `classic_rl.frozen_lake_words:FrozenLakeInWords`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from pydantic import Field

from rlhf.config import Config
from rlhf.data.records import Demonstration, Message
from rlhf.errors import ConfigError
from rlhf.lm.prompt_stream import mix_seed

TextStep = tuple[list[Message], float, bool, bool]
"""What `step` returns: messages, reward, terminated, truncated."""


class TextEnvironment(Protocol):
    """One conversation at a time.

    Terminated means that nothing can follow (won, lost, out of guesses as the rules say): the value of the end is 0.
    Truncated means that somebody stopped looking (a time limit the player does not see): the critic's value stands
    for what would have followed, https://gymnasium.farama.org/tutorials/gymnasium_basics/handling_time_limits/.
    """

    def reset(self, *, seed: int | None = None) -> list[Message]:
        """Begin an episode; equal seeds begin equal ones. Returns the messages before the policy's first turn."""
        ...

    def step(self, completion: str) -> TextStep:
        """Take what the policy said, special tokens left out.

        Returns:
            messages: The environment's answer. At least one message, unless the episode terminated.
            reward: Of this turn.
            terminated: Whether nothing can follow.
            truncated: Whether the episode was stopped although something could follow.
        """
        ...


EnvironmentFactory = Callable[[], TextEnvironment]


class EnvironmentConfig(Config):
    """One environment by name."""

    function: str
    """`module:Class`, or a function that makes one; the working directory is searched too."""
    arguments: dict[str, Any] = {}
    """Given to it."""
    demonstrations: int = Field(512, ge=1)
    """Episodes played by the environment's `demonstrate()` for the fine-tuning before; not read without `sft`."""


def make_factory(config: EnvironmentConfig) -> EnvironmentFactory:
    """A function that makes environments, each an object of its own.

    Raises:
        ConfigError: No such module or name, arguments that do not fit, or something that is no environment.
    """
    module, _, name = config.function.partition(":")
    # A console script does not have the working directory on its path, but that is where a user's module lies.
    here = str(Path.cwd())
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        maker = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"the environment cannot be imported: {error}",
            where="environment.function",
            got=config.function,
            expected="module:Class, such as rlhf.lm.guessing:GuessingGame",
        ) from error
    finally:
        if added:
            sys.path.remove(here)

    def make() -> TextEnvironment:
        try:
            return maker(**config.arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the environment cannot be made: {error}", where="environment.arguments") from error

    first = make()
    missing = [method for method in ("reset", "step") if not callable(getattr(first, method, None))]
    if missing:
        raise ConfigError(
            f"{config.function} has no {' and no '.join(missing)}",
            where="environment.function",
            expected="reset(seed=...) -> messages; step(completion) -> messages, reward, terminated, truncated",
        )
    return make


def play_demonstrations(factory: EnvironmentFactory, *, episodes: int, seed: int) -> list[Demonstration]:
    """Let an environment show how it is played: one demonstration per turn, with all that was said before.

    Args:
        factory: Makes an environment that has `demonstrate() -> str`, what a player might say now.
        episodes: How many are played.
        seed: Of their start states.

    Raises:
        ConfigError: The environment does not demonstrate.
    """
    environment: Any = factory()
    if not callable(getattr(environment, "demonstrate", None)):
        raise ConfigError(
            "the environment has no demonstrate()",
            where="environment",
            got=type(environment).__name__,
            remedy="Remove sft and start from a model that can play already, or add demonstrate() -> str.",
        )
    records: list[Demonstration] = []
    for episode in range(episodes):
        messages: list[Message] = list(environment.reset(seed=mix_seed("demonstration", seed, episode)))
        over = False
        while not over:
            said = environment.demonstrate()
            turn: Message = {"role": "assistant", "content": said}
            records.append(Demonstration(prompt=list(messages), completion=[turn]))
            answer, _, terminated, truncated = environment.step(said)
            messages += [turn, *answer]
            over = terminated or truncated
    return records


def alphabet_of(factory: EnvironmentFactory) -> str:
    """Every character that an environment says or hears, for a character tokenizer.

    Raises:
        ConfigError: It does not tell.
    """
    alphabet = getattr(factory(), "alphabet", None)
    if not isinstance(alphabet, str):
        raise ConfigError(
            "a fresh model takes its characters from the environment, which has no `alphabet`",
            where="model",
            remedy="Give model.path or model.tokenizer, or give the environment an attribute `alphabet`.",
        )
    return alphabet


def characters_of(texts: Sequence[str]) -> str:
    """The distinct characters of some texts, in order.

    >>> characters_of(["no", "on 1"])
    ' 1no'
    """
    return "".join(sorted(set("".join(texts))))
