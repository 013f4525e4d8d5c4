"""The best model of a fine-tuning run, and when to stop looking for a better one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rlhf.errors import ConfigError


class BestModel:
    """Saves the model whenever an evaluation is the best so far; counts those that were not.

    Args:
        save: Writes the model as it is now.
        metric: Of the evaluation, such as "loss".
        highest: True where more is better.
        patience: Evaluations in a row without a better one after which the run is over; None never ends it.

    >>> saved = []
    >>> best = BestModel(lambda: saved.append("model"), metric="loss", highest=False, patience=2)
    >>> [best.look({"loss": loss}, step=step) for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5))]
    [None, None, None]
    >>> best.look({"loss": 2.0}, step=40)
    'loss was not better than 2 in 2 evaluations in a row'
    >>> len(saved), best.best, best.step
    (2, 2.0, 20)
    """

    replicated = True
    """The same on all processes: a checkpoint keeps it once."""

    def __init__(self, save: Callable[[], None], *, metric: str, highest: bool, patience: int | None) -> None:
        self._save, self.metric, self._sign = save, metric, 1.0 if highest else -1.0
        self._patience = patience
        self.best: float | None = None
        self.step = 0
        self._waited = 0

    def look(self, evaluation: Mapping[str, float], *, step: int) -> str | None:
        """Take note of an evaluation; every process calls it with the same numbers.

        Returns:
            Why the run should end now, or None.

        Raises:
            ConfigError: The evaluation has no such metric.
        """
        if self.metric not in evaluation:
            raise ConfigError(
                "the evaluation has no such metric",
                where="run.best_metric",
                got=self.metric,
                expected=", ".join(sorted(evaluation)),
            )
        value = evaluation[self.metric]
        if self.best is None or self._sign * (value - self.best) > 0:
            self.best, self.step, self._waited = value, step, 0
            self._save()
            return None
        self._waited += 1
        if self._patience is None or self._waited < self._patience:
            return None
        return f"{self.metric} was not better than {self.best:.6g} in {self._waited} evaluations in a row"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"best": self.best, "step": self.step, "waited": self._waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.best, self.step, self._waited = state["best"], state["step"], state["waited"]
