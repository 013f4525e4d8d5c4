"""The step-0 doctor: looks at the first rollout before anything is learned from it.

Most runs that fail were broken before their first update: a ratio that is not 1, a reference that is another model, a
generator that samples from something else than what is trained, rewards that say nothing, an end that cannot be
written. All of it shows in one rollout. What would train on garbage is refused; the rest is told with its remedy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from rlhf.config import Config
from rlhf.core.types import Experience, Rollout
from rlhf.errors import TrainingError
from rlhf.lm.collector import PromptCollector
from rlhf.lm.doctor_checks import CheckName, Finding, examine
from rlhf.lm.episode_collector import EpisodeCollector
from rlhf.lm.evidence import gather_evidence
from rlhf.training.checkpoints import write_atomically
from rlhf.training.learner import Learner
from rlhf.training.metrics import jsonable
from rlhf.training.run import Run


class DoctorConfig(Config):
    """Checks of the first rollout, before the first update."""

    enabled: bool = True
    """False trains on whatever comes."""
    allow: list[CheckName] = []
    """Checks that may fail: what they would refuse becomes a warning."""
    rows: int = 16
    """Completions that are scored once more for the ratio and the end token."""


class Doctor:
    """An `Observer` that acts before the first update only.

    Args:
        config: Settings.
        run: Its console gets the table, its directory `doctor.json`.
        learner: Whose forward is compared with what was collected.
        collector: Its settings, tokenizer and reference.
    """

    def __init__(
        self, config: DoctorConfig, *, run: Run, learner: Learner, collector: PromptCollector | EpisodeCollector
    ) -> None:
        """Nothing is looked at yet."""
        self._config, self._run, self._learner, self._collector = config, run, learner, collector

    def before_update(self, iteration: int, rollout: Rollout, experience: Experience) -> str | None:
        """Examine the first rollout.

        Raises:
            TrainingError: Training on it would be training on garbage.
        """
        if iteration != 1:
            return None
        evidence = gather_evidence(
            rollout, experience, learner=self._learner, collector=self._collector, rows=self._config.rows
        )
        findings = examine(evidence, allow=self._config.allow)
        if self._run.accelerator.is_main_process:
            write_record(self._run.directory / "doctor.json", findings)
        self._run.show(as_table(findings))
        for finding in findings:
            if finding.verdict != "ok":
                self._run.say(f"  {finding.name}: {finding.remedy}.")
        refuse(findings)
        return None

    def after_update(self, iteration: int, metrics: dict[str, float]) -> dict[str, float]:
        """Nothing to add."""
        return {}


def write_record(path: Path, findings: Sequence[Finding]) -> None:
    """Write doctor.json."""
    record = {"checks": [finding.model_dump() for finding in findings]}
    write_atomically(path, json.dumps(jsonable(record), indent=2) + "\n")


def as_table(findings: Sequence[Finding]) -> Table:
    """What was found, for the console; the remedies are told below it."""
    table = Table(title="before the first update", title_justify="left")
    for header in ("check", "found", "verdict"):
        table.add_column(header, overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "refused": "red"}
    for finding in findings:
        table.add_row(finding.name, finding.measured, f"[{colours[finding.verdict]}]{finding.verdict}[/]")
    return table


def refuse(findings: Sequence[Finding]) -> None:
    """Stop the run where a check refused.

    Raises:
        TrainingError: With every refusal and its remedy.
    """
    refused = [finding for finding in findings if finding.verdict == "refused"]
    if not refused:
        return
    names = ", ".join(finding.name for finding in refused)
    raise TrainingError(
        "this would train on garbage: " + "; ".join(f"{f.name}: {f.measured} ({f.remedy})" for f in refused),
        where="before the first update",
        remedy=f"If that is what you want: doctor.allow=[{names}].",
    )
