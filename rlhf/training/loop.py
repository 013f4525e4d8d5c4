"""The one outer loop, for gym agents and language models alike."""

from __future__ import annotations

import time
from typing import Any, Protocol

from rlhf.core.algorithm import KlInLoss, NoKl
from rlhf.core.estimate import estimate
from rlhf.core.kl import KlCoefficient, make_kl_coefficient
from rlhf.core.types import Rollout
from rlhf.errors import TrainingError
from rlhf.training.learner import Learner
from rlhf.training.run import Run


class Collector(Protocol):
    """Gathers experience; the only part that differs between the two worlds."""

    def collect(self) -> Rollout:
        """Return one iteration's facts."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what going on exactly needs: positions, generators, environments."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        ...


def optimize_policy(collector: Collector, learner: Learner, run: Run) -> dict[str, float]:
    """Collect, credit, learn, record, until the run's iterations are done.

    Args:
        collector: Where rollouts come from.
        learner: What learns from them; it brings the algorithm.
        run: Where everything is written; with `run.resume` the loop goes on exactly where the run stopped.

    Returns:
        The metrics of summary.json.

    Raises:
        TrainingError: A loss that is not finite, with the iteration and the last good checkpoint.
    """
    algorithm = learner.algorithm
    kl_coef = make_kl_coefficient(algorithm.kl)
    run.track(collector=collector, learner=learner, kl_coefficient=kl_coef)
    try:
        for iteration in run.iterations():
            started = time.monotonic()
            rollout = collector.collect()
            collected = time.monotonic()
            experience = estimate(rollout, algorithm, kl_coef=kl_coef.value, reduce=learner.reduce)
            try:
                metrics = learner.update(
                    experience, kl_coef=kl_coef.value, progress=run.progress(iteration), progress_step=1 / run.total
                )
            except TrainingError as error:
                raise _with_iteration(error, iteration, run) from error
            _update_coefficient(kl_coef, metrics, learner)
            metrics["time/collect_seconds"] = collected - started
            metrics["time/update_seconds"] = time.monotonic() - collected
            run.finish_iteration(iteration, rollout, metrics)
    except BaseException:
        run.stopped()
        raise
    return run.finish()


def _update_coefficient(kl_coef: KlCoefficient, metrics: dict[str, float], learner: Learner) -> None:
    """Steer by the KL that the algorithm's term holds down, in the coefficient's unit."""
    kl = learner.algorithm.kl
    if isinstance(kl, NoKl):
        return
    against_old = isinstance(kl, KlInLoss) and kl.against == "old_policy"
    name = "kl_to_old_after" if against_old else "kl_to_ref"
    if name not in metrics:  # a fixed coefficient needs no measurement
        return
    measured = metrics[name if kl_coef.unit == "token" else f"{name}_per_sequence"]
    kl_coef.update(measured, episodes=int(metrics["rows"]))


def _with_iteration(error: TrainingError, iteration: int, run: Run) -> TrainingError:
    latest = run.latest_checkpoint
    last_good = f"The last good checkpoint is {latest}." if latest is not None else "There is no checkpoint yet."
    return TrainingError(str(error).rstrip("."), where=f"iteration {iteration}", remedy=last_good)
