"""Train a language model in a text environment: many turns an episode, a reward for each, the same loop as CartPole."""

from __future__ import annotations

from rlhf.cli import launch
from rlhf.lm.episode_training import EpisodeTrainingConfig, train_on_episodes


def main(config: EpisodeTrainingConfig) -> dict[str, float]:
    """Play, learn, evaluate, save the model to `<run directory>/model`."""
    return train_on_episodes(config, recipe="text_environment")


CONFIG = EpisodeTrainingConfig

if __name__ == "__main__":
    launch(__file__)
