"""Pydantic's validation errors in short sentences: the path as the user wrote it, what was found, what is accepted."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

LONGEST_VALUE = 100


@dataclass(frozen=True)
class _Place:
    """Where a problem is.

    Args:
        path: Keys as the user writes them; pydantic's location also names the branch taken at each union.
        choices: The types accepted there.
        union: The branches of the union that was entered last, of which `choices` is one.
    """

    path: tuple[str, ...]
    choices: tuple[Any, ...]
    union: tuple[Any, ...] = ()

    @property
    def types(self) -> list[str]:
        """The `type` of each branch, where the choices are a union told apart by it."""
        return types_of(self.choices)


def describe_problems(schema: type[BaseModel], error: ValidationError) -> list[str]:
    """One sentence per place that has a problem.

    At a union pydantic reports one error per branch. Here they become one sentence, and where a branch was entered
    (a mapping was given) only what is wrong inside it is told.
    """
    by_path: dict[tuple[str, ...], list[tuple[_Place, Mapping[str, Any]]]] = {}
    for problem in error.errors(include_url=False):
        unknown_key = problem["type"] == "extra_forbidden"
        location = problem["loc"][:-1] if unknown_key else problem["loc"]
        place = _locate(schema, location)
        path = (*place.path, str(problem["loc"][-1])) if unknown_key else place.path
        by_path.setdefault(path, []).append((place, problem))
    paths = [path for path in by_path if not any(len(p) > len(path) and p[: len(path)] == path for p in by_path)]
    return [_sentence(schema, path, by_path[path]) for path in paths]


def _sentence(schema: type[BaseModel], path: tuple[str, ...], found: Sequence[tuple[_Place, Mapping[str, Any]]]) -> str:
    place, problem = found[0]
    name = ".".join(path)
    prefix = f"{name}: " if name else ""
    context = problem.get("ctx", {})
    match problem["type"]:
        case "extra_forbidden":
            return f"{prefix}unknown key; {_hint(schema, place, path)}"
        case "missing":
            return f"{prefix}this key is required"
        case "value_error":
            return prefix + problem["msg"].removeprefix("Value error, ")
        case "union_tag_invalid":
            wrong, tags = str(context["tag"]), re.findall(r"'([^']*)'", context["expected_tags"])
            return f"{prefix}type: got {wrong!r}, expected {_one_of(tags)}{_did_you_mean(wrong, tags)}"
        case "union_tag_not_found":
            return f"{prefix}got {_shown(problem['input'])}, expected settings with a type: {_one_of(place.types)}"
        case "model_attributes_type" if place.types:
            wrong, tags = str(problem["input"]), place.types
            example = (difflib.get_close_matches(wrong, tags, n=1) or tags)[0]
            expected = f"settings with a type, such as {{type: {example}}}; types: {', '.join(tags)}"
            return f"{prefix}got {_shown(problem['input'])}, expected {expected}"
    expected = list(dict.fromkeys(_expectation(problem) for _, problem in found))
    sentence = f"{prefix}got {_shown(problem['input'])}, expected {' or '.join(expected)}"
    literals = [literal for _, p in found for literal in re.findall(r"'([^']*)'", p.get("ctx", {}).get("expected", ""))]
    return sentence + _did_you_mean(str(problem["input"]), literals)


def _expectation(problem: Mapping[str, Any]) -> str:
    """What pydantic says the value should be, without its preamble."""
    if problem["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return "settings (key: value)"
    message = re.sub(r"^(Input|Value) should be ", "", problem["msg"])
    # "a valid integer, unable to parse string as an integer": what was found stands beside it already.
    message = re.sub(r", (unable to parse|got a number with).*$", "", message)
    return re.sub(r"^(greater|less)", r"a value \1", message[0].lower() + message[1:])


def _locate(schema: type[BaseModel], location: Sequence[int | str]) -> _Place:
    """Follow pydantic's location, leaving out the parts that name a union's branch."""
    path: list[str] = []
    choices: list[Any] = [schema]
    union: list[Any] = []
    for part in location:
        if len(choices) > 1:
            union = choices
            choices = [choice for choice in choices if _is_branch(choice, part)] or choices
            continue
        (choice,), union = choices or (None,), []
        if _is_model(choice) and part in choice.model_fields:
            choices = list(choices_in(choice.model_fields[part].annotation))
        elif get_origin(choice) in (list, tuple, set, frozenset, dict):
            choices = [c for argument in get_args(choice)[-1:] for c in choices_in(argument)]
        elif not isinstance(part, int) and (part == "[key]" or part.endswith("]")):
            continue  # pydantic's own marks, such as function-before[...]
        path.append(str(part))
    return _Place(tuple(path), tuple(choices), tuple(union))


def _is_branch(choice: Any, part: int | str) -> bool:
    if _is_model(choice):
        tag = choice.model_fields.get("type")
        return part == choice.__name__ or (tag is not None and tag.default == part)
    return isinstance(part, str) and part.split("[")[0] == getattr(get_origin(choice) or choice, "__name__", None)


def types_of(choices: Iterable[Any]) -> list[str]:
    """The `type` of each config among the members of a union that is told apart by it."""
    models = [choice for choice in choices if _is_model(choice)]
    return [model.model_fields["type"].default for model in models if "type" in model.model_fields]


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def choices_in(annotation: Any) -> Iterator[Any]:
    """The members of a union, through `Annotated`, without None."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from choices_in(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for argument in get_args(annotation):
            yield from choices_in(argument)
    elif annotation is not type(None):
        yield annotation


def _hint(schema: type[BaseModel], place: _Place, path: tuple[str, ...]) -> str:
    """The branch that has this key, the nearest key here, the same key elsewhere, or all keys here."""
    owners = types_of(choice for choice in place.union if _is_model(choice) and path[-1] in choice.model_fields)
    if owners:
        return f"it belongs to type {' or '.join(map(repr, owners))}, not {place.types[0]!r}"
    known = sorted({key for choice in place.choices if _is_model(choice) for key in choice.model_fields})
    nearest = difflib.get_close_matches(path[-1], known, n=1)
    elsewhere = [other for other in _all_paths(schema) if other.rpartition(".")[2] == path[-1]]
    elsewhere.sort(key=lambda other: other.count("."))
    if nearest:
        return f"did you mean {nearest[0]!r}?"
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    return f"known keys: {', '.join(known)}"


def _all_paths(model: type[BaseModel], prefix: str = "", seen: tuple[type, ...] = ()) -> Iterator[str]:
    for key, field in model.model_fields.items():
        yield prefix + key
        for choice in choices_in(field.annotation):
            if _is_model(choice) and choice not in seen:
                yield from _all_paths(choice, f"{prefix}{key}.", (*seen, model))


def _did_you_mean(wrong: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _one_of(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."
