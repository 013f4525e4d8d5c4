"""Any reward function held against rankings: its scores of every completion, a table by subset, a reliability plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reward_models.collation import text_length
from reward_models.evaluation import Reliability, evaluate_table, reliability
from reward_models.reward_bench import SubsetResult, rank_table
from rlhf.data.records import Ranking
from rlhf.rewards.protocol import score_completions


def score_with(reward: Callable[..., Any], rankings: Sequence[Ranking], *, completions_per_call: int = 256) -> Tensor:
    """Ask a reward function for a score of every completion.

    Args:
        reward: Called as in RL, with the prompts, the completions and the rankings' other columns.
        rankings: P rankings.
        completions_per_call: Most completions in one call.

    Returns:
        [P, K] float32; 0 where a ranking has fewer than K completions.

    Raises:
        RewardError: The function fails.
    """
    rows = [(ranking, completion) for ranking in rankings for completion in ranking.completions]
    names = sorted({name for ranking in rankings for name in ranking.columns})
    scores: list[Tensor] = []
    for start in range(0, len(rows), completions_per_call):
        part = rows[start : start + completions_per_call]
        scores.append(
            score_completions(
                reward,
                prompts=[ranking.prompt for ranking, _ in part],
                completions=[completion for _, completion in part],
                columns={name: [ranking.columns.get(name) for ranking, _ in part] for name in names},
            )
        )
    _, mask = rank_table(rankings)
    table = torch.zeros(mask.shape)
    table[mask] = torch.cat(scores)
    return table


def judge(
    scores: Tensor, rankings: Sequence[Ranking], *, bins: int = 10, seed: int = 0
) -> tuple[dict[str, float], Reliability]:
    """Return the metrics of `evaluate_scores`, and how pairs are calibrated.

    Args:
        scores: [P, K], from `score_with`.
        rankings: The P rankings.
        bins: Of the reliability plot and its error.
        seed: Of the bootstrap.
    """
    ranks, mask = rank_table(rankings)
    lengths = torch.zeros(mask.shape)
    lengths[mask] = torch.tensor([float(text_length(text)) for ranking in rankings for text in ranking.completions])
    metrics = evaluate_table(scores, ranks, mask=mask, lengths=lengths, seed=seed)
    binned = reliability(scores, ranks, mask=mask, bins=bins)
    return {**metrics, "calibration_error": binned.error()}, binned


def table_rows(results: Sequence[SubsetResult]) -> list[list[str]]:
    """Cells of a table: subset, rows, score, 95 % interval."""
    return [
        [one.name, str(one.rows), f"{one.score:.3f}", "" if one.low != one.low else f"{one.low:.3f} to {one.high:.3f}"]
        for one in results
    ]


def draw_reliability(binned: Reliability, path: str | Path) -> None:
    """Draw accuracy against confidence, with the number of pairs of each bin, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pairs, confidence, accuracy = (values.numpy() for values in (binned.pairs, binned.confidence, binned.accuracy))
    edges = torch.linspace(0.5, 1.0, len(pairs) + 1).numpy()
    width = float(edges[1] - edges[0])
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(4.5, 5.5), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    filled = pairs > 0
    above.bar(edges[:-1][filled], accuracy[filled], width, align="edge", alpha=0.6, edgecolor="white")
    above.plot(confidence[filled], accuracy[filled], "o", color="black", markersize=4)
    above.plot([0.5, 1], [0.5, 1], "--", color="grey", label="calibrated")
    above.set(ylabel="the higher score wins", ylim=(0, 1), title=f"expected calibration error {binned.error():.3f}")
    above.legend(loc="lower right")
    below.bar(edges[:-1], pairs, width, align="edge", color="grey")
    below.set(xlabel="confidence: sigmoid of the score gap", ylabel="pairs", xlim=(0.5, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
