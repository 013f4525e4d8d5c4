"""Making a run's directory, and keeping an earlier run's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from rlhf.config import Config, dump_yaml, read_yaml
from rlhf.errors import ConfigError
from rlhf.training.checkpoints import write_atomically
from rlhf.training.environment import describe_environment
from rlhf.training.metrics import flatten_settings
from rlhf.training.run_config import RunConfig

DESCRIPTION = ("config.yaml", "environment.json")
RESULTS = ("metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints", "trackers")
KEPT_WORK = ("cells",)
"""What an experiment goes on from where it finds it: a run that starts over must not."""
CHANGES_NOTHING = ("run.resume", "run.overwrite", "resume", "overwrite")


def prepare_directory(
    directory: Path, *, config: RunConfig, resolved: Config, processes: int, say: Callable[[str], None]
) -> None:
    """Make the directory and describe the run in it; call it on the main process only.

    Args:
        directory: Where.
        config: Whether to resume or to overwrite.
        resolved: The recipe's whole config, for config.yaml.
        processes: How many take part.
        say: Prints a sentence.

    Raises:
        ConfigError: It holds an earlier run, or cannot be made.
    """
    described = [name for name in DESCRIPTION if (directory / name).exists()]
    earlier = [name for name in RESULTS if (directory / name).exists()]
    if config.overwrite:
        kept = [name for name in KEPT_WORK if described and (directory / name).exists()]
        for name in (*described, *earlier, *kept):
            path = directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif not config.resume and (earlier or len(described) == 1):
        # Both descriptions without a result are what a run leaves that failed before its first iteration.
        raise ConfigError(
            "the run directory holds an earlier run",
            where=str(directory),
            got=", ".join((*described, *earlier)),
            remedy="Give another run.directory, go on with run.resume=true, or start over with run.overwrite=true.",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the run directory cannot be made: {error.strerror}", where=str(directory)) from error
    _write_config(directory / "config.yaml", resolved, keep=config.resume, say=say)
    environment = describe_environment(processes=processes)
    write_atomically(directory / "environment.json", json.dumps(environment, indent=2) + "\n")


def _write_config(path: Path, resolved: Config, *, keep: bool, say: Callable[[str], None]) -> None:
    """Write config.yaml; where a resumed run changes settings, keep the earlier ones beside it and say so."""
    if keep and path.exists():
        before, now = flatten_settings(read_yaml(path)), flatten_settings(resolved.model_dump(mode="json"))
        changed = [key for key in sorted({**before, **now}) if before.get(key) != now.get(key)]
        changed = [key for key in changed if key not in CHANGES_NOTHING]
        if changed:
            number = len(list(path.parent.glob("config_before_*.yaml"))) + 1
            path.rename(path.with_name(f"config_before_{number}.yaml"))
            say(f"settings differ from those the run was started with: {', '.join(changed)}")
    write_atomically(path, dump_yaml(resolved))
