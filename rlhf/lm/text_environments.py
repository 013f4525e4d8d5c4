"""Environments that talk: a conversation as an episode, in the shape of gymnasium's `reset` and `step`.

An environment is any object with the two methods of `TextEnvironment`; it needs nothing from this package. Those that
ship: `rlhf.lm.guessing:GuessingGame`, and `classic_rl.frozen_lake_words:FrozenLakeInWords`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from pydantic import Field

from rlhf.config import Config
from rlhf.data.records import Demonstration, Message
from rlhf.errors import ConfigError, RewardError, UserError
from rlhf.importing import import_named
from rlhf.lm.prompt_stream import mix_seed
from rlhf.rewards.protocol import place_of

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
    """`file.py:Class` or `module:Class` (the working directory is searched too), or a function that makes one."""
    arguments: dict[str, Any] = {}
    """Given to it."""
    demonstrations: int = Field(512, ge=1)
    """Episodes played by the environment's `demonstrate()` for the fine-tuning before; not read without `sft`."""


def make_factory(config: EnvironmentConfig) -> EnvironmentFactory:
    """A function that makes environments, each an object of its own.

    Raises:
        ConfigError: No such file, module or name, arguments that do not fit, or something that is no environment.
    """
    maker = import_named(
        config.function,
        kind="text environment",
        remedy="Those that ship: rlhf.lm.guessing:GuessingGame, classic_rl.frozen_lake_words:FrozenLakeInWords.",
        error=ConfigError,
    )

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


def first_messages(environment: TextEnvironment, *, seed: int) -> list[Message]:
    """Reset an environment.

    Raises:
        RewardError: It failed, or returned something other than messages.
    """
    return _read_messages(_call(environment.reset, seed=seed), f"{type(environment).__name__}.reset")


def take_step(environment: TextEnvironment, said: str) -> TextStep:
    """One step, refused where it breaks the protocol: it would show as a strange loss much later.

    Raises:
        RewardError: The environment failed, or returned something other than `TextEnvironment.step` tells.
    """
    where = f"{type(environment).__name__}.step"
    answer = _call(environment.step, said)
    if not isinstance(answer, tuple) or len(answer) != 4:
        raise RewardError(
            "a step must return four things",
            where=where,
            got=answer,
            expected="messages, reward, terminated, truncated",
        )
    messages, reward, terminated, truncated = answer
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        raise RewardError("the reward is no finite number", where=where, got=reward)
    if not messages and not terminated:
        raise RewardError(
            "the episode goes on, but the environment says nothing", where=where, expected="at least one message"
        )
    # An episode that terminated in the very turn of a time limit has nothing to bootstrap from.
    return _read_messages(messages, where), float(reward), bool(terminated), bool(truncated) and not terminated


def _call(method: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """What a method of a user's environment returns; what it raises, told with file and line."""
    try:
        return method(*arguments, **settings)
    except UserError:
        raise
    except Exception as error:
        raise RewardError(
            f"the environment raised {type(error).__name__}: {error}",
            where=place_of(error, method.__qualname__),
            remedy="Mend the environment; `--traceback` shows where it was called.",
        ) from error


def _read_messages(said: Any, where: str) -> list[Message]:
    expected = 'a list of messages, such as [{"role": "user", "content": "your turn"}]'
    if not isinstance(said, list | tuple):
        raise RewardError("the environment says no messages", where=where, got=said, expected=expected)
    for message in said:
        known = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not known or not isinstance(message.get("content"), str):
            raise RewardError("not a message", where=where, got=message, expected=expected)
    return list(said)


def play_demonstrations(factory: EnvironmentFactory, *, episodes: int, seed: int) -> list[Demonstration]:
    """Let an environment show how it is played: one demonstration per turn, with all that was said before.

    Args:
        factory: Makes an environment that has `demonstrate() -> str`, what a player might say now.
        episodes: How many are played.
        seed: Of their start states.

    Raises:
        ConfigError: The environment does not demonstrate.
        RewardError: It failed or broke its protocol.
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
        messages = first_messages(environment, seed=mix_seed("demonstration", seed, episode))
        over = False
        while not over:
            said = _call(environment.demonstrate)
            turn: Message = {"role": "assistant", "content": said}
            records.append(Demonstration(prompt=list(messages), completion=[turn]))
            answer, _, terminated, truncated = take_step(environment, said)
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
