"""The one outer loop, for gym agents and language models alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Protocol

from rlhf.core.algorithm import KlInLoss, NoKl
from rlhf.core.estimate import estimate
from rlhf.core.kl import KlCoefficient, make_kl_coefficient
from rlhf.core.types import Experience, Rollout
from rlhf.errors import TrainingError
from rlhf.training.learner import Learner
from rlhf.training.run import Run
from rlhf.training.tally import measure_experience


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


class Observer(Protocol):
    """Looks at a run as it goes: warns, refuses, or ends it. It decides alike on all processes."""

    def before_update(self, iteration: int, rollout: Rollout, experience: Experience) -> str | None:
        """Look at what was collected.

        Returns:
            Why the run ends here, without this update; None goes on.

        Raises:
            TrainingError: What must not be trained on.
        """
        ...

    def after_update(self, iteration: int, metrics: dict[str, float]) -> dict[str, float]:
        """Look at the iteration's metrics, those of the rollout included, and return further ones."""
        ...


def optimize_policy(
    collector: Collector,
    learner: Learner,
    run: Run,
    *,
    observers: Sequence[Observer] = (),
    critic_warmup: int = 0,
) -> dict[str, float]:
    """Collect, credit, learn, record, until the run's iterations are done.

    Args:
        collector: Where rollouts come from.
        learner: What learns from them; it brings the algorithm.
        run: Where everything is written; with `run.resume` the loop goes on exactly where the run stopped.
        observers: Look at every iteration, in this order.
        critic_warmup: First iterations in which only the critic learns. The KL coefficient rests too: the policy does
            not move, so that an adaptive rule would only see its KL of 0.

    Returns:
        The metrics of summary.json.

    Raises:
        TrainingError: A loss that is not finite, with the iteration and the last good checkpoint.
    """
    kl_coef = make_kl_coefficient(learner.algorithm.kl)
    run.track(collector=collector, learner=learner, kl_coefficient=kl_coef)
    try:
        for iteration in run.iterations():
            started = time.monotonic()
            rollout = collector.collect()
            collected = time.monotonic()
            experience = estimate(rollout, learner.algorithm, kl_coef=kl_coef.value, reduce=learner.reduce)
            warms_up = iteration <= critic_warmup
            try:
                reason = _look(observers, iteration, rollout, experience)
                if reason is None:
                    metrics = learner.update(
                        experience,
                        kl_coef=kl_coef.value,
                        progress=run.progress(iteration),
                        progress_step=1 / run.total,
                        critic_only=warms_up,
                    )
                else:
                    metrics = measure_experience(experience, reduce=learner.reduce)
            except TrainingError as error:
                raise _with_iteration(error, iteration, run) from error
            if reason is None and not warms_up:
                _update_coefficient(kl_coef, metrics, learner)
            if critic_warmup:
                metrics["critic_warmup"] = float(warms_up)
            metrics["time/collect_seconds"] = collected - started
            metrics["time/update_seconds"] = time.monotonic() - collected
            for observer in observers:
                metrics |= observer.after_update(iteration, {**rollout.metrics, **metrics})
            run.finish_iteration(iteration, rollout, metrics, ends_because=reason)
            if reason is not None:
                break
    except BaseException:
        run.stopped()
        raise
    return run.finish()


def _look(observers: Sequence[Observer], iteration: int, rollout: Rollout, experience: Experience) -> str | None:
    """Let all observers look; the first reason to end the run counts."""
    reasons = [observer.before_update(iteration, rollout, experience) for observer in observers]
    return next((reason for reason in reasons if reason is not None), None)


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
