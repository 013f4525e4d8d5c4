"""How well scores reproduce rankings, beside what is reached without reading a word.

All functions take `scores` [P, K], `ranks` [P, K] (0 = best, equal = tie) and `mask` [P, K], as the losses do. Only
pairs of different rank count. Pairs of one prompt are not independent, so the confidence interval resamples prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reward_models.collation import EncodedRanking, RankingCollator, scatter_scores, shared_lengths
from reward_models.losses import better_than
from reward_models.model import RewardModel, length_sorted_chunks
from rlhf.data.collation import right_pad
from rlhf.errors import DataError


class Accuracy(NamedTuple):
    """A proportion with its confidence interval."""

    value: float
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end."""
    pairs: int


def score_sequences(
    model: RewardModel,
    sequences: Sequence[list[int]],
    *,
    pad_id: int,
    batch_tokens: int = 16_384,
    shared: Tensor | None = None,
) -> Tensor:
    """Score token sequences without gradients, in batches of similar length.

    Args:
        model: The reward model.
        sequences: N token sequences, each with its end token.
        pad_id: Filler; it is masked.
        batch_tokens: Tokens, padding included, in one forward.
        shared: [N] first tokens that a sequence may share with others, see `RewardModel.forward`.

    Returns:
        [N] float32 on the CPU.
    """
    scores = torch.zeros(len(sequences))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for chunk in length_sorted_chunks([len(ids) for ids in sequences], batch_tokens):
            ids, mask = right_pad([sequences[row] for row in chunk], pad_id)
            own = None if shared is None else shared[chunk].to(model.device)
            scores[chunk] = model(ids.to(model.device), mask.to(model.device), own).cpu()
    model.train(was_training)
    return scores


def score_rankings(
    model: RewardModel, rankings: Sequence[EncodedRanking], *, pad_id: int, batch_tokens: int = 16_384
) -> Tensor:
    """Score every candidate without gradients, sorted by length over all prompts.

    Returns:
        [P, K] float32 on the CPU; 0 where a prompt has fewer than K candidates.
    """
    sequences = [ids for ranking in rankings for ids in ranking.sequences]
    shared = shared_lengths(rankings)
    scores = score_sequences(model, sequences, pad_id=pad_id, batch_tokens=batch_tokens, shared=shared)
    return scatter_scores(scores, RankingCollator(pad_id)(rankings))


def evaluate_scores(scores: Tensor, rankings: Sequence[EncodedRanking], *, seed: int = 0) -> dict[str, float]:
    """Measure scores against rankings.

    Args:
        scores: [P, K], from `score_rankings`.
        rankings: The P rankings that were scored.
        seed: Of the bootstrap.

    Returns:
        `accuracy` (pairwise; a tied score counts half) with `accuracy_low` and `accuracy_high` (95 %),
        `length_accuracy` of "the longer completion wins" with its interval, their difference
        `accuracy_over_length` with its paired interval, `chance` (0.5), `best_of_accuracy` (the best candidate
        scores highest), `kendall_tau`, `calibration_error`, `length_correlation`, `pairs`, `prompts`.
    """
    batch = RankingCollator(0)(rankings)
    lengths = scatter_scores(torch.tensor([float(size) for one in rankings for size in one.lengths]), batch)
    return evaluate_table(scores, batch["ranks"], mask=batch["mask"], lengths=lengths, seed=seed)


def evaluate_table(scores: Tensor, ranks: Tensor, *, mask: Tensor, lengths: Tensor, seed: int = 0) -> dict[str, float]:
    """Measure scores against ranks and lengths, all [P, K]; see `evaluate_scores`.

    Raises:
        DataError: No two candidates differ in rank.
    """
    won, pairs = pair_outcomes(scores, ranks, mask=mask)
    won_by_length, _ = pair_outcomes(lengths, ranks, mask=mask)
    if int(pairs.sum()) == 0:
        raise DataError("no pair of different rank to evaluate on", where="held-out rankings", got=len(ranks))
    ours, length = bootstrap_accuracy(won, pairs, seed=seed), bootstrap_accuracy(won_by_length, pairs, seed=seed)
    over = bootstrap_accuracy(won - won_by_length, pairs, seed=seed)
    return {
        "accuracy": ours.value,
        "accuracy_low": ours.low,
        "accuracy_high": ours.high,
        "length_accuracy": length.value,
        "length_accuracy_low": length.low,
        "length_accuracy_high": length.high,
        "accuracy_over_length": over.value,
        "accuracy_over_length_low": over.low,
        "accuracy_over_length_high": over.high,
        "chance": 0.5,
        "best_of_accuracy": best_of_accuracy(scores, ranks, mask=mask),
        "kendall_tau": kendall_tau(scores, ranks, mask=mask),
        "calibration_error": calibration_error(scores, ranks, mask=mask),
        "length_correlation": within_prompt_correlation(scores, lengths, mask=mask),
        "score_mean": scores[mask].mean().item(),
        "score_std": scores[mask].std(correction=0).item(),
        "pairs": float(ours.pairs),
        "prompts": float(len(ranks)),
    }


