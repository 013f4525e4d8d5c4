"""Stages of a pipeline: recipes run one after another in this process, each in a directory of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import Field

from rlhf.commands.recipes import find_config, find_recipe, import_recipe
from rlhf.config import Config, merge_settings, read_yaml, validate
from rlhf.training.run_config import RunConfig

DIRECTORY = "{directory}"
"""Stands for the pipeline's run directory in any setting of a stage."""


class Stage(Config):
    """One recipe of a pipeline."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    """Its directory below the pipeline's, and how other stages refer to it."""
    title: str
    """Its row in the final table."""
    recipe: str
    """A recipe's name or file."""
    config: str | None = None
    """The recipe's YAML to start from; null starts from its defaults."""
    settings: dict[str, Any] = {}
    """Changes to it, nested as in the YAML. `{directory}` stands for the pipeline's run directory."""


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind."""

    stage: Stage
    directory: Path
    metrics: dict[str, float]
    seconds: float

    def first(self, names: list[str]) -> float | None:
        """The first of these metrics that the stage reports; `stage:metric` speaks of one stage only."""
        metrics = {**self.metrics, "seconds": self.seconds}
        own = [name.removeprefix(f"{self.stage.name}:") for name in names]
        return next((metrics[name] for name in own if metrics.get(name) is not None), None)


def run_stage(stage: Stage, directory: Path, run: RunConfig) -> StageResult:
    """Run one recipe inside a pipeline; a resumed pipeline takes finished stages as they are.

    Args:
        stage: What to run.
        directory: The pipeline's run directory; the stage writes to `<directory>/<stage.name>`.
        run: The pipeline's settings; seed, resume and overwrite are handed on.

    Raises:
        ConfigError: The stage's settings are not those of its recipe.
    """
    own = directory / stage.name
    summary = own / "summary.json"
    if run.resume and summary.is_file():
        record = json.loads(summary.read_text(encoding="utf-8"))
        return StageResult(stage, own, record["metrics"], record["stage_seconds"])
    module, config = resolve_stage(stage, directory, run)
    started = time.monotonic()
    metrics = module.main(config)
    seconds = time.monotonic() - started
    _note_seconds(summary, seconds)
    return StageResult(stage, own, metrics, seconds)


def resolve_stage(stage: Stage, directory: Path, run: RunConfig) -> tuple[ModuleType, Config]:
    """The stage's recipe, and the config that it will run with.

    Args:
        stage: Which.
        directory: The pipeline's run directory.
        run: The pipeline's settings; seed, resume and overwrite are handed on.

    Raises:
        ConfigError: The stage's settings are not those of its recipe.
    """
    recipe = find_recipe(stage.recipe)
    module = import_recipe(recipe)
    file = find_config(recipe, stage.config) if stage.config is not None else None
    settings = merge_settings(read_yaml(file) if file is not None else {}, stage.settings)
    handed_on = {
        "directory": str(directory / stage.name),
        "seed": run.seed,
        "resume": run.resume,
        "overwrite": run.overwrite,
    }
    settings = merge_settings(_located(settings, directory), {"run": handed_on})
    return module, validate(module.CONFIG, settings, where=f"stage {stage.name}")


def _note_seconds(summary: Path, seconds: float) -> None:
    """Keep the stage's whole time, loading and evaluation included, for a resumed pipeline."""
    record = json.loads(summary.read_text(encoding="utf-8"))
    summary.write_text(json.dumps({**record, "stage_seconds": seconds}, indent=2) + "\n", encoding="utf-8")


def _located(value: Any, directory: Path) -> Any:
    """`{directory}` replaced in every string."""
    if isinstance(value, str):
        return value.replace(DIRECTORY, str(directory))
    if isinstance(value, Mapping):
        return {key: _located(item, directory) for key, item in value.items()}
    if isinstance(value, list):
        return [_located(item, directory) for item in value]
    return value
