"""Typed configuration: pydantic models, YAML files, and `a.b.c=value` overrides.

A config is frozen and refuses unknown keys, naming the nearest known one. Nothing is rewritten silently:
what a run used stands resolved in its `config.yaml`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rlhf.errors import ConfigError


class Config(BaseModel):
    """Base of every configuration: immutable, no unknown keys, a docstring per field."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), validate_default=True
    )


ConfigT = TypeVar("ConfigT", bound=Config)


def load_config(schema: type[ConfigT], path: str | Path | None = None, overrides: Iterable[str] = ()) -> ConfigT:
    """Read a YAML file, apply overrides, validate.

    Args:
        schema: The config class to build.
        path: A YAML file; None starts from the defaults.
        overrides: Strings `a.b.c=value`; the value is read as YAML.

    Returns:
        The validated config.

    Raises:
        ConfigError: Missing or malformed file, unknown key (with the nearest known name), wrong type,
            or a combination that a validator refuses.
    """
    settings = read_yaml(path) if path is not None else {}
    for override in overrides:
        apply_override(settings, override)
    return validate(schema, settings, where=str(path) if path is not None else "config")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError("no such config file", where=str(path), remedy="Give the path of a YAML file.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"not readable as YAML: {error}", where=str(path)) from error
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError("a config is a mapping", where=str(path), got=type(settings).__name__, expected="key: value")
    return settings


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in a nested mapping, in place.

    A string met on the way is a preset's name: `algorithm: grpo` with `algorithm.epochs=2` becomes
    `algorithm: {preset: grpo, epochs: 2}`.
    """
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError("not an override", got=override, expected="a.b.c=value", remedy="Example: update.epochs=2")
    try:
        value = _read_scalar(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value is not readable as YAML: {error}", where=key, got=text) from error
    node = settings
    for part in parts[:-1]:
        child = node.get(part)
        if child is None:
            child = node[part] = {}
        elif isinstance(child, str):
            child = node[part] = {"preset": child}
        elif not isinstance(child, dict):
            raise ConfigError(f"{part!r} is not a group of settings", where=key, got=child)
        node = child
    node[parts[-1]] = value


def _read_scalar(text: str) -> Any:
    """YAML 1.1 reads 1e-3 as a string; users mean a number."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value) if any(character.isdigit() for character in value) else value
        except ValueError:
            return value
    return value


def validate(schema: type[ConfigT], settings: Mapping[str, Any], *, where: str = "config") -> ConfigT:
    """Build `schema` from `settings`; every problem is listed in one `ConfigError`."""
    try:
        return schema.model_validate(settings)
    except ValidationError as error:
        problems = [_describe(schema, problem) for problem in error.errors()]
        raise ConfigError("; ".join(problems), where=where) from error


def _describe(schema: type[BaseModel], problem: Mapping[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    path = ".".join(location) or "config"
    if problem["type"] == "extra_forbidden":
        known = _keys_at(schema, location[:-1])
        nearest = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else f"known keys: {', '.join(sorted(known))}"
        return f"{path}: unknown key; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{path}: {message}"
    return f"{path}: {message}, got {problem['input']!r}"


def _keys_at(schema: type[BaseModel], location: list[str]) -> list[str]:
    """Known keys of the model that `location` leads to; unions contribute the branch named by its `type`."""
    models: list[type[BaseModel]] = [schema]
    for part in location:
        following: list[type[BaseModel]] = []
        for model in models:
            if part in model.model_fields:
                following += _models_in(model.model_fields[part].annotation)
            elif model.model_fields.get("type") is not None and model.model_fields["type"].default == part:
                following.append(model)
        models = following or models
    return sorted({key for model in models for key in model.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def dump_yaml(config: BaseModel) -> str:
    """The resolved config as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