def pair_outcomes(scores: Tensor, ranks: Tensor, *, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return ([P] pairs ordered as the ranks say, a tied score counting half; [P] pairs)."""
    wins = better_than(ranks, mask)
    gaps = scores.unsqueeze(2) - scores.unsqueeze(1)
    right = ((gaps > 0).double() + 0.5 * (gaps == 0).double()) * wins
    return right.sum(dim=(1, 2)), wins.sum(dim=(1, 2)).double()


def bootstrap_accuracy(won: Tensor, pairs: Tensor, *, seed: int = 0, resamples: int = 2000) -> Accuracy:
    """Share of pairs won, with a percentile interval over resampled prompts.

    Args:
        won: [P] pairs won per prompt (or a difference of two such counts).
        pairs: [P] pairs per prompt.
        seed: Of the resampling.
        resamples: How many.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(won), (resamples, len(won)), generator=generator)
    shares = won[drawn].sum(dim=1) / pairs[drawn].sum(dim=1).clamp(min=1)
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=shares.dtype)).tolist()
    return Accuracy((won.sum() / pairs.sum()).item(), low, high, int(pairs.sum()))


def best_of_accuracy(scores: Tensor, ranks: Tensor, *, mask: Tensor) -> float:
    """Share of prompts whose highest score sits on a best-ranked candidate."""
    chosen = scores.masked_fill(~mask, -torch.inf).argmax(dim=1, keepdim=True)
    best = ranks.masked_fill(~mask, torch.iinfo(ranks.dtype).max).amin(dim=1, keepdim=True)
    return (ranks.gather(1, chosen) == best).double().mean().item()


def kendall_tau(scores: Tensor, ranks: Tensor, *, mask: Tensor) -> float:
    """Kendall's tau-b between scores and ranking, averaged over prompts where it is defined.

    tau_b = (concordant - discordant) / sqrt(pairs untied in rank x pairs untied in score).
    Source: Kendall 1945, "The treatment of ties in ranking problems".
    """
    wins = better_than(ranks, mask)
    signs = (scores.unsqueeze(2) - scores.unsqueeze(1)).sign().double()
    exists = (mask.unsqueeze(2) & mask.unsqueeze(1)).triu(diagonal=1)
    untied_in_rank = wins.sum(dim=(1, 2)).double()
    untied_in_score = (signs.abs() * exists).sum(dim=(1, 2))
    defined = (untied_in_rank > 0) & (untied_in_score > 0)
    tau = (signs * wins).sum(dim=(1, 2)) / (untied_in_rank * untied_in_score).sqrt()
    return tau[defined].mean().item() if bool(defined.any()) else 0.0


class Reliability(NamedTuple):
    """Pairs binned by how sure the scores are of them."""

    confidence: Tensor
    """[bins] mean sigmoid(|score gap|) of a bin's pairs; 0 where it has none."""
    accuracy: Tensor
    """[bins] share of them that the higher score wins."""
    pairs: Tensor
    """[bins] how many."""

    def error(self) -> float:
        """Expected calibration error: |accuracy - confidence| of each bin, weighted by its pairs.

        Source: Guo et al. 2017 (arXiv 1706.04599, equation 3).
        """
        total = self.pairs.sum().clamp(min=1)
        return ((self.accuracy - self.confidence).abs() * self.pairs).sum().div(total).item()


def reliability(scores: Tensor, ranks: Tensor, *, mask: Tensor, bins: int = 10) -> Reliability:
    """Bin pairs by sigmoid(score gap), the probability that the higher score wins under Bradley-Terry.

    Bins of equal width over [0.5, 1]; a tied score counts half.
    Source: Guo et al. 2017 (arXiv 1706.04599, section 2).
    """
    wins = better_than(ranks, mask)
    gaps = (scores.unsqueeze(2) - scores.unsqueeze(1))[wins].double()
    confidence = torch.sigmoid(gaps.abs())
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    bin_of = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)

    def sums(values: Tensor) -> Tensor:
        return torch.zeros(bins, dtype=torch.float64).index_add(0, bin_of, values)

    pairs = sums(torch.ones_like(gaps))
    return Reliability(sums(confidence) / pairs.clamp(min=1), sums(right) / pairs.clamp(min=1), pairs)


def calibration_error(scores: Tensor, ranks: Tensor, *, mask: Tensor, bins: int = 10) -> float:
    """Expected calibration error of sigmoid(score gap) as the probability that the higher score wins."""
    return reliability(scores, ranks, mask=mask, bins=bins).error()


def within_prompt_correlation(scores: Tensor, lengths: Tensor, *, mask: Tensor) -> float:
    """Pearson correlation of score and length after subtracting each prompt's means; 0 where one is constant."""

    def centred(values: Tensor) -> Tensor:
        values = values.double().masked_fill(~mask, 0.0)
        means = values.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        return (values - means)[mask]

    x, y = centred(scores), centred(lengths)
    scale = (x.square().sum() * y.square().sum()).sqrt()
    return ((x * y).sum() / scale).item() if scale > 0 else 0.0
