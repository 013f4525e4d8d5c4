"""Losses that teach a scalar score from rankings of K completions to one prompt.

Every function takes `scores` [P, K] (one row per prompt), `ranks` [P, K] (0 = best, equal = tie) and `mask` [P, K]
(True where a candidate exists), and returns one loss per prompt with a flag that says whether the prompt taught
anything. So each prompt counts equally however many candidates it has, and the trainer can divide once by the number
of prompts in the whole optimizer step.

Ties: two candidates of equal rank are never compared with each other, in any loss. A prompt whose candidates all tie
has no loss and is not counted.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, assert_never

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rlhf.config import Config


class RankingLoss(NamedTuple):
    """One loss per prompt."""

    losses: Tensor
    """[P] float32, nats; 0 where not `counted`."""
    counted: Tensor
    """[P] bool, True where the prompt had at least one comparison."""

    def mean(self) -> Tensor:
        """Mean over the counted prompts, 0 if there are none."""
        return self.losses.sum() / self.counted.sum().clamp(min=1)


# --- configuration ------------------------------------------------------------------------------------------------


class Margin(Config):
    """How far apart two scores must be before their comparison counts as learnt."""

    size: float = Field(1.0, gt=0)
    """In units of the score."""
    per: Literal["pair", "rank", "gold_score"] = "pair"
    """pair: the same for every pair. rank: size x difference of ranks. gold_score: size x difference of the
    data set's own scores, which must be present. Llama 2 (arXiv 2307.09288, table 27) used margins of 1/3 to 3."""


class AllPairs(Config):
    """Bradley-Terry on all pairs of a prompt, averaged over its pairs (InstructGPT); K = 2 is Bradley-Terry."""

    type: Literal["all_pairs"] = "all_pairs"
    margin: Margin | None = None
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a label is wrong; the other order gets this weight."""


class PlackettLuce(Config):
    """Likelihood of the whole order, as repeated choice of the best among those that remain."""

    type: Literal["plackett_luce"] = "plackett_luce"
    top_m: int | None = Field(None, ge=1)
    """Only the first m choices count (a partial order); None counts all."""
    divide_by: Literal["nothing", "choices"] = "nothing"
    """choices divides a prompt's loss by its number of choices, K - 1 for a full order without ties."""


class BestOf(Config):
    """Softmax cross-entropy of the best candidate (Ziegler et al. 2019)."""

    type: Literal["best_of"] = "best_of"


RankingLossConfig = Annotated[AllPairs | PlackettLuce | BestOf, Field(discriminator="type")]


# --- formulas -----------------------------------------------------------------------------------------------------


def ranking_loss(
    scores: Tensor, ranks: Tensor, *, mask: Tensor, loss: RankingLossConfig, gold_scores: Tensor | None = None
) -> RankingLoss:
    """Apply the loss that a config names.

    Args:
        scores: [P, K] the model's scores.
        ranks: [P, K] 0 = best, equal = tie.
        mask: [P, K] bool, True where a candidate exists.
        loss: Which loss, with its settings.
        gold_scores: [P, K] the data set's own scores; only `Margin(per="gold_score")` reads them.
    """
    match loss:
        case AllPairs():
            margins = None
            if loss.margin is not None:
                margins = pair_margins(ranks, margin=loss.margin, gold_scores=gold_scores)
            return pairwise_ranking_loss(
                scores, ranks, mask=mask, margins=margins, label_smoothing=loss.label_smoothing
            )
        case PlackettLuce():
            return plackett_luce_loss(scores, ranks, mask=mask, top_m=loss.top_m, divide_by=loss.divide_by)
        case BestOf():
            return best_of_loss(scores, ranks, mask=mask)
        case _:
            assert_never(loss)


def pairwise_ranking_loss(
    scores: Tensor,
    ranks: Tensor,
    *,
    mask: Tensor,
    margins: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> RankingLoss:
    r"""Average Bradley-Terry loss over the ordered pairs of each prompt.

    loss_p = -1/|pairs_p| sum_{w better than l} log sigmoid(s_w - s_l - margin_wl); |pairs_p| = C(K, 2) without ties.
    With label smoothing e, each term becomes (1 - e) times itself plus e times the loss of the opposite order.
    Source: InstructGPT (arXiv 2203.02155, equation 1); margins: Llama 2 (arXiv 2307.09288, equation 2).

    Args:
        scores: [P, K].
        ranks: [P, K] integers, 0 = best; equal ranks are never compared.
        mask: [P, K] bool, True where a candidate exists.
        margins: [P, K, K], entry [p, w, l] for winner w over loser l; None is no margin.
        label_smoothing: e in [0, 0.5).

    Returns:
        [P] losses, and which prompts had a pair.

    >>> scores, ranks = torch.tensor([[1.0, 0.0]]), torch.tensor([[0, 1]])
    >>> pairwise_ranking_loss(scores, ranks, mask=torch.ones(1, 2, dtype=torch.bool)).losses  # log(1 + exp(-1))
    tensor([0.3133])
    """
    wins = better_than(ranks, mask)
    gaps = (scores.unsqueeze(2) - scores.unsqueeze(1)).float()  # [P, K, K], [p, w, l] = s_w - s_l
    if margins is not None:
        gaps = gaps - margins
    losses = -F.logsigmoid(gaps)
    if label_smoothing > 0:
        losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-gaps)
    pairs = wins.sum(dim=(1, 2))
    return RankingLoss(losses.masked_fill(~wins, 0.0).sum(dim=(1, 2)) / pairs.clamp(min=1), pairs > 0)


