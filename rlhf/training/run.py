"""A run: its directory, its iterations, what it writes, and how it goes on after a stop.

    runs/<recipe>/<config name>/seed_<seed>/
        config.yaml        every setting, resolved
        environment.json   versions, hardware, commit
        metrics.jsonl      one line per iteration
        samples.jsonl      a few readable samples per iteration
        checkpoints/       iteration_000123/<name>.pt, latest, best.json
        summary.json       written at the end: final metrics under stable names

Only the main process writes.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from rlhf.config import Config
from rlhf.core.types import Rollout
from rlhf.errors import ConfigError, TrainingError
from rlhf.training.allocation import release_holes
from rlhf.training.checkpoints import CheckpointStore, write_atomically
from rlhf.training.distributed import (
    gather_objects,
    make_accelerator,
    on_main_process_first_failing,
    preserved_random_state,
    random_state,
    seed_everything,
    set_random_state,
)
from rlhf.training.environment import package_versions
from rlhf.training.metrics import (
    ConsoleLog,
    JsonLines,
    Trackers,
    flatten_settings,
    headline,
    jsonable,
    require_trackers,
)
from rlhf.training.run_config import RunConfig, lowest_is_best
from rlhf.training.run_directory import prepare_directory
from rlhf.training.stopping import StopRequest

CONFIG_NAME_VARIABLE = "RLHF_CONFIG_NAME"
RUN_STATE = "run"


class Stateful(Protocol):
    """What a checkpoint can keep."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, arrays, numbers, strings and containers of them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        ...


