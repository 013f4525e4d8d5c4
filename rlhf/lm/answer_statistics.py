"""What several answers to a prompt are worth: pass@k, majority votes, and one model against another."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache

from rlhf.errors import DataError


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Probability that at least one of k answers, drawn without replacement from those given, is right.

    `1 - C(n - c, k) / C(n, k)`. Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1.

    >>> pass_at_k(8, 1, 4)
    0.5
    """
    _require_answers(answers, k, "pass@k")
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def majority_at_k(answers: Sequence[Hashable | None], scores: Sequence[float], k: int) -> float:
    """Expected score of the answer that most of k answers give, drawn without replacement from those given.

    Exact, by counting the subsets; ties are broken at random, that is, the answers in front share the outcome. An
    answer that nobody could read (None) has no vote, and a vote without any voice is worth 0. An answer's score is the
    mean over those who gave it: they can differ where the reward looks at more than the answer.
    Source of the vote: Wang et al. 2022, https://arxiv.org/abs/2203.11171.

    Args:
        answers: What n completions of a prompt answer, in a form in which equal answers are equal.
        scores: Their n scores.
        k: 1 <= k <= n.

    >>> majority_at_k(["4", "4", "5"], [1.0, 1.0, 0.0], 3), majority_at_k(["4", "4", "5"], [1.0, 1.0, 0.0], 1)
    (1.0, 0.6666666666666666)
    """
    _require_answers(len(answers), k, "maj@k")
    votes: dict[Hashable, list[float]] = {}
    for answer, score in zip(answers, scores, strict=True):
        if answer is not None:
            votes.setdefault(answer, []).append(score)
    classes = sorted((len(given), sum(given) / len(given)) for given in votes.values())
    silent = len(answers) - sum(count for count, _ in classes)
    return _expected_winner(tuple(classes), silent, k)


@lru_cache(maxsize=100_000)  # most prompts share few patterns, such as all right or all different
def _expected_winner(classes: tuple[tuple[int, float], ...], silent: int, k: int) -> float:
    total = 0.0
    for top in range(1, k + 1):
        # Per (drawn so far, answers that have `top` votes): subsets, and the sum over them of those answers' scores.
        ways = {(drawn, 0): (math.comb(silent, drawn), 0.0) for drawn in range(min(silent, k) + 1)}
        for count, score in classes:
            ways = _with_another_answer(ways, count, score, top=top, k=k)
        total += sum(scored / leaders for (drawn, leaders), (_, scored) in ways.items() if drawn == k and leaders)
    return total / math.comb(silent + sum(count for count, _ in classes), k)


def _with_another_answer(
    ways: Mapping[tuple[int, int], tuple[int, float]], count: int, score: float, *, top: int, k: int
) -> dict[tuple[int, int], tuple[int, float]]:
    """Subsets that take 0 to `top` of one more answer's `count` completions."""
    extended: dict[tuple[int, int], tuple[int, float]] = {}
    for (drawn, leaders), (subsets, scored) in ways.items():
        for taken in range(min(count, top, k - drawn) + 1):
            leads = taken == top
            factor = math.comb(count, taken)
            key = (drawn + taken, leaders + leads)
            before = extended.get(key, (0, 0.0))
            gained = factor * (scored + subsets * score * leads)
            extended[key] = (before[0] + factor * subsets, before[1] + gained)
    return extended


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Share of all pairs of our answer and theirs in which ours scores higher; equal scores count half.

    >>> win_rate([1.0, 3.0], [2.0, 1.0])
    0.625
    """
    if not ours or not theirs:
        raise DataError("a win rate needs an answer of each model", got=(len(ours), len(theirs)))
    outcomes = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ours for b in theirs]
    return sum(outcomes) / len(outcomes)


def _require_answers(answers: int, k: int, name: str) -> None:
    if not 1 <= k <= answers:
        raise DataError(f"{name} needs at least k answers a prompt", got=f"{answers} answers, k={k}")
