"""What a reward function is, and how one is asked: TRL's signature, every answer checked.

A reward function gets lists with one entry per completion, by name, and returns one number per completion, or None
where it has nothing to say:

    def reward(prompts, completions, answer, **columns) -> list[float | None]

In place of a number a completion may have rewards per token, a list with one for each of its `completion_ids`, or per
step, a mapping {token number: reward}; its score is then their sum.

`completions` are strings after string prompts and `[{"role": "assistant", "content": ...}]` after chat prompts. Each
further column of the data arrives by its name. Functions written for TRL run unchanged: `completion_ids`,
`trainer_state`, `log_extra` and `log_metric` are offered too, and coroutine functions are awaited.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from rlhf.errors import RewardError
from rlhf.rewards.token_scores import is_per_token, read_token_scores

Text: TypeAlias = str | list[dict[str, Any]]


@runtime_checkable
class RewardFunction(Protocol):
    """Anything that can be called with prompts, completions and columns and gives one score per completion."""

    def __call__(
        self, prompts: list[Any], completions: list[Any], **columns: Any
    ) -> Sequence[float | Sequence[float] | Mapping[int, float] | None]:
        """Score completions; see the module's docstring."""
        ...


@dataclass
class RewardLog:
    """What reward functions reported through TRL's `log_metric` and `log_extra` while they scored."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    """Name -> one value per call."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """Name -> one value per completion, for the samples file."""
    token_scores: list[list[float]] | None = None
    """Of the last call: per completion one number per token, where the function gave rewards per token or step."""

    def log_metric(self, name: str, value: float) -> None:
        """Keep a number for the metrics."""
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: list[Any]) -> None:
        """Keep a value per completion."""
        self.columns.setdefault(column, []).extend(values)


def text_of(completion: Text) -> str:
    """Return what a completion says: the string, or the contents of its messages.

    Example:
        >>> text_of([{"role": "assistant", "content": "hello"}])
        'hello'
    """
    if isinstance(completion, str):
        return completion
    return "\n".join(str(message["content"]) for message in completion)


def reward_name(reward: Callable[..., Any]) -> str:
    """Return a name for metrics and messages: the function's own, or its class's."""
    inner = getattr(reward, "func", reward)  # functools.partial hides its function there
    return getattr(inner, "__name__", type(inner).__name__)


def score_completions(
    reward: Callable[..., Any],
    *,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    columns: Mapping[str, Sequence[Any]] | None = None,
    completion_ids: Sequence[Sequence[int]] | None = None,
    name: str | None = None,
    log: RewardLog | None = None,
    extras: Mapping[str, Any] | None = None,
    allow_missing: bool = False,
) -> Tensor:
    """Ask a reward function for one score per completion and check what it returns.

    Args:
        reward: The function. It gets those of the arguments that it names, or all if it takes `**columns`.
        prompts: N prompts.
        completions: N completions.
        columns: Further columns of the data, N values each.
        completion_ids: N lists of token ids, for rewards that count tokens.
        name: What to call the function in errors; None takes its own name.
        log: Collects what the function logs; None discards it.
        extras: Further arguments passed as they are, such as TRL's `trainer_state`.
        allow_missing: Return NaN where the function returns None, for callers that mask such rows or have other
            rewards for them. Otherwise None is an error: a completion without a score cannot be learnt from.

    Returns:
        [N] float32.

    Raises:
        RewardError: The function raises, needs a column that is missing, or returns anything but one finite number
            (or allowed None) per completion; the error names the function, the index and the completion.
    """
    name = name or reward_name(reward)
    if not len(prompts) == len(completions):
        raise RewardError("as many prompts as completions are needed", where=name, got=(len(prompts), len(completions)))
    log = log if log is not None else RewardLog()
    available: dict[str, Any] = {**(columns or {})}
    available |= {"log_extra": log.log_extra, "log_metric": log.log_metric, "trainer_state": None, **(extras or {})}
    available |= {"prompts": list(prompts), "completions": list(completions)}
    if completion_ids is not None:
        available["completion_ids"] = [list(ids) for ids in completion_ids]
    returned = _call(reward, _choose_arguments(reward, available, name), name)
    values = _to_list(returned, name)
    log.token_scores = None
    if len(values) == len(completions) and is_per_token(values):
        log.token_scores = read_token_scores(values, completion_ids, name=name)
        values = [math.fsum(row) for row in log.token_scores]
    scores = _read_scores(values, completions, name)
    missing = [index for index, score in enumerate(scores) if score is None]
    if missing and not allow_missing:
        everyone = "every completion" if len(missing) == len(scores) else f"completion {missing[0]}"
        raise RewardError(
            f"no score for {everyone}: the function returned None ({len(missing)} of {len(scores)})",
            where=name,
            got=_preview(completions[missing[0]]),
            remedy="Return a number, or combine it with a reward that scores every completion.",
        )
    return torch.tensor([math.nan if score is None else score for score in scores], dtype=torch.float32)


# --- calling ------------------------------------------------------------------------------------------------------


def _choose_arguments(reward: Callable[..., Any], available: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # builtins and some compiled callables have no signature
        return available
    required = [
        parameter.name
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and parameter.name not in available
    ]
    if required:
        raise RewardError(
            f"the function needs {required[0]!r}, which the data does not have",
            where=name,
            expected=f"one of {', '.join(sorted(available))}",
            remedy=f"Name the data's column: `columns: {{{required[0]}: ...}}`.",
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return available
    named = {parameter.name for parameter in parameters}
    return {key: value for key, value in available.items() if key in named}


def _call(reward: Callable[..., Any], arguments: dict[str, Any], name: str) -> Any:
    try:
        returned = reward(**arguments)
        return _await(returned) if inspect.isawaitable(returned) else returned
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"the reward function raised {type(error).__name__}: {error}",
            where=place_of(error, name),
            remedy="Mend the function; scores are never made up for it.",
        ) from error


def _await(awaitable: Any) -> Any:
    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    # Inside a running loop (a notebook) a second one needs a thread of its own.
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(asyncio.run, wait()).result()


def place_of(error: BaseException, name: str) -> str:
    """A function's name with the file and line where it raised."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return name
    return f"{name} ({traceback.tb_frame.f_code.co_filename}, line {traceback.tb_lineno})"


