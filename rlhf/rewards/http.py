"""A reward that is asked for over HTTP: a reward model on another machine, or a judge behind a service.

    POST <url>   {"prompts": [...], "completions": [...], "columns": {"answer": [...]}}
    answer       {"scores": [...]}                                one number, or null, per completion

What does not answer, or answers 408, 425, 429 or 5xx, is asked again; every other failure stops the run with the
address, the attempts and what came back. A score is never made up.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import Any

from rlhf.errors import RewardError
from rlhf.rewards.protocol import Text

RETRIED = (408, 425, 429, 500, 502, 503, 504)
"""Status codes that may go away by themselves."""
LONGEST_WAIT = 60.0
"""Seconds between two attempts at most."""
_NOT_SENT = ("completion_ids", "trainer_state", "log_extra", "log_metric")


class HttpReward:
    """A reward function behind an address; in a config, `function: rlhf.rewards:HttpReward`.

    Args:
        url: Where to POST to, http or https. Redirects are refused: following one would drop the body.
        timeout: Seconds to wait for a connection, and for the next bytes of an answer.
        retries: Further attempts after the first.
        backoff: Seconds before the second attempt; doubled for each further one, 60 at most. A longer Retry-After of
            the server is kept to.
        batch_size: Completions in one request; None sends all at once.
        columns: Which of the data's other columns are sent; None sends all.
        token_variable: Environment variable that holds a bearer token; its value appears in no config and no message.
        name: For the metrics.

    Raises:
        RewardError: Not an http address, a setting out of range, or an environment variable that is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 1.0,
        batch_size: int | None = None,
        columns: Sequence[str] | None = None,
        token_variable: str | None = None,
        name: str = "http",
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise RewardError("not an http address", where="HttpReward", got=url, expected="http://... or https://...")
        for setting, value, least in (("timeout", timeout, 1e-3), ("retries", retries, 0), ("backoff", backoff, 0)):
            if not value >= least:
                raise RewardError(f"{setting} is too small", where="HttpReward", got=value, expected=f">= {least:g}")
        if batch_size is not None and batch_size < 1:
            raise RewardError("batch_size is too small", where="HttpReward", got=batch_size, expected=">= 1")
        self.url, self.timeout, self.retries, self.backoff = url, timeout, retries, backoff
        self.batch_size, self.columns = batch_size, columns
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if token_variable is not None:
            if token_variable not in os.environ:
                raise RewardError("the environment variable is not set", where="token_variable", got=token_variable)
            self._headers["Authorization"] = f"Bearer {os.environ[token_variable]}"
        self._opener = urllib.request.build_opener(_RefuseRedirects)
        self.__name__ = name

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        """Ask for scores.

        Args:
            prompts: N prompts, strings or chat messages.
            completions: N completions.
            columns: The data's other columns, N values each.

        Returns:
            N scores; None where the service said null.

        Raises:
            RewardError: The service failed in all attempts, refused, or answered with anything but N finite numbers.
        """
        sent = self._select(columns)
        size = self.batch_size or max(len(completions), 1)
        scores: list[float | None] = []
        for start in range(0, len(completions), size):
            part = slice(start, start + size)
            body = {
                "prompts": list(prompts[part]),
                "completions": list(completions[part]),
                "columns": {name: list(values[part]) for name, values in sent.items()},
            }
            scores += self._read(self._post(self._encode(body)), expected=len(completions[part]))
        return scores

    def _select(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        if self.columns is None:
            return {name: values for name, values in columns.items() if name not in _NOT_SENT}
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise RewardError(
                f"the data has no column {missing[0]!r} to send",
                where=self.url,
                expected=f"one of {', '.join(sorted(set(columns) - set(_NOT_SENT))) or 'no columns'}",
            )
        return {name: columns[name] for name in self.columns}

    def _encode(self, body: Mapping[str, Any]) -> bytes:
        try:
            return json.dumps(body, allow_nan=False).encode()
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"the request cannot be written as JSON: {error}",
                where=self.url,
                remedy="Name the columns to send in `columns`; [] sends none.",
            ) from error

    def _post(self, body: bytes) -> bytes:
        for attempt in range(self.retries + 1):
            try:
                request = urllib.request.Request(self.url, data=body, headers=self._headers, method="POST")
                with self._opener.open(request, timeout=self.timeout) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    said = _preview(error.read())
                if error.code not in RETRIED:
                    raise self._failure(f"status {error.code} {error.reason}", attempt + 1, said) from error
                failure, wait = f"status {error.code} {error.reason}", _retry_after(error.headers)
                cause: Exception = error
            except (OSError, HTTPException) as error:  # refused, reset, unknown host, timed out, cut short
                failure, said, wait, cause = _describe(error, self.timeout), None, 0.0, error
            except ValueError as error:  # a header or an address that http.client refuses
                raise self._failure(str(error), attempt + 1, None) from error
            if attempt == self.retries:
                raise self._failure(failure, attempt + 1, said) from cause
            time.sleep(min(max(self.backoff * 2**attempt, wait), LONGEST_WAIT))
        raise AssertionError("the loop returns or raises")

    def _read(self, answer: bytes, *, expected: int) -> list[float | None]:
        try:
            document = json.loads(answer)
        except ValueError as error:
            raise self._bad_answer("is no JSON", answer) from error
        scores = document.get("scores") if isinstance(document, dict) else None
        if not isinstance(scores, list):
            raise self._bad_answer("has no list `scores`", answer)
        if len(scores) != expected:
            raise self._bad_answer(f"has {len(scores)} scores for {expected} completions", answer)
        for index, score in enumerate(scores):
            number = isinstance(score, int | float) and not isinstance(score, bool)
            if score is not None and not (number and abs(score) <= 3.4e38):  # NaN compares false
                raise self._bad_answer(f"has the score {score!r} for completion {index}, no finite number", answer)
        return scores

    def _failure(self, reason: str, attempts: int, said: str | None) -> RewardError:
        return RewardError(
            f"the reward service failed: {reason} ({attempts} of {self.retries + 1} attempts)",
            where=self.url,
            **({} if said is None else {"got": said}),
            remedy="Look at the service; `timeout`, `retries` and `batch_size` say how patiently it is asked.",
        )

    def _bad_answer(self, reason: str, answer: bytes) -> RewardError:
        return RewardError(
            f"the reward service's answer {reason}",
            where=self.url,
            got=_preview(answer),
            expected='{"scores": [one finite number or null per completion]}',
        )


class _RefuseRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        """Follow nothing: the redirect then counts as the failure it is."""
        return


def _retry_after(headers: Mapping[str, str] | None) -> float:
    """Seconds the server asks to wait; its other form, a date, is left to our own backoff."""
    value = (headers or {}).get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


def _describe(error: OSError | HTTPException, timeout: float) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout:g} s"
    return f"no connection: {reason}"


def _preview(answer: bytes) -> str:
    text = answer[:400].decode(errors="replace")
    return text if len(text) <= 200 else text[:200] + "..."
