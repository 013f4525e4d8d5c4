"""Rankings of a model's own answers: what labellers would hand in, by a stated rule.

K completions are drawn per prompt and ordered by a reward function. The scores are then forgotten, so that a reward
model trained on the file sees an order only, as it would from people.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from rlhf.data.records import Ranking, ranks_from_scores
from rlhf.errors import DataError
from rlhf.lm.samples import Samples


def rank_samples(samples: Samples, scores: Tensor, *, num_candidates: int, min_gap: float = 0.0) -> list[Ranking]:
    """Order the completions of each prompt by their scores.

    Args:
        samples: R = N x K completions, the K of a prompt next to one another.
        scores: [R]; higher is better.
        num_candidates: K, at least 2.
        min_gap: Scores nearer than this to the next one tie.

    Returns:
        N rankings, those that prefer nothing (all tied) included: the caller decides about them.
    """
    rankings = []
    for start in range(0, len(samples.completions), num_candidates):
        group = slice(start, start + num_candidates)
        rankings.append(
            Ranking(
                prompt=samples.prompts[start].prompt,
                completions=tuple(samples.completions[group]),
                ranks=ranks_from_scores(scores[group].tolist(), min_gap=min_gap),
            )
        )
    return rankings


def write_rankings(path: Path, rankings: Sequence[Ranking]) -> int:
    """Write `{prompt, completions, ranks}` lines, leaving out rankings that prefer nothing.

    Args:
        path: A .jsonl file; replaced.
        rankings: At least one that prefers something.

    Returns:
        How many were left out because all their completions tie.

    Raises:
        DataError: All rankings tie, so the file would be empty.
    """
    telling = [ranking for ranking in rankings if not ranking.tied]
    if not telling:
        raise DataError(
            "the scorer finds no difference within any prompt's completions",
            where=str(path),
            got=f"{len(rankings)} rankings, all tied",
            remedy="Draw more candidates, raise the temperature, or use a finer scorer.",
        )
    with path.open("w", encoding="utf-8") as file:
        for ranking in telling:
            record = {"prompt": ranking.prompt, "completions": ranking.completions, "ranks": ranking.ranks}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return len(rankings) - len(telling)
