"""Reward models learnt from K-way rankings, saved as ordinary sequence-classification folders.

Names are looked up in their modules when they are first used, so that importing this package costs nothing and
`reward_models:RewardModelScorer.from_pretrained` works in a config.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlhf import __version__

if TYPE_CHECKING:
    from reward_models.collation import EncodedRanking, RankingCollator, encode_rankings
    from reward_models.ensemble import EnsembleScorer, combine_scores
    from reward_models.evaluation import evaluate_scores, score_rankings
    from reward_models.judging import draw_reliability, judge, score_with
    from reward_models.loading import make_reward_model, prepare_tokenizer
    from reward_models.losses import (
        AllPairs,
        BestOf,
        Margin,
        PlackettLuce,
        best_of_loss,
        centering_loss,
        pairwise_ranking_loss,
        plackett_luce_loss,
    )
    from reward_models.model import RewardModel
    from reward_models.procedural import rank_random_answers
    from reward_models.recording import optimize_reward_model
    from reward_models.reward_bench import benchmark_table
    from reward_models.scorer import RewardModelScorer
    from reward_models.settings import Centering, Normalization, RewardModelConfig
    from reward_models.trainer import RankingTrainer, make_trainer, train_reward_model

_MODULES = {
    "collation": ("EncodedRanking", "RankingCollator", "encode_rankings"),
    "ensemble": ("EnsembleScorer", "combine_scores"),
    "evaluation": ("evaluate_scores", "score_rankings"),
    "loading": ("make_reward_model", "prepare_tokenizer"),
    "judging": ("draw_reliability", "judge", "score_with"),
    "losses": (
        "AllPairs",
        "BestOf",
        "Margin",
        "PlackettLuce",
        "best_of_loss",
        "centering_loss",
        "pairwise_ranking_loss",
        "plackett_luce_loss",
    ),
    "model": ("RewardModel",),
    "procedural": ("rank_random_answers",),
    "recording": ("optimize_reward_model",),
    "reward_bench": ("benchmark_table",),
    "scorer": ("RewardModelScorer",),
    "settings": ("Centering", "Normalization", "RewardModelConfig"),
    "trainer": ("RankingTrainer", "make_trainer", "train_reward_model"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AllPairs",
    "BestOf",
    "Centering",
    "EncodedRanking",
    "EnsembleScorer",
    "Margin",
    "Normalization",
    "PlackettLuce",
    "RankingCollator",
    "RankingTrainer",
    "RewardModel",
    "RewardModelConfig",
    "RewardModelScorer",
    "__version__",
    "benchmark_table",
    "best_of_loss",
    "centering_loss",
    "combine_scores",
    "draw_reliability",
    "encode_rankings",
    "evaluate_scores",
    "judge",
    "make_reward_model",
    "make_trainer",
    "optimize_reward_model",
    "pairwise_ranking_loss",
    "plackett_luce_loss",
    "prepare_tokenizer",
    "rank_random_answers",
    "score_rankings",
    "score_with",
    "train_reward_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
