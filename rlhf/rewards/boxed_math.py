"""Mathematical answers compared by meaning, with math-verify in worker processes that can be killed."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from rlhf.errors import RewardError
from rlhf.rewards.protocol import Text, text_of

Verdict = Literal["correct", "wrong", "unparseable", "gold_unparseable", "timeout", "crashed"]

# sympy takes seconds to import, and more on a busy machine.
_STARTUP_SECONDS = 120.0


class BoxedMath:
    r"""1 where the completion's boxed answer equals the gold answer as mathematics: \frac{1}{2} is 0.5.

    A completion whose answer cannot be parsed, or whose check runs into the time limit, gets its own score and is
    counted apart in `counts`, and as a share of the batch in the metrics; a wrong answer is not the same as a verifier
    that failed. Where the *gold* answer cannot be parsed, the score is None.

    Args:
        timeout: Seconds for one completion, then the worker is killed and started anew.
        extraction: `latex` takes boxes and formulas between dollar signs only, `any` also plain numbers and
            expressions.
        unparseable_score: Score of a completion without an answer that can be parsed.
        timeout_score: Score of a completion whose check was killed; None leaves it without a score.
        workers: Processes that check side by side.

    Raises:
        RewardError: math-verify is not installed, or its worker cannot start.
    """

    def __init__(
        self,
        *,
        timeout: float = 5.0,
        extraction: Literal["latex", "any"] = "latex",
        unparseable_score: float = 0.0,
        timeout_score: float | None = 0.0,
        workers: int = 1,
    ) -> None:
        _require_math_verify()
        if timeout <= 0 or workers < 1:
            raise RewardError("BoxedMath needs a positive timeout and a worker", got=(timeout, workers))
        self.extraction = extraction
        self.scores: dict[str, float | None] = {
            "correct": 1.0,
            "wrong": 0.0,
            "unparseable": unparseable_score,
            "gold_unparseable": None,
            "timeout": timeout_score,
            "crashed": timeout_score,
        }
        self.counts: Counter[str] = Counter()
        """Verdict -> how often, since this reward was made."""
        self.__name__ = "boxed_math"
        self._workers = [_Worker(timeout) for _ in range(workers)]

    def __call__(
        self,
        completions: Sequence[Text],
        answer: Sequence[str],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Score completions against the column `answer`."""
        verdicts = self.judge([text_of(completion) for completion in completions], answer)
        counts = Counter(verdicts)
        self.counts += counts
        if log_metric is not None and verdicts:
            for verdict in ("unparseable", "gold_unparseable", "timeout", "crashed"):
                log_metric(f"boxed_math_{verdict}", counts[verdict] / len(verdicts))
        return [self.scores[verdict] for verdict in verdicts]

    def judge(self, completions: Sequence[str], answer: Sequence[str]) -> list[Verdict]:
        """Return a verdict per completion, in their order."""
        requests = [
            {"gold": str(gold), "completion": completion, "extraction": self.extraction}
            for completion, gold in zip(completions, answer, strict=True)
        ]
        number = len(self._workers)
        with ThreadPoolExecutor(max_workers=number) as pool:
            parts = pool.map(
                lambda index: [self._workers[index].ask(one) for one in requests[index::number]], range(number)
            )
        verdicts: list[Verdict] = ["crashed"] * len(requests)
        for index, part in enumerate(parts):
            verdicts[index::number] = part
        return verdicts

    def close(self) -> None:
        """Stop the workers; they start again when needed."""
        for worker in self._workers:
            worker.stop()


def _require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise RewardError(
            "math-verify is not installed",
            where="BoxedMath",
            remedy="Install it: pip install 'rlhf-toolkit[reasoning]' (or pip install math-verify).",
        )


class _Worker:
    """One `math_worker` process, started when first asked and again after it was killed."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._process: subprocess.Popen[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_timeout": self._timeout, "_process": None}

    def ask(self, request: dict[str, str]) -> Verdict:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            self.stop()
            return "crashed"
        verdict = self._read(process, self._timeout)
        if verdict in ("timeout", "crashed"):
            self.stop()
        return verdict

    def stop(self) -> None:
        if self._process is not None:
            _kill(self._process)
            self._process = None

    def _running(self) -> subprocess.Popen[bytes]:
        # After a fork the pipes would be shared with the parent process; a child starts a worker of its own.
        if self._process is not None and self._process.poll() is None and self._owner == os.getpid():
            return self._process
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf.rewards.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        weakref.finalize(self, _kill, process)
        if self._read(process, _STARTUP_SECONDS) != "ready":
            _kill(process)
            raise RewardError(
                "the math-verify worker does not start",
                where="BoxedMath",
                remedy=f"Run `{sys.executable} -m rlhf.rewards.math_worker` to see why.",
            )
        self._process, self._owner = process, os.getpid()
        return process

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> Any:
        """Return the verdict on the next line, `timeout` after so many seconds, `crashed` where the process ended."""
        assert process.stdout is not None
        descriptor, received, deadline = process.stdout.fileno(), b"", time.monotonic() + seconds
        while not received.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                return "timeout"
            chunk = os.read(descriptor, 65536)
            if not chunk:
                return "crashed"
            received += chunk
        return json.loads(received)["verdict"]


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
