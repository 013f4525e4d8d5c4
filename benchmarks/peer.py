"""A peer in a process of its own that takes turns with ours.

It prints `STEP {json}` after each step and `READY` when it waits; a line on its standard input lets it make the next.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path


class Peer:
    """A running peer.

    Args:
        command: Starts it.
        folder: Where its standard error is written, to be shown if it stops.
        environment: Its variables; None inherits ours.
    """

    def __init__(self, command: Sequence[str], folder: Path, *, environment: Mapping[str, str] | None = None) -> None:
        self._log = (folder / "peer.log").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._read_until_ready()

    def step(self) -> dict[str, float]:
        """Let it make one step; what it tells of it."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._read_until_ready()

    def stop(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def _read_until_ready(self) -> dict[str, float]:
        assert self._process.stdout is not None
        told: dict[str, float] = {}
        for line in self._process.stdout:
            if line.startswith("STEP "):
                told = json.loads(line.removeprefix("STEP "))
            if line.strip() == "READY":
                return told
        self._log.seek(0)
        sys.exit(f"the peer stopped:\n{self._log.read()[-3000:]}")
