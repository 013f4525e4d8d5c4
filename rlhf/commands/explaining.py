"""A resolved config as YAML with the meaning of every setting above it, which `rlhf run --config` reads back."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf.config_problems import choices_in, types_of
from rlhf.config_yaml import Dumper

WIDTH = 110


def explain_plan(config: BaseModel, *, processes: int = 1) -> str:
    """What the run of a language recipe would do and take, as comments; empty for other recipes."""
    # A recipe without a language model must not wait for transformers.
    plays = hasattr(getattr(config, "collector", None), "starts_per_iteration")  # a text environment
    ranks = hasattr(getattr(config, "training", None), "batch_prompts")  # a reward model
    if not (plays or ranks) and not any(hasattr(config, name) for name in ("prompts", "demonstrations")):
        return ""
    from rlhf.lm.plan import plan

    return "".join(f"# {line}\n" for line in plan(config, processes=processes))


def explain_config(config: BaseModel) -> str:
    """Write every setting with its value; docstrings become comments."""
    return "\n".join(_lines(config, indent="")) + "\n"


def _lines(config: BaseModel, *, indent: str) -> Iterator[str]:
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        told = field.description or (type(value).__doc__ or "").partition("\n\n")[0] * isinstance(value, BaseModel)
        comment = " ".join([*told.split(), *_alternatives(field)])
        if comment and name != "type":
            yield from textwrap.wrap(comment, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")
        if isinstance(value, BaseModel) and type(value).model_fields:
            yield f"{indent}{name}:"
            yield from _lines(value, indent=indent + "  ")
        else:
            yield from textwrap.indent(_dump({name: config.model_dump(mode="json")[name]}), indent).splitlines()


def _alternatives(field: FieldInfo) -> Iterator[str]:
    """What else may stand here, where that is a list of words."""
    choices = list(choices_in(field.annotation))
    types = types_of(choices)
    words = [str(word) for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
    if len(types) > 1:
        yield f"[types: {', '.join(types)}]"
    elif len(words) > 1:
        yield f"[{' | '.join(words)}]"


def _dump(settings: dict[str, Any]) -> str:
    return yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)