def plackett_luce_loss(
    scores: Tensor,
    ranks: Tensor,
    *,
    mask: Tensor,
    top_m: int | None = None,
    divide_by: Literal["nothing", "choices"] = "nothing",
) -> RankingLoss:
    r"""Negative log-likelihood of a ranking under Plackett-Luce.

    loss_p = -sum_i [s_i - logsumexp over i and all candidates strictly worse than i of s_j].
    Without ties this is the likelihood of choosing the best of K, then the best of the K - 1 that remain, and so on.
    Tied candidates are each chosen over everything strictly worse, and never compete with one another. The last
    candidates, with nothing worse, add nothing. K = 2 is Bradley-Terry.
    Source: Plackett 1975, "The analysis of permutations"; Luce 1959, "Individual choice behavior".

    Args:
        scores: [P, K].
        ranks: [P, K] integers, 0 = best, equal = tie.
        mask: [P, K] bool, True where a candidate exists.
        top_m: Counts only candidates with fewer than m strictly better ones: the order of the rest is ignored.
        divide_by: "choices" divides by the number of terms, K - 1 for a full order without ties.

    Returns:
        [P] losses, and which prompts had a choice.

    >>> scores, ranks = torch.zeros(1, 3), torch.tensor([[2, 0, 1]])  # each of the 3! orders has probability 1/6
    >>> plackett_luce_loss(scores, ranks, mask=torch.ones(1, 3, dtype=torch.bool)).losses
    tensor([1.7918])
    """
    worse = better_than(ranks, mask)  # [p, i, j]: j is strictly worse than i
    choices = worse.any(dim=2)  # [P, K]
    if top_m is not None:
        choices = choices & (worse.sum(dim=1) < top_m)
    own = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    rivals = scores.float().unsqueeze(1).masked_fill(~(worse | own), -torch.inf)  # every row keeps its diagonal: finite
    losses = (rivals.logsumexp(dim=2) - scores.float()).masked_fill(~choices, 0.0).sum(dim=1)
    count = choices.sum(dim=1)
    if divide_by == "choices":
        losses = losses / count.clamp(min=1)
    return RankingLoss(losses, count > 0)


def best_of_loss(scores: Tensor, ranks: Tensor, *, mask: Tensor) -> RankingLoss:
    """Softmax cross-entropy of the best candidate against those strictly worse; several best ones are averaged.

    Source: Ziegler et al. 2019 (arXiv 1909.08593, equation 1), K = 4.
    """
    return plackett_luce_loss(scores, ranks, mask=mask, top_m=1, divide_by="choices")


def centering_loss(scores: Tensor, *, mask: Tensor, form: Literal["squares", "pair_sums"] = "squares") -> Tensor:
    """Pull scores towards 0, which a loss on differences leaves undetermined.

    squares: mean over a prompt's candidates of s^2. pair_sums: mean over its pairs of (s_i + s_j)^2, which for K = 2
    is the term of Eisenstein et al. 2023 (arXiv 2312.09244), used there with coefficient 0.01.

    Args:
        scores: [P, K].
        mask: [P, K] bool, True where a candidate exists.
        form: Which of the two.

    Returns:
        [P].
    """
    scores = scores.float().masked_fill(~mask, 0.0)
    if form == "squares":
        return scores.square().sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    pairs = (mask.unsqueeze(2) & mask.unsqueeze(1)).triu(diagonal=1)
    sums = (scores.unsqueeze(2) + scores.unsqueeze(1)).square().masked_fill(~pairs, 0.0)
    return sums.sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp(min=1)


def better_than(ranks: Tensor, mask: Tensor) -> Tensor:
    """Return [P, K, K] bool, True at [p, w, l] where candidates w and l exist and w is ranked strictly better."""
    exists = mask.unsqueeze(2) & mask.unsqueeze(1)
    return (ranks.unsqueeze(2) < ranks.unsqueeze(1)) & exists


def pair_margins(ranks: Tensor, *, margin: Margin, gold_scores: Tensor | None = None) -> Tensor:
    """Return [P, K, K] margins of winner w over loser l (entries of other pairs are meaningless and never read)."""
    match margin.per:
        case "pair":
            return ranks.new_full((*ranks.shape, ranks.shape[1]), 1, dtype=torch.float32) * margin.size
        case "rank":
            return (ranks.unsqueeze(1) - ranks.unsqueeze(2)).float() * margin.size
        case "gold_score":
            assert gold_scores is not None, "the trainer refuses gold_score margins on data without scores"
            return (gold_scores.unsqueeze(2) - gold_scores.unsqueeze(1)).float() * margin.size
        case _:
            assert_never(margin.per)
