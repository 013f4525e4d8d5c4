"""A resolved config as YAML with the meaning of every setting above it, which `rlhf run --config` reads back."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rlhf.commands.stages import Stage, resolve_stage
from rlhf.config_problems import choices_in, types_of
from rlhf.config_yaml import Dumper

WIDTH = 110


SPEAKS = ("prompts", "demonstrations", "completions_per_call", "against", "num_candidates")
"""Settings of which recipes with a language model have one; the others must not wait for transformers."""


def explain_plan(config: BaseModel, *, processes: int = 1, sharded: bool = False) -> str:
    """What the run of a language recipe would do and take, as comments; empty for other recipes.

    A config with a method `plan()` tells it itself; a config with `stages` is told stage by stage.

    Args:
        config: Resolved.
        processes: Training processes that share the batches.
        sharded: They share weights, gradients and optimizer states too.
    """
    if hasattr(config, "stages"):
        return "".join(_explain_stage(stage, config, processes=processes) for stage in config.stages)
    if hasattr(config, "plan"):
        lines: list[str] = config.plan()
    else:
        plays = hasattr(getattr(config, "collector", None), "starts_per_iteration")  # a text environment
        if not plays and not any(hasattr(config, name) for name in SPEAKS):
            return ""
        from rlhf.lm.plan import plan

        lines = plan(config, processes=processes, sharded=sharded)
    return "".join(f"# {line}\n" for line in lines)


def _explain_stage(stage: Stage, config: Any, *, processes: int) -> str:
    """A stage of a pipeline: what it starts from may not be there before the stages before it have run."""
    directory = Path(config.run.directory or "runs/pipeline")
    _, resolved = resolve_stage(stage, directory, config.run)
    return f"# --- stage {stage.name}: {stage.title} ---\n" + explain_plan(resolved, processes=processes)


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
