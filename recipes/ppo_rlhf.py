"""Train a language model with PPO: a critic, a KL leash to the start, a reward model or any other reward."""

from __future__ import annotations

from pydantic import Field

from rlhf.cli import launch
from rlhf.core.presets import AlgorithmChoice
from rlhf.lm.fine_tuning import FineTuningConfig, fine_tune


class PpoRlhfConfig(FineTuningConfig):
    """A run: see `rlhf.lm.fine_tuning`, where the parts are wired together."""

    algorithm: AlgorithmChoice = Field("ppo_rlhf", validate_default=True)


def main(config: PpoRlhfConfig) -> dict[str, float]:
    """Train, evaluate, save the model to `<run directory>/model`."""
    return fine_tune(config, recipe="ppo_rlhf")


CONFIG = PpoRlhfConfig

if __name__ == "__main__":
    launch(__file__)
