"""Train a language model with a group algorithm (GRPO, RLOO, DAPO, ...) and rewards that a program can verify."""

from __future__ import annotations

from pydantic import Field

from rlhf.cli import launch
from rlhf.core.presets import AlgorithmChoice
from rlhf.lm.collector_config import CollectorConfig
from rlhf.lm.fine_tuning import FineTuningConfig, fine_tune


class GrpoConfig(FineTuningConfig):
    """A run: see `rlhf.lm.fine_tuning`, where the parts are wired together."""

    algorithm: AlgorithmChoice = Field("grpo", validate_default=True)
    collector: CollectorConfig = CollectorConfig(group_size=8)


def main(config: GrpoConfig) -> dict[str, float]:
    """Train, evaluate, save the model to `<run directory>/model`."""
    return fine_tune(config, recipe="grpo")


CONFIG = GrpoConfig

if __name__ == "__main__":
    launch(__file__)
