"""From a file's columns to ours: renaming, columns derived by Jinja, texts wrapped into chat messages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from rlhf.data.dialogues import split_dialogue
from rlhf.data.records import Text, check_text, is_chat, read_text
from rlhf.data.settings import DataConfig
from rlhf.errors import ConfigError, DataError

Derivation = Callable[..., Any]


def make_mapping(data: DataConfig) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return the function that turns a row's columns into ours, as `columns` and `derive` say.

    Derivations see the row as the file has it, not each other, so their order does not matter.

    Raises:
        ConfigError: A name is both renamed and derived, or a template is not Jinja.
    """
    both = sorted(set(data.columns) & set(data.derive))
    if both:
        raise ConfigError(
            f"{both[0]!r} stands in both `columns` and `derive`", where="data", remedy="Remove one of them."
        )
    derivations = {name: _compile(name, source) for name, source in data.derive.items()} if data.derive else {}

    def map_row(values: dict[str, Any]) -> dict[str, Any]:
        renamed = set(data.columns.values())
        mapped = {name: value for name, value in values.items() if name not in renamed}
        mapped.update((ours, _column(values, ours, theirs)) for ours, theirs in data.columns.items())
        mapped.update((name, _derive(name, derivation, values)) for name, derivation in derivations.items())
        return mapped

    return map_row


def _column(values: dict[str, Any], ours: str, theirs: str) -> Any:
    if theirs in values:
        return values[theirs]
    nearest = get_close_matches(theirs, values, n=1)
    hint = f"Did you mean {nearest[0]!r}?" if nearest else None
    raise DataError(f"{ours}: there is no column {theirs!r}", expected=f"one of {', '.join(values)}", remedy=hint)


def _compile(name: str, source: str) -> Derivation:
    # Imported here: only a config with `derive` needs it. It comes with transformers, whose chat templates are Jinja.
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters.update(from_json=json.loads, log=math.log, logit=_logit, dialogue=split_dialogue)
    try:
        if "{{" in source or "{%" in source:
            return environment.from_string(source).render
        return environment.compile_expression(source, undefined_to_none=False)
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"not a Jinja template: {error.message}", where=f"data.derive.{name}", got=source) from error


def _logit(probability: float) -> float:
    """log(p / (1 - p)): probabilities near 0 or 1 become comparable differences."""
    return math.log(probability) - math.log1p(-probability)


def _derive(name: str, derivation: Derivation, values: dict[str, Any]) -> Any:
    import jinja2

    try:
        derived = derivation(**values)
    except Exception as error:  # a template may call anything on the row's values, and raise what that raises
        raise DataError(f"{name}: cannot be derived: {error}", got=sorted(values)) from error
    if isinstance(derived, jinja2.Undefined):
        raise DataError(f"{name}: cannot be derived: {derived._undefined_message}", got=sorted(values))
    return derived


# --- fields -------------------------------------------------------------------------------------------------------


def field_of(values: dict[str, Any], name: str) -> Any:
    """Return a column that must be there.

    Raises:
        DataError: It is missing or null.
    """
    if values.get(name) is not None:
        return values[name]
    state = "is null" if name in values else "is missing"
    remedy = f"Name the file's column: `columns: {{{name}: ...}}`." if name not in values else None
    raise DataError(
        f"{name}: {state}", expected=f"a column {name!r} among {', '.join(values) or 'no columns'}", remedy=remedy
    )


def read_prompt_field(value: Any, data: DataConfig, *, name: str = "prompt") -> Text:
    """Turn a field into a prompt, wrapped into chat messages where `chat` and `system` ask for it."""
    prompt = read_text(value, name)
    if data.chat and not is_chat(prompt):
        check_text(prompt, name)
        prompt = [{"role": "user", "content": prompt}]
    if data.system is None:
        return prompt
    if not is_chat(prompt):
        raise DataError(
            f"{name}: a string has no room for a system message", remedy="Set `chat: true`, or unset `system`."
        )
    if any(message["role"] == "system" for message in prompt):
        return prompt
    return [{"role": "system", "content": data.system}, *prompt]


def read_completion_field(value: Any, prompt: Text, *, name: str = "completion") -> Text:
    """Turn a field into a completion; after a chat prompt, a string is what the assistant says."""
    completion = read_text(value, name)
    if is_chat(prompt) and not is_chat(completion):
        return [{"role": "assistant", "content": completion}]
    return completion