# --- checking -----------------------------------------------------------------------------------------------------


def _read_scores(values: list[Any], completions: Sequence[Text], name: str) -> list[float | None]:
    if len(values) != len(completions):
        raise RewardError(
            "wrong number of scores", where=name, got=len(values), expected=f"{len(completions)}, one per completion"
        )
    return [_read_score(value, index, completions[index], name) for index, value in enumerate(values)]


def _to_list(returned: Any, name: str) -> list[Any]:
    # Tensors and numpy arrays; `tolist` also takes them off the accelerator in one copy.
    shape = getattr(returned, "shape", None)
    if shape is not None and hasattr(returned, "tolist"):
        if len(shape) != 1:
            raise RewardError(
                "scores have the wrong shape",
                where=name,
                got=str(tuple(shape)),
                expected="[N], one score per completion",
                remedy="A column of scores [N, 1] becomes [N] by `.squeeze(-1)`.",
            )
        return returned.tolist()
    if isinstance(returned, list | tuple):
        return list(returned)
    raise RewardError(
        "the reward function returned no list of scores", where=name, got=type(returned).__name__, expected="a list"
    )


def _read_score(value: Any, index: int, completion: Text, name: str) -> float | None:
    if value is None:
        return None
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    where = f"{name}, completion {index} ({_preview(completion)})"
    if not isinstance(value, numbers.Real):
        raise RewardError("a score is no number", where=where, got=value, expected="a number")
    score = float(value)
    if math.isnan(score):
        remedy = "Return None where the reward does not apply."
        raise RewardError("a score is NaN", where=where, expected="a finite number", remedy=remedy)
    if not abs(score) <= torch.finfo(torch.float32).max:
        raise RewardError("a score is not finite in float32", where=where, got=score, expected="a finite number")
    return score


def _preview(completion: Text) -> str:
    words = text_of(completion)
    return repr(words if len(words) <= 60 else words[:60] + "...")
