"""Typed configuration: pydantic models, YAML files, and `a.b.c=value` overrides.

A config is frozen and refuses unknown keys, naming the nearest known one. Nothing is rewritten silently:
what a run used stands resolved in its `config.yaml`.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from rlhf.config_problems import describe_problems
from rlhf.config_yaml import Dumper, Loader
from rlhf.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: immutable, no unknown keys, no NaN, a docstring per field."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        protected_namespaces=(),
        validate_default=True,
        allow_inf_nan=False,
    )


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(schema: type[ConfigT], path: str | Path | None = None, overrides: Iterable[str] = ()) -> ConfigT:
    """Read a YAML file, apply overrides, complete from the defaults, validate.

    A group of settings given in part keeps the rest of its default: where a recipe's `update` has the learning rate
    1e-5, `update.max_grad_norm=1` leaves that standing. A group that names another `type`, or a `preset`, starts from
    that instead; lists and plain mappings are taken as given.

    Args:
        schema: The config class to build.
        path: A YAML file; None starts from the defaults.
        overrides: Strings `a.b.c=value`; the value is read as YAML. Whole groups (`algorithm=grpo`) are set before
            their parts (`algorithm.epochs=2`), in whatever order they come; of two equal keys the later one counts.

    Returns:
        The validated config.

    Raises:
        ConfigError: Missing or malformed file, unknown key (with the nearest known name), wrong type,
            or a combination that a validator refuses.
    """
    settings = read_yaml(path) if path is not None else {}
    overrides = list(overrides)
    for override in sorted(overrides, key=lambda override: override.partition("=")[0].count(".")):
        apply_override(settings, override)
    where = " with ".join([*([str(path)] if path is not None else []), *(["overrides"] if overrides else [])])
    return validate(schema, settings, where=where or "config")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: The file is missing, is not YAML, gives a key twice, or holds something else than a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError("no such config file", where=str(path), remedy="Give the path of a YAML file.")
    try:
        settings = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"the file cannot be read: {error.strerror}", where=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line, reason = _explain_yaml(error)
        raise ConfigError(f"not readable as YAML: {reason}", where=f"{path}{line}") from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError("a config is a mapping", where=str(path), got=type(settings).__name__, expected="key: value")
    return settings


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in nested mappings and lists, in place.

    A string met on the way is a preset's name: `algorithm: grpo` with `algorithm.epochs=2` becomes
    `algorithm: {preset: grpo, epochs: 2}`. A number leads into a list: `rewards.0.weight=2`.

    Args:
        settings: What stood in the file.
        override: The key with its dots, `=`, and the value as YAML; nothing after the `=` is null.

    Raises:
        ConfigError: It is not of this form, or leads through something that has no parts.
    """
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError("not an override", got=override, expected="a.b.c=value", remedy="Example: algorithm.epochs=2")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not readable as YAML: {_explain_yaml(error)[1]}", where=key, got=text) from error
    node: Any = settings
    for part, following in itertools.pairwise(parts):
        node = _step_into(node, part, key=key, following=following)
    _set(node, parts[-1], value, key=key)


def merge_settings(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with `changes` laid over them, group by group, as YAML over YAML.

    A change that names a `preset` or another `type` replaces its group; one below a preset's name changes that preset.

    >>> merge_settings({"algorithm": "grpo", "run": {"seed": 1}}, {"algorithm": {"epochs": 2}, "run": {"resume": True}})
    {'algorithm': {'preset': 'grpo', 'epochs': 2}, 'run': {'seed': 1, 'resume': True}}
    """
    merged = dict(settings)
    for key, change in changes.items():
        current = merged.get(key)
        if isinstance(change, Mapping) and "preset" not in change:
            if isinstance(current, str):
                current = {"preset": current}
            if isinstance(current, Mapping) and change.get("type") in (None, current.get("type")):
                change = merge_settings(current, change)
        merged[key] = change
    return merged


def complete(schema: type[BaseModel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fill groups of settings that are given in part with the rest of their default, as `load_config` describes.

    `validate` does it; here it stands alone for those who look at settings before they are validated.
    """
    completed = dict(settings)
    for key, given in settings.items():
        field = schema.model_fields.get(key)
        if field is None or not isinstance(given, Mapping) or "preset" in given:  # a preset brings its own rest
            continue
        default = _default(field)
        if isinstance(default, BaseModel):
            completed[key] = _complete_from(default, given)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            completed[key] = complete(field.annotation, given)
    return completed


def validate(schema: type[ConfigT], settings: Mapping[str, Any], *, where: str = "config") -> ConfigT:
    """Complete `settings` from the defaults and build `schema`; every problem is listed in one `ConfigError`."""
    try:
        return schema.model_validate(complete(schema, settings))
    except ValidationError as error:
        raise ConfigError("; ".join(describe_problems(schema, error)), where=where) from error


def dump_yaml(config: BaseModel) -> str:
    """The resolved config as YAML that `load_config` reads back unchanged."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def _parse(text: str) -> Any:
    # Loader derives from SafeLoader: no Python object can be built from a file.
    return yaml.load(text, Loader=Loader)


def _explain_yaml(error: yaml.YAMLError | UnicodeDecodeError) -> tuple[str, str]:
    """The line as `:7`, and the reason in one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return (f":{mark.line + 1}" if mark is not None else ""), " ".join(str(problem).split())


def _step_into(node: Any, part: str, *, key: str, following: str) -> Any:
    """The child of `node` that an override leads through, made where there is none."""
    if isinstance(node, list):
        return node[_index(node, part, key=key)]
    child = node.get(part)
    if child is None:
        if following.isdigit():
            raise ConfigError("there is no list to change", where=key, remedy=f"Give the whole list: {part}=[...].")
        child = node[part] = {}
    elif isinstance(child, str):
        child = node[part] = {"preset": child}
    elif not isinstance(child, dict | list):
        raise ConfigError(f"{part!r} is a value without parts", where=key, got=child)
    return child


def _set(node: Any, part: str, value: Any, *, key: str) -> None:
    if isinstance(node, list):
        node[_index(node, part, key=key)] = value
    elif isinstance(node, dict):
        node[part] = value
    else:
        raise ConfigError(f"nothing named {part!r} can be set here", where=key, got=node)


def _index(items: list[Any], part: str, *, key: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise ConfigError(f"the list has {len(items)} items", where=key, got=part, expected=f"0 to {len(items) - 1}")
    return int(part)


def _default(field: FieldInfo) -> Any:
    """The field's default as it is after validation: a preset's name stands for a config."""
    if field.is_required():
        return None
    default = field.get_default(call_default_factory=True, validated_data={})
    if not isinstance(default, str):
        return default
    return TypeAdapter(field.rebuild_annotation()).validate_python(default)


def _complete_from(default: BaseModel, given: Mapping[Hashable, Any]) -> dict[Any, Any]:
    same_type = given.get("type") in (None, getattr(default, "type", None))
    if "preset" in given or not same_type:
        return dict(given)
    completed: dict[Any, Any] = default.model_dump()
    for key, change in given.items():
        current = getattr(default, str(key), None)
        if isinstance(current, BaseModel) and isinstance(change, Mapping):
            change = _complete_from(current, change)
        completed[key] = change
    return completed
