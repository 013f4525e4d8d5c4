"""Errors for people: what went wrong, where, what was found, what was expected, how to mend it.

Every error a user can cause derives from `UserError`, hence from `ValueError`. The command line prints
it without a traceback and exits with code 2. Our own invariants use `assert` instead.
"""

from __future__ import annotations

LONGEST_VALUE = 200
"""Characters of a found value that a message shows."""

_ABSENT = object()


class UserError(ValueError):
    """A mistake in the input, told in one sentence with its remedy.

    Args:
        what: What is wrong, as a sentence without its full stop.
        where: File and line, config path, or step of the run.
        got: The value that was found; long ones are cut in the message.
        expected: What would have been accepted.
        remedy: What the user can do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = _ABSENT,
        expected: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.remedy = what, where, expected, remedy
        parts = [f"{where}: {what}" if where else what]
        if got is not _ABSENT:
            parts.append(f"got {_shorten(got)}")
        if expected is not None:
            parts.append(f"expected {expected}")
        message = "; ".join(parts)
        super().__init__(f"{message}. {remedy}" if remedy else message)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


class ConfigError(UserError):
    """A configuration file, override or combination of settings that cannot be used."""


class DataError(UserError):
    """A data file or record that cannot be read as what it should be."""


class RewardError(UserError):
    """A reward function that failed or returned something that is not one score per completion."""


class ModelError(UserError):
    """A model or tokenizer that cannot be loaded or lacks what the run needs."""


class TrainingError(UserError):
    """A run that cannot go on, such as a loss that is not finite."""
