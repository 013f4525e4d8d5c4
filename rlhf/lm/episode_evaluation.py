"""How well a policy plays: the mean return of episodes that training never sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pydantic import Field

from rlhf.config import Config
from rlhf.lm.episode_collector import EpisodeCollector
from rlhf.lm.episodes import begin_episode, play_episodes
from rlhf.lm.evaluation import NORMAL_95, mean_and_standard_error
from rlhf.lm.generation import bring_up_to_date
from rlhf.lm.prompt_stream import mix_seed
from rlhf.training.distributed import gather_objects
from rlhf.training.sharding import whole_weights


class EpisodeEvaluationConfig(Config):
    """How many episodes are played for evaluation."""

    episodes: int = Field(128, ge=1)
    """Start states, shared by all processes; the same at every evaluation."""
    greedy: bool = True
    """Play each once with the most likely tokens."""
    sampled: bool = True
    """Play each once at the policy's own temperature."""
    seed: int = 0
    """Of start states and drawn turns; training never draws from this stream."""


def make_episode_evaluation(
    collector: EpisodeCollector, config: EpisodeEvaluationConfig
) -> Callable[[], dict[str, float]]:
    """What `Run.evaluate` takes: play unseen episodes with the collector's generator, lengths and temperature.

    Returns:
        A function that returns for each pass `greedy` and `sampled`: `PASS_score_mean` (undiscounted return),
        `PASS_score_standard_error`, `PASS_score_ci95` (half width), `PASS_turns_mean`, `PASS_truncated_fraction`.
    """
    accelerator = collector.accelerator
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    environments = [collector.factory() for _ in range(rank, config.episodes, processes)]

    def play(name: str, *, greedy: bool) -> dict[str, float]:
        seeds = [mix_seed("evaluation episode", config.seed, n) for n in range(rank, config.episodes, processes)]
        pairs = zip(environments, seeds, strict=True)
        episodes = [begin_episode(one, collector.tokenizer, seed=seed) for one, seed in pairs]
        play_episodes(
            collector.generator,
            collector.tokenizer,
            episodes,
            sampling=collector.config.sampling.model_copy(update={"greedy": greedy}),
            max_episode_length=collector.config.max_episode_length,
            rows_per_batch=collector.config.episodes_per_batch,
            device=collector.device,
            random=torch.Generator().manual_seed(mix_seed("evaluation", config.seed, rank)),
        )
        told = [(episode.score, float(episode.turns), float(episode.truncated)) for episode in episodes]
        everywhere = [told] if accelerator is None else gather_objects(accelerator, told)
        scores, turns, truncated = zip(*(row for part in everywhere for row in part), strict=True)
        mean, error = mean_and_standard_error(scores)
        return {
            f"{name}_score_mean": mean,
            f"{name}_score_standard_error": error,
            f"{name}_score_ci95": NORMAL_95 * error,
            f"{name}_turns_mean": sum(turns) / len(turns),
            f"{name}_truncated_fraction": sum(truncated) / len(truncated),
        }

    def evaluate() -> dict[str, float]:
        with whole_weights(collector.policy):
            bring_up_to_date(collector.generator)
            metrics = play("greedy", greedy=True) if config.greedy else {}
            return metrics | (play("sampled", greedy=False) if config.sampled else {})

    return evaluate
