"""The verifiers of reasoning-gym's tasks as a reward function.

Tried with reasoning-gym 0.1.25, three records of each task: 99 of 105 verifiers give the record's own answer the full
mark and a wrong number less. boxnet, graph_color, propositional_logic, rubiks_cube and rush_hour have no single answer
to try; game_of_life_halting takes anything but the opposite for right, so reward it behind a format gate.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf.errors import RewardError
from rlhf.rewards.protocol import Text, text_of

TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def load_reasoning_gym() -> Any:
    """The package, or an error that says how to install it.

    Raises:
        RewardError: It is not installed.
    """
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise RewardError(
            f"reasoning-gym cannot be imported: {error}",
            where="reasoning_gym",
            remedy="Install it: pip install 'rlhf-toolkit[reasoning]' (or pip install reasoning-gym).",
        ) from error


class ReasoningGym:
    """What the task's own verifier gives the answer, from 0 to 1; many give partial credit.

    The answer stands in the completion's last <answer> tags; without them it is `untagged_score`, or, where that is
    None, the whole completion counts as the answer. A verifier that raises on an answer gives 0. The shares of both
    are metrics: `reasoning_gym_untagged` and `reasoning_gym_failed`.

    Args:
        untagged_score: Score of a completion without <answer> tags; None judges the whole text.

    Raises:
        RewardError: reasoning-gym is not installed.
    """

    def __init__(self, *, untagged_score: float | None = 0.0) -> None:
        self._package = load_reasoning_gym()
        self._verifiers: dict[str, Callable[..., float]] = {}
        self.untagged_score = untagged_score
        self.__name__ = "reasoning_gym"

    def __call__(
        self,
        completions: Sequence[Text],
        entry: Sequence[Mapping[str, Any]],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Score completions against the column `entry`: the task's whole record, as reasoning-gym drew it."""
        untagged = failed = 0
        scores: list[float] = []
        for completion, record in zip(completions, entry, strict=True):
            text = text_of(completion)
            tagged = TAGGED.findall(text)
            untagged += not tagged
            if not tagged and self.untagged_score is not None:
                scores.append(self.untagged_score)
                continue
            answer = (tagged[-1] if tagged else text).strip()
            try:
                scores.append(float(self._verifier(record)(answer, dict(record))))
            except RewardError:
                raise
            except Exception:  # a verifier may raise anything on an answer that it cannot read
                failed += 1
                scores.append(0.0)
        if log_metric is not None and scores:
            log_metric("reasoning_gym_untagged", untagged / len(scores))
            log_metric("reasoning_gym_failed", failed / len(scores))
        return scores

    def _verifier(self, record: Mapping[str, Any]) -> Callable[..., float]:
        name = record.get("metadata", {}).get("source_dataset")
        if name is None:
            raise RewardError(
                "a record does not say which task it is of",
                where="reasoning_gym, column entry",
                got=sorted(record),
                expected="a record of reasoning-gym, with metadata.source_dataset",
            )
        if name not in self._verifiers:
            self._verifiers[name] = self._package.get_score_answer_fn(name)
        return self._verifiers[name]
