"""Normalized Atari scores: the functions, the published numbers with their protocols, and tables of both.

A number without its protocol says little: DQN's median is 93.5 % on 49 games from no-op starts (van Hasselt et al.
2016), 79.1 % on 57 games (Wang et al. 2016), 83 % in another laboratory's re-run (Fortunato et al. 2018), 68.5 % on 57
and 47.5 % on 49 games from human starts. "No-op": up to 30 no-op actions before the agent takes over; "human": it takes
over in the middle of a human's game.

The files of `atari_scores/`:

    medians.csv          medians and means over games as printed, with starts, number of games and paper
    nature_noop.csv      49 games: random, human and DQN of Mnih et al. 2015 (https://www.nature.com/articles/nature14236)
    references_noop.csv  57 games: random and human as DQN Zoo and most later papers use them (Wang et al. 2016)
    rainbow_noop.csv     54 games: Rainbow (Hessel et al. 2018); its table lacks Jamesbond, River Raid and Up'n Down

Per-game numbers were transcribed from rldb (https://github.com/seungjaeryanlee/rldb) and DQN Zoo
(https://github.com/google-deepmind/dqn_zoo, atari_data.py), which copied them from the papers.
"""

from __future__ import annotations

import csv
from importlib import resources
from typing import NamedTuple

import numpy as np

from rlhf.errors import ConfigError


class Median(NamedTuple):
    """One published aggregate, as a fraction: 1.0 is human level."""

    agent: str
    starts: str
    """no-op or human."""
    games: int
    median: float
    mean: float | None
    """None where the paper prints no mean."""
    source: str


class References(NamedTuple):
    """What 0 and 1 are, per game."""

    random: dict[str, float]
    human: dict[str, float]


def human_normalized(score: float, *, random: float, human: float) -> float:
    """(score - random) / (human - random): 0 plays like random actions, 1 like the human tester.

    Source: Mnih et al. 2015.

    >>> human_normalized(401.2, random=1.7, human=31.8)  # DQN's Breakout
    13.2724...
    """
    return (score - random) / (human - random)


def improvement(score: float, *, baseline: float, random: float, human: float) -> float:
    """(score - baseline) / (max(human, baseline) - random), the bars that compare dueling networks with a baseline.

    Unlike a quotient of scores it does not explode where the baseline is near 0. Source: Wang et al. 2016, equation 10,
    https://arxiv.org/abs/1511.06581.

    >>> improvement(30.0, baseline=20.0, random=0.0, human=10.0), improvement(8.0, baseline=4.0, random=0.0, human=10.0)
    (0.5, 0.4)
    """
    return (score - baseline) / (max(human, baseline) - random)


def summarize(scores: dict[str, float], references: References) -> tuple[float, float]:
    """Return median and mean over games of human-normalized scores.

    Args:
        scores: Game -> score.
        references: Of all these games.

    Raises:
        ConfigError: A game without reference.
    """
    unknown = sorted(set(scores) - set(references.random))
    if unknown or not scores:
        raise ConfigError(
            "no reference for these games", where="normalized_scores", got=", ".join(unknown[:5]) or "no game at all"
        )
    values = [
        human_normalized(score, random=references.random[game], human=references.human[game])
        for game, score in scores.items()
    ]
    return float(np.median(values)), float(np.mean(values))


def read_references(name: str = "references_noop") -> References:
    """Return the random and human scores of a file: `references_noop` (57 games) or `nature_noop` (49)."""
    rows = _read(name)
    return References({r["game"]: float(r["random"]) for r in rows}, {r["game"]: float(r["human"]) for r in rows})


def read_scores(name: str, agent: str) -> dict[str, float]:
    """Return an agent's published score per game: ("nature_noop", "dqn") or ("rainbow_noop", "rainbow")."""
    return {row["game"]: float(row[agent]) for row in _read(name)}


def read_medians() -> list[Median]:
    """Return all published aggregates."""
    return [
        Median(
            row["agent"],
            row["starts"],
            int(row["games"]),
            float(row["median"]),
            float(row["mean"]) if row["mean"] else None,
            row["source"],
        )
        for row in _read("medians")
    ]


def _read(name: str) -> list[dict[str, str]]:
    file = resources.files("classic_rl.experiments") / "atari_scores" / f"{name}.csv"
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


def game_name(environment: str) -> str:
    """Return a game's name in the files of an environment's id.

    >>> game_name("ale_py:ALE/SpaceInvaders-v5"), game_name("ALE/UpNDown-v5")
    ('space_invaders', 'up_n_down')

    Raises:
        ConfigError: The id names no game of the 57.
    """
    short = environment.rpartition("/")[2].rpartition("-")[0].lower()
    for game in read_references().random:
        if game.replace("_", "") == short:
            return game
    raise ConfigError("no such Atari game among the 57", where="environment.id", got=environment)
