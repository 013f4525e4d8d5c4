"""Evaluating a model from the command line: the recipe `evaluate`, told which model."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from rlhf.commands.running import Request


def make_request(model: str, *, config: str | None, overrides: Sequence[str]) -> Request:
    """What `rlhf eval MODEL --config X` runs.

    The run directory is `runs/evaluate/<config>/<model>` where the overrides name none, so that several models can be
    held against one config.

    Args:
        model: A folder or hub id; it replaces the config's `model.path`.
        config: A config of the recipe, or a YAML file.
        overrides: Further settings.
    """
    request = Request.make("evaluate", config=config, overrides=())
    settings = [f"model.path={json.dumps(model)}", *overrides]
    if not any(setting.startswith("run.directory=") for setting in settings):
        directory = Path("runs") / "evaluate" / request.config_name / directory_name(model)
        settings.append(f"run.directory={json.dumps(str(directory))}")
    return Request(recipe=request.recipe, config=request.config, overrides=tuple(settings))


def directory_name(model: str) -> str:
    """A folder's name for a model's place.

    >>> directory_name("runs/grpo/default/seed_0/model"), directory_name("Qwen/Qwen2.5-0.5B")
    ('runs-grpo-default-seed_0-model', 'Qwen-Qwen2.5-0.5B')
    """
    return re.sub(r"[^\w.]+", "-", model).strip("-.")[-100:] or "model"
