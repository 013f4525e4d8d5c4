"""From rows to records: prompts, demonstrations and rankings, or one error that lists every bad row.

The accepted columns are TRL's:

- prompts: `{prompt, ...}`; the other columns are passed on to the reward function
- demonstrations: `{prompt, completion}`, `{messages}` or plain `{text}`
- rankings: `{prompt, completions, ranks}`, `{prompt, completions, scores}`, `{prompt, completions}` with
  `order: best_first`, pairs `{prompt, chosen, rejected}`, and pairs without a prompt, whose `chosen` and `rejected` are
  whole dialogues that begin alike
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from rlhf.data.mapping import field_of, make_mapping, read_completion_field, read_prompt_field
from rlhf.data.rankings import read_ranking
from rlhf.data.records import Demonstration, Prompt, Ranking, check_text, is_chat, read_text
from rlhf.data.settings import DataConfig
from rlhf.data.sources import read_rows
from rlhf.errors import ConfigError, DataError

__all__ = ["DataConfig", "load_demonstrations", "load_prompts", "load_rankings", "split_holdout"]

Record = TypeVar("Record", Prompt, Demonstration, Ranking)
Values = dict[str, Any]

SHOWN_PROBLEMS = 5
# A reward function is called with these names, so no column of the data may have them.
_RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


def load_prompts(data: DataConfig) -> list[Prompt]:
    """Read prompts; every other column of a row is passed on, None where a row lacks a column that others have.

    Raises:
        DataError: The source cannot be read, or rows are bad: file, line, field and reason of the first few.
        ConfigError: Settings that contradict each other.
    """
    prompts = _read(data, lambda values, where: [_read_prompt(values, where, data)])
    names = list(dict.fromkeys(name for prompt in prompts for name in prompt.columns))
    if data.keep is not None:
        _check_kept(data.keep, names)
        names = data.keep
    taken = [name for name in names if name in _RESERVED]
    if taken:
        raise DataError(
            f"the column {taken[0]!r} has a name that reward functions are called with",
            where=data.path,
            remedy="Rename it in `columns`, or list the columns to pass on in `keep`.",
        )
    return [
        Prompt(prompt.prompt, {name: prompt.columns.get(name) for name in names}, prompt.source) for prompt in prompts
    ]


def load_demonstrations(data: DataConfig) -> list[Demonstration]:
    """Read demonstrations: `{prompt, completion}`, `{messages}` or plain `{text}`.

    Of `messages`, the last assistant turn is the completion and what precedes it the prompt; with
    `assistant_turns: all`, every assistant turn gives one demonstration.

    Raises:
        DataError: The source cannot be read, or rows are bad: file, line, field and reason of the first few.
        ConfigError: Settings that contradict each other.
    """
    return _read(data, lambda values, where: _read_demonstrations(values, where, data))


def load_rankings(data: DataConfig) -> list[Ranking]:
    """Read rankings in any of the forms that this module's docstring lists.

    Raises:
        DataError: The source cannot be read, or rows are bad (also a ranking that is one tie, unless `tied` says
            otherwise): file, line, field and reason of the first few.
        ConfigError: Settings that contradict each other.
    """
    rankings = _read(data, lambda values, where: [read_ranking(values, where=where, data=data)])
    if data.tied != "drop":
        return rankings
    kept = [ranking for ranking in rankings if not ranking.tied]
    if not kept:
        raise DataError(f"each of the {len(rankings)} rankings is one tie", where=data.path)
    if len(kept) < len(rankings):
        warnings.warn(f"{data.path}: {len(rankings) - len(kept)} rankings are one tie and were dropped", stacklevel=2)
    return kept


# --- rows ---------------------------------------------------------------------------------------------------------


def _read(data: DataConfig, build: Callable[[Values, str], list[Record]]) -> list[Record]:
    map_row = make_mapping(data)
    records: list[Record] = []
    problems: list[tuple[str, DataError]] = []
    number_of_rows = 0
    for row in read_rows(data):
        number_of_rows += 1
        try:
            if row.problem is not None:
                raise row.problem
            records += build(map_row(row.values), row.where)
        except DataError as problem:
            problems.append((row.where, problem))
    if not number_of_rows:
        if data.offset == 0:
            raise DataError("there is no row", where=data.path, expected="one or more")
        raise DataError("no row is left after `offset`", where=data.path, got=data.offset, remedy="Lower `offset`.")
    if problems and (data.bad_rows == "refuse" or not records):
        raise _one_error(problems, number_of_rows, data)
    if problems:
        warnings.warn(f"dropped: {_one_error(problems, number_of_rows, data)}", stacklevel=3)
    return records


def _one_error(problems: Sequence[tuple[str, DataError]], number_of_rows: int, data: DataConfig) -> DataError:
    if len(problems) == 1:
        where, problem = problems[0]
        return DataError(str(problem), where=where)
    shown = [
        f"{where.removeprefix(data.path + ', ')}: {problem}".rstrip(".") for where, problem in problems[:SHOWN_PROBLEMS]
    ]
    more = f"\n  ... and {len(problems) - len(shown)} more" if len(problems) > len(shown) else ""
    return DataError(
        f"{len(problems)} of {number_of_rows} rows are bad:\n  " + "\n  ".join(shown) + more,
        where=data.path,
        remedy=None if data.bad_rows == "drop" else "Mend them, or set `bad_rows: drop` to leave them out.",
    )


def _read_prompt(values: Values, where: str, data: DataConfig) -> Prompt:
    # A row of a plain text file has nothing but its text, which then is the prompt.
    name = "text" if set(values) == {"text"} else "prompt"
    prompt = read_prompt_field(field_of(values, name), data, name=name)
    return Prompt(prompt, {key: value for key, value in values.items() if key != name}, where)


def _read_demonstrations(values: Values, where: str, data: DataConfig) -> list[Demonstration]:
    if "completion" not in values and "messages" in values:
        return _demonstrations_from_messages(values["messages"], where, data)
    if "completion" not in values and set(values) == {"text"}:
        return [Demonstration("", read_text(values["text"], "text"), where)]
    if "completion" not in values:
        raise DataError(
            "completion: is missing",
            expected=f"prompt and completion, or messages, or text alone, among {', '.join(values) or 'no columns'}",
            remedy="`columns` gives a file's columns our names.",
        )
    prompt = read_prompt_field(field_of(values, "prompt"), data)
    return [Demonstration(prompt, read_completion_field(field_of(values, "completion"), prompt), where)]


def _demonstrations_from_messages(value: Any, where: str, data: DataConfig) -> list[Demonstration]:
    messages = read_prompt_field(value, data, name="messages")
    check_text(messages, "messages")
    if not is_chat(messages):
        raise DataError("messages: is a string", got=messages, expected="a list of chat messages")
    if messages[-1]["role"] != "assistant":
        raise DataError(
            "messages: the last turn is not the assistant's", got=messages[-1]["role"], expected="assistant"
        )
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if data.assistant_turns == "last":
        turns = turns[-1:]
    return [Demonstration(messages[:turn], [messages[turn]], where) for turn in turns]


def _check_kept(keep: Sequence[str], names: Sequence[str]) -> None:
    missing = [name for name in keep if name not in names]
    if missing:
        raise ConfigError(
            f"there is no column {missing[0]!r} to keep", where="data.keep", expected=", ".join(names) or "no columns"
        )


# --- holding out --------------------------------------------------------------------------------------------------


def split_holdout(
    records: Sequence[Record], *, fraction: float | None = None, count: int | None = None, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Split records into a part to train on and a part held out; both keep the records' order.

    Records of one prompt stay on one side, or the held-out part would measure memory: so with repeated prompts the
    held-out part may be a few records smaller than asked for.

    Args:
        records: Prompts, demonstrations or rankings.
        fraction: Share to hold out, in (0, 1); give either this or `count`.
        count: How many records to hold out.
        seed: Decides which; the same seed holds out the same records on every machine.

    Returns:
        The records to train on, and those held out.

    Raises:
        ConfigError: Not exactly one of `fraction` and `count`, or one that leaves a side empty.
    """
    if (fraction is None) == (count is None):
        raise ConfigError("give either `fraction` or `count`", where="held_out", got=(fraction, count))
    wanted = count if count is not None else round((fraction or 0.0) * len(records))
    if not 0 < wanted < len(records):
        raise ConfigError(
            f"holding out {wanted} of {len(records)} records leaves one side empty",
            where="held_out",
            remedy="Hold out another number, or give held-out records of their own (held_out_data).",
        )
    groups: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(repr(record.prompt), []).append(index)
    shuffled = list(groups.values())
    random.Random(seed).shuffle(shuffled)
    held_out: set[int] = set()
    for group in shuffled:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if not held_out:
        raise ConfigError(f"each of the {len(groups)} prompts has more than {wanted} records", where="held_out")
    train = [record for index, record in enumerate(records) if index not in held_out]
    return train, [records[index] for index in sorted(held_out)]
