"""Stopping a run where it can go on from: after an iteration, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Turns the first Ctrl-C, or a scheduler's SIGTERM, into a request; the second one acts at once.

    Attributes:
        requested: Whether the run should stop after this iteration.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        """Nothing is listened to yet.

        Args:
            say: Prints a sentence.
        """
        self.requested = False
        self._say, self._signal = say, int(signal.SIGINT)
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take over the signals; only a main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def leave(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def act(self) -> NoReturn:
        """Stop as the signal would have stopped the program."""
        if self._signal == signal.SIGTERM:
            raise SystemExit(128 + self._signal)
        raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = number
        if self.requested:
            self.leave()
            self.act()
        self.requested = True
        self._say("stopping after this iteration, with a checkpoint; once more stops at once, without")