class Run:
    """One training run.

    Attributes:
        directory: Where everything is written.
        evaluate: Set by the recipe; called on every process every `evaluate_every` iterations and at the end. Its
            metrics are logged as "evaluation/<name>". It draws from the global generators without changing the run.
        completed: The last completed iteration.
        total: Iterations of the whole run.
    """

    def __init__(
        self,
        run: RunConfig,
        *,
        resolved: Config,
        iterations: int,
        accelerator: Accelerator | None = None,
        recipe: str = "run",
    ) -> None:
        """Seed everything, make the directory, write config.yaml and environment.json.

        Args:
            run: The settings.
            resolved: The whole config of the recipe, for the record.
            iterations: How many there will be.
            accelerator: None makes one.
            recipe: Its name.

        Raises:
            ConfigError: A directory that holds an earlier run, a tracker that is not installed, or a checkpoint of
                another number of processes.
        """
        self.config, self.total, self.recipe = run, iterations, recipe
        self.accelerator = accelerator if accelerator is not None else make_accelerator()
        self.config_name = os.environ.get(CONFIG_NAME_VARIABLE, "default")
        self.directory = Path(run.directory or f"runs/{recipe}/{self.config_name}/seed_{run.seed}")
        self.evaluate: Callable[[], dict[str, float]] | None = None
        self.completed = 0
        self._resolved, self._is_main = resolved, self.accelerator.is_main_process
        self._tracked: dict[str, Stateful] = {}
        self._store = CheckpointStore(self.directory / "checkpoints", keep=run.keep_checkpoints)
        self._metrics = JsonLines(self.directory / "metrics.jsonl")
        self._samples = JsonLines(self.directory / "samples.jsonl")
        self._console = ConsoleLog(
            total=iterations, enabled=self._is_main, bar=run.progress_bar, every=run.log_every, name=recipe
        )
        self._stop = StopRequest(self._console.say)
        self._trackers: Trackers | None = None
        self._last: dict[str, float] = {}
        self._ended_because: str | None = None
        self._seconds_before, self._started = 0.0, time.monotonic()
        seed_everything(run.seed)
        require_trackers(run.trackers)
        on_main_process_first_failing(
            self.accelerator,
            lambda: prepare_directory(
                self.directory,
                config=run,
                resolved=resolved,
                processes=self.accelerator.num_processes,
                say=self._console.say,
            ),
        )
        self._resumed_from = self._store.latest() if run.resume else None
        self._resume()

    def finds_model(self, folder: Path) -> bool:
        """Whether this run, resumed, finds a model here that it made before its iterations; another run's is removed.

        Every process calls it. A model counts once its tokenizer lies beside it, which is written last.
        """
        if self.config.resume and (folder / "tokenizer_config.json").is_file():
            return True
        on_main_process_first_failing(self.accelerator, lambda: shutil.rmtree(folder, ignore_errors=True))
        return False

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def track(self, **stateful: Stateful) -> None:
        """Save these with every checkpoint; where the run resumes, restore them at once.

        An object with the attribute `replicated = True` is the same on all processes and saved once; of others every
        process's state is kept.

        Raises:
            ConfigError: A name that tracks another object already.
            TrainingError: The checkpoint lacks this name.
        """
        for name, thing in stateful.items():
            if self._tracked.setdefault(name, thing) is not thing or name == RUN_STATE:
                raise ConfigError("this name is tracked already", where="Run.track", got=name)
            if self._resumed_from is not None:
                self._restore(self._resumed_from, name)

    def _restore(self, checkpoint: Path, name: str) -> None:
        state, thing = self._store.load(checkpoint, name), self._tracked[name]
        thing.load_state_dict(state if _replicated(thing) else state[self.accelerator.process_index])

    def restore_best(self, *names: str) -> Path:
        """Put tracked objects back to the best checkpoint's state.

        Args:
            names: Which; for instance "learner".

        Raises:
            TrainingError: No best checkpoint was marked.
        """
        best = self._store.best()
        if best is None:
            raise TrainingError(
                "no checkpoint was marked as the best",
                where=str(self._store.directory),
                remedy="Set run.best_metric, and run.evaluate_every.",
            )
        for name in names:
            self._restore(best, name)
        return best

    @property
    def latest_checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        return self._store.latest()

    def _save(self) -> Path:
        """Save a checkpoint of the last completed iteration; every process takes part."""
        states: dict[str, Any] = {}
        for name, thing in self._tracked.items():
            state = thing.state_dict()
            states[name] = state if _replicated(thing) else gather_objects(self.accelerator, state)
        states[RUN_STATE] = {
            "iteration": self.completed,
            "seconds": self._seconds(),
            "processes": self.accelerator.num_processes,
            "random": gather_objects(self.accelerator, random_state()),
        }
        on_main_process_first_failing(self.accelerator, lambda: self._store.save(self.completed, states) and None)
        return self._store.directory / f"iteration_{self.completed:06d}"

    def _resume(self) -> None:
        if self._resumed_from is None:
            if self.config.resume:
                self._console.say(f"no checkpoint in {self._store.directory}: the run starts from its beginning")
                if self._is_main:
                    self._metrics.keep_until(-1)  # the evaluation before the first iteration is made again
                    self._samples.keep_until(0)
            return
        state = self._store.load(self._resumed_from, RUN_STATE)
        if state["processes"] != self.accelerator.num_processes:
            raise ConfigError(
                "a run resumes with as many processes as it was started with",
                where=str(self._resumed_from),
                got=self.accelerator.num_processes,
                expected=str(state["processes"]),
            )
        self.completed, self._seconds_before = state["iteration"], state["seconds"]
        self._random_state = state["random"][self.accelerator.process_index]
        if self._is_main:
            self._metrics.keep_until(self.completed)
            self._samples.keep_until(self.completed)
            records = self._metrics.read()
            self._last = {key: value for key, value in (records[-1] if records else {}).items() if key != "iteration"}
        self._console.say(f"resuming after iteration {self.completed} of {self.total}")

    # --- iterations -------------------------------------------------------------------------------------------------

    def iterations(self) -> Iterator[int]:
        """Yield the iterations that are left, counted from 1.

        Ctrl-C or SIGTERM stops after the iteration that runs, with a checkpoint; a second one stops at once.
        """
        if self._resumed_from is not None:
            set_random_state(self._random_state)
        elif self.accelerator.process_index > 0:
            seed_everything(self.config.seed + 1_000_003 * self.accelerator.process_index)  # processes draw apart
        if self._is_main and self.config.trackers:
            settings = flatten_settings(self._resolved.model_dump(mode="json"))
            folder = self.directory / "trackers"
            self._trackers = Trackers(self.config.trackers, project=self.recipe, logging_dir=folder, config=settings)
        self._started = time.monotonic()
        self._console.start(completed=self.completed)
        self._stop.listen()
        try:
            self._evaluate_start()
            yield from range(self.completed + 1, self.total + 1)
        finally:
            self._stop.leave()
            self._console.stop()

    def _evaluate_start(self) -> None:
        """Record as iteration 0 what the policy could do before it learnt anything: the baseline of every curve."""
        if self.completed > 0 or self.evaluate is None or self.config.evaluate_every == 0:
            return
        evaluation = self._evaluate()
        if self._is_main:
            self._metrics.write([{"iteration": 0, "seconds": self._seconds(), **evaluation}])
        self._console.say(f"{self.recipe} before learning  {headline(evaluation)}")

    def progress(self, iteration: int) -> float:
        """Return the share of the run that is done before `iteration`, in [0, 1)."""
        return (iteration - 1) / self.total

    def finish_iteration(
        self, iteration: int, rollout: Rollout | None, metrics: dict[str, float], *, ends_because: str | None = None
    ) -> None:
        """Record an iteration: metrics, samples, evaluation and checkpoint where they are due.

        Metrics of the rollout are averaged over the processes that report them; `metrics` are the same on all. With
        `ends_because` this iteration is the run's last, whatever its number: it is evaluated, saved and summarised
        as the last one is, and the reason stands in summary.json as "ended_because".

        Raises:
            TrainingError: best_metric is not among the evaluation's metrics, or the checkpoint cannot be written.
        """
        record = {**self._rollout_metrics(rollout), **metrics}
        self.completed = iteration
        self._ended_because = ends_because
        is_last = iteration == self.total or ends_because is not None
        is_best = False
        if self.evaluate is not None and _due(iteration, self.config.evaluate_every, is_last):
            evaluation = self._evaluate()
            record |= evaluation
            is_best = self._improves(evaluation)
        self._last = {"seconds": self._seconds(), **record}
        if self._is_main:
            self._metrics.write([{"iteration": iteration, **self._last}])
            if rollout is not None:
                self._samples.write({"iteration": iteration, **sample} for sample in rollout.samples)
            if self._trackers is not None and (iteration % self.config.log_every == 0 or is_last):
                self._trackers.log(record, step=iteration)
        self._console.iteration(iteration, record)
        # Signals reach processes at different moments; they stop together, at the first that was asked.
        stops = any(gather_objects(self.accelerator, self._stop.requested)) and not is_last
        if is_best or stops or _due(iteration, self.config.checkpoint_every, is_last):
            path = self._save()
            if is_best and self._is_main:
                metric = self._best_name()
                self._store.mark_best(path, metric=metric, value=record[metric])
        if ends_because is not None:
            self._console.say(f"the run ends after iteration {iteration} of {self.total}: {ends_because}")
        if stops:
            self._stop.act()
        release_holes()

    def _rollout_metrics(self, rollout: Rollout | None) -> dict[str, float]:
        everywhere = gather_objects(self.accelerator, dict(rollout.metrics) if rollout is not None else {})
        names = dict.fromkeys(name for metrics in everywhere for name in metrics)
        reported = {name: [metrics[name] for metrics in everywhere if name in metrics] for name in names}
        return {name: sum(values) / len(values) for name, values in reported.items()}

    def _evaluate(self) -> dict[str, float]:
        assert self.evaluate is not None
        with preserved_random_state():
            return {f"evaluation/{name.removeprefix('evaluation/')}": value for name, value in self.evaluate().items()}

    def _best_name(self) -> str:
        return f"evaluation/{(self.config.best_metric or '').removeprefix('evaluation/')}"

    def _improves(self, evaluation: dict[str, float]) -> bool:
        """Whether this evaluation is the best so far, as the main process sees it."""
        if self.config.best_metric is None:
            return False
        metric = self._best_name()
        if metric not in evaluation:
            raise TrainingError(
                "the evaluation has no such metric",
                where="run.best_metric",
                got=self.config.best_metric,
                expected=", ".join(sorted(evaluation)),
            )
        best = self._store.best_record()
        gain = 0.0 if best is None else evaluation[metric] - best["value"]
        better = best is None or (gain < 0 if lowest_is_best(self.config) else gain > 0)
        return gather_objects(self.accelerator, better)[0]

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def say(self, text: str) -> None:
        """Print a sentence on the main process."""
        self._console.say(text)

    def show(self, renderable: Any) -> None:
        """Print something of rich's, such as a table, on the main process."""
        self._console.show(renderable)

    def stopped(self) -> None:
        """Leave terminal and trackers in order after an interruption, and say how to go on."""
        self._console.stop()
        if self._trackers is not None:
            self._trackers.finish()
        latest = self.latest_checkpoint
        where = f"run.resume=true goes on from {latest}" if latest else "it has no checkpoint"
        self._console.say(f"stopped after iteration {self.completed} of {self.total}; {where}")

    def finish(self, **extra: Any) -> dict[str, float]:
        """Write summary.json.

        Args:
            extra: Numbers join the metrics, anything else the summary.

        Returns:
            The metrics: those of the last iteration, of the last evaluation, and the extra ones.
        """
        self._console.stop()
        numbers = {key: value for key, value in extra.items() if isinstance(value, int | float)}
        metrics = {key: value for key, value in self._last.items() if key != "seconds"} | numbers
        if self.evaluate is not None and not any(name.startswith("evaluation/") for name in metrics):
            metrics |= self._evaluate()
        if self._trackers is not None:
            self._trackers.finish()
        if self._is_main:
            summary = {
                "recipe": self.recipe,
                "config_name": self.config_name,
                "seed": self.config.seed,
                "iterations": self.completed,
                "seconds": self._seconds(),
                **({} if self._ended_because is None else {"ended_because": self._ended_because}),
                "metrics": metrics,
                "versions": package_versions(),
                "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                **{key: value for key, value in extra.items() if key not in numbers},
            }
            write_atomically(self.directory / "summary.json", json.dumps(jsonable(summary), indent=2) + "\n")
        return metrics


def _replicated(thing: Stateful) -> bool:
    return bool(getattr(thing, "replicated", False))


def _due(iteration: int, every: int, is_last: bool) -> bool:
    return is_last or (every > 0 and iteration % every == 0)
