"""Running a recipe: in this process, in several training processes, or once per seed."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn

import typer

from rlhf.commands.recipes import Recipe, find_config, find_recipe, import_recipe
from rlhf.commands.tables import make_table
from rlhf.config import Config, load_config
from rlhf.errors import ConfigError, UserError

CONFIG_NAME_VARIABLE = "RLHF_CONFIG_NAME"
"""Environment variable that tells a run which config it was started from; it is part of the default run directory."""

POLL_SECONDS = 0.2
LOG_LINES_SHOWN = 15


@dataclass(frozen=True)
class Request:
    """What `rlhf run` was asked to run.

    Args:
        recipe: The recipe.
        config: Its YAML file; None stands for the defaults of its config class.
        overrides: `a.b.c=value` strings, applied after the file.
    """

    recipe: Recipe
    config: Path | None
    overrides: tuple[str, ...]

    @classmethod
    def make(cls, recipe: str, *, config: str | None, overrides: Sequence[str]) -> Request:
        """Find the recipe and the config that the command line names."""
        found = find_recipe(recipe)
        return cls(recipe=found, config=find_config(found, config), overrides=tuple(overrides))

    @property
    def config_name(self) -> str:
        """The config's name, as in the default run directory `runs/<recipe>/<config name>/seed_<seed>`."""
        return self.config.stem if self.config is not None else "default"

    def load(self) -> tuple[ModuleType, Config]:
        """Import the recipe and validate its config."""
        module = import_recipe(self.recipe)
        try:
            return module, load_config(module.CONFIG, self.config, self.overrides)
        except ConfigError as error:
            if self.config is not None or not self.recipe.configs or "required" not in error.what:
                raise
            remedy = f"Or start from one of its configs with --config: {', '.join(self.recipe.configs)}."
            raise ConfigError(error.what, where=error.where, remedy=remedy) from error

    def arguments(self) -> list[str]:
        """The command-line arguments that repeat this request, after the recipe."""
        config = [] if self.config is None else ["--config", str(self.config)]
        return [*config, *self.overrides]


def run_here(request: Request) -> int:
    """Run the recipe in this process and return the exit code."""
    os.environ[CONFIG_NAME_VARIABLE] = request.config_name
    if not sys.stderr.isatty():  # in a log file, transformers' bars of loading weights are noise
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    module, config = request.load()
    module.main(config)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from rlhf.training.distributed import end_worker

        end_worker()
    return 0


def run_processes(request: Request, processes: int, *, traceback: bool = False) -> int:
    """Run the recipe's file in several training processes on this machine, as `torchrun` does.

    Returns:
        The exit code of the process that failed first, or 0.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError("--processes inside a distributed launch", remedy="Remove --processes, or the launcher.")
    request.load()  # A mistake in the config is told once, before any process starts.
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("OMP_NUM_THREADS", str(threads_each(processes)))
    # The processes tell their own errors; torchrun's report would repeat them in forty lines.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The addresses keep everything on this machine, also where its host name does not resolve.
    launcher = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}"]
    script = [str(request.recipe.file), *request.arguments(), *(["--traceback"] if traceback else [])]
    try:
        torchrun.run(torchrun.parse_args([*launcher, *script]))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        return 128 + error.sigval
    return 0


def read_seeds(text: str) -> list[int]:
    """Read `0,1,2`."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError("--seeds is not a list of integers", got=text, expected="such as 0,1,2") from error
    if len(set(seeds)) < len(seeds):
        raise UserError("--seeds names a seed twice", got=text)
    return seeds


def run_seeds(request: Request, seeds: Sequence[int], *, jobs: int = 1, processes: int = 1) -> int:
    """Run the recipe once per seed, each in a process of its own, and print the table of their summaries.

    Each seed's output goes to `seed_<k>.log` beside its run directory `seed_<k>`. Where `run.directory` is set, it is
    the folder above these.

    Args:
        request: What to run.
        seeds: The values of `run.seed`.
        jobs: How many run at the same time; they share the cores evenly.
        processes: Training processes of each.

    Returns:
        0 when every seed succeeded, else 1, or 2 when the failures are all user errors.
    """
    _, config = request.load()
    run: Any = getattr(config, "run", None)
    if run is None:
        raise UserError("the recipe's config has no `run`, hence no seed", where=str(request.recipe.file))
    base = Path(run.directory or Path("runs") / request.recipe.name / request.config_name)
    base.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {CONFIG_NAME_VARIABLE: request.config_name}
    environment.setdefault("OMP_NUM_THREADS", str(threads_each(min(jobs, len(seeds)) * processes)))
    codes = _run_all([_SeedRun(request, seed, base, processes, environment) for seed in seeds], jobs)
    succeeded = [base / f"seed_{seed}" for seed in seeds if codes[seed] == 0]
    if succeeded:
        typer.echo("\n" + make_table(succeeded))
    failures = {code for code in codes.values() if code != 0}
    return 0 if not failures else 2 if failures == {2} else 1


def threads_each(processes: int) -> int:
    """CPU threads for each of several processes that share this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


@dataclass
class _SeedRun:
    """One seed's process, and where its output goes."""

    request: Request
    seed: int
    base: Path
    processes: int
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    @property
    def log(self) -> Path:
        return self.base / f"seed_{self.seed}.log"

    def start(self) -> None:
        settings = [f"run.seed={self.seed}", f"run.directory={self.base / f'seed_{self.seed}'}"]
        command = [sys.executable, "-m", "rlhf.cli", "run", str(self.request.recipe.file), *self.request.arguments()]
        command += [*settings, f"--processes={self.processes}"]
        self.started = time.monotonic()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.environment,
                preexec_fn=_heed_interrupts,
            )
        typer.echo(f"seed {self.seed}: started, output in {self.log}")

    def report(self, code: int) -> None:
        seconds = time.monotonic() - self.started
        typer.echo(f"seed {self.seed}: {'finished' if code == 0 else f'failed with exit code {code}'}, {seconds:.0f} s")
        if code != 0:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            typer.echo("\n".join(f"  | {line}" for line in lines[-LOG_LINES_SHOWN:]), err=True)


def _run_all(runs: Sequence[_SeedRun], jobs: int) -> dict[int, int]:
    """Run all, at most `jobs` at a time, and return each seed's exit code; no process outlives this one."""
    waiting, active, codes = list(runs), [], {}
    previous = signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                active.append(waiting.pop(0))
                active[-1].start()
            time.sleep(POLL_SECONDS)
            for run in list(active):
                code = run.process.poll()
                if code is not None:
                    active.remove(run)
                    codes[run.seed] = code
                    run.report(code)
    finally:
        for run in active:
            run.process.send_signal(signal.SIGINT)  # The run closes its files and says that checkpoints are kept.
        for run in active:
            run.process.wait()
        signal.signal(signal.SIGTERM, previous)
    return codes


def _heed_interrupts() -> None:
    """A shell's background job ignores Ctrl-C, and its children would too: then nothing could stop a seed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _exit_on_signal(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
