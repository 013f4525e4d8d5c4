"""Ranking losses against plain arithmetic, enumeration of orders, and the formulas of the papers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from reward_models.losses import (
    AllPairs,
    BestOf,
    Margin,
    PlackettLuce,
    best_of_loss,
    centering_loss,
    pair_margins,
    pairwise_ranking_loss,
    plackett_luce_loss,
    ranking_loss,
)
from rlhf.config import Config, validate
from rlhf.errors import ConfigError


def full(rows: int, columns: int) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.bool)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def pairs_by_hand(scores, ranks, *, margin=lambda winner, loser: 0.0, smoothing=0.0):
    """InstructGPT's loss as a loop over pairs (arXiv 2203.02155, equation 1), in plain python numbers."""
    terms = []
    for winner, loser in itertools.permutations(range(len(scores)), 2):
        if ranks[winner] < ranks[loser]:
            gap = scores[winner] - scores[loser] - margin(winner, loser)
            terms.append(-(1 - smoothing) * log_sigmoid(gap) - smoothing * log_sigmoid(-gap))
    return sum(terms) / len(terms) if terms else 0.0


def order_probability(scores, order):
    """Probability of choosing candidates in this order, one after the other, by softmax among those left."""
    probability = 1.0
    left = list(order)
    while left:
        total = sum(math.exp(scores[j]) for j in left)
        probability *= math.exp(scores[left[0]]) / total
        left = left[1:]
    return probability


# --- all pairs ----------------------------------------------------------------------------------------------------


def test_two_candidates_are_bradley_terry():
    # -log sigmoid(2) = log(1 + e^-2) = 0.126928
    result = pairwise_ranking_loss(torch.tensor([[0.5, 2.5]]), torch.tensor([[1, 0]]), mask=full(1, 2))
    assert result.losses.item() == pytest.approx(0.126928, abs=1e-6)


@pytest.mark.parametrize("ranks", [[0, 1, 2, 3], [3, 1, 0, 2], [0, 0, 1, 2], [1, 0, 1, 1]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_pairs_equal_a_loop_over_pairs(ranks, smoothing):
    scores = [0.3, -1.2, 2.0, 0.7]
    result = pairwise_ranking_loss(
        torch.tensor([scores]), torch.tensor([ranks]), mask=full(1, 4), label_smoothing=smoothing
    )
    assert result.losses.item() == pytest.approx(pairs_by_hand(scores, ranks, smoothing=smoothing), abs=1e-6)


def test_absent_candidates_change_nothing():
    scores, ranks = torch.tensor([[0.3, -1.2, 9.0, 5.0]]), torch.tensor([[1, 0, 0, 7]])
    mask = torch.tensor([[True, True, False, False]])
    result = pairwise_ranking_loss(scores, ranks, mask=mask)
    assert result.losses.item() == pytest.approx(-log_sigmoid(-1.2 - 0.3), abs=1e-6)


def test_gradient_of_absent_candidates_is_zero_even_if_their_score_is_not_finite():
    scores = torch.tensor([[0.3, -1.2, 1e30]], requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    for loss in (pairwise_ranking_loss, plackett_luce_loss, best_of_loss):
        (gradient,) = torch.autograd.grad(loss(scores, torch.tensor([[1, 0, 2]]), mask=mask).losses.sum(), scores)
        assert gradient.isfinite().all()
        assert gradient[0, 2] == 0


def test_all_tied_prompt_is_not_counted():
    result = pairwise_ranking_loss(torch.randn(2, 3), torch.tensor([[0, 0, 0], [0, 1, 1]]), mask=full(2, 3))
    assert result.counted.tolist() == [False, True]
    assert result.losses[0] == 0
    assert result.mean() == result.losses[1]


def test_margins_are_subtracted_from_the_gap():
    scores, ranks, gold = [0.3, -1.2, 2.0], [2, 0, 1], [0.1, 0.9, 0.4]
    tensors = torch.tensor([scores]), torch.tensor([ranks])
    by_kind = {
        "pair": lambda winner, loser: 0.5,
        "rank": lambda winner, loser: 0.5 * (ranks[loser] - ranks[winner]),
        "gold_score": lambda winner, loser: 0.5 * (gold[winner] - gold[loser]),
    }
    for per, margin in by_kind.items():
        margins = pair_margins(tensors[1], margin=Margin(size=0.5, per=per), gold_scores=torch.tensor([gold]))
        result = pairwise_ranking_loss(*tensors, mask=full(1, 3), margins=margins)
        assert result.losses.item() == pytest.approx(pairs_by_hand(scores, ranks, margin=margin), abs=1e-6), per


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=6),
    st.randoms(use_true_random=False),
)
def test_order_of_candidates_and_shift_of_scores_change_nothing(scores, random):
    ranks = [random.randrange(3) for _ in scores]
    permutation = random.sample(range(len(scores)), len(scores))
    a = torch.tensor([scores], dtype=torch.float64), torch.tensor([ranks])
    b = a[0][:, permutation] + 3.0, a[1][:, permutation]
    for loss in (pairwise_ranking_loss, plackett_luce_loss, best_of_loss):
        left, right = (loss(*x, mask=full(1, len(scores))).losses for x in (a, b))
        assert left.isfinite().all()
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


# --- Plackett-Luce ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_plackett_luce_is_the_probability_of_the_order(order):
    scores = [0.3, -1.2, 2.0]
    ranks = [order.index(candidate) for candidate in range(3)]
    result = plackett_luce_loss(torch.tensor([scores]), torch.tensor([ranks]), mask=full(1, 3))
    assert result.losses.item() == pytest.approx(-math.log(order_probability(scores, order)), abs=1e-6)


def test_plackett_luce_probabilities_of_all_orders_sum_to_one():
    scores = torch.tensor([[0.3, -1.2, 2.0, 0.1]])
    losses = [
        plackett_luce_loss(scores, torch.tensor([r]), mask=full(1, 4)).losses for r in itertools.permutations(range(4))
    ]
    assert sum(math.exp(-loss.item()) for loss in losses) == pytest.approx(1.0, abs=1e-5)


def test_partial_plackett_luce_is_the_sum_over_orders_of_the_rest():
    # P(first = 2, second = 0) is the sum of P over both orders of the remaining candidates 1 and 3.
    scores = [0.3, -1.2, 2.0, 0.1]
    expected = order_probability(scores, (2, 0, 1, 3)) + order_probability(scores, (2, 0, 3, 1))
    result = plackett_luce_loss(torch.tensor([scores]), torch.tensor([[1, 2, 0, 3]]), mask=full(1, 4), top_m=2)
    assert result.losses.item() == pytest.approx(-math.log(expected), abs=1e-6)


def test_divisor_is_the_number_of_choices():
    scores, ranks = torch.randn(1, 5), torch.tensor([[3, 0, 1, 4, 2]])
    whole = plackett_luce_loss(scores, ranks, mask=full(1, 5)).losses
    torch.testing.assert_close(
        plackett_luce_loss(scores, ranks, mask=full(1, 5), divide_by="choices").losses, whole / 4
    )


def test_two_candidates_agree_for_every_loss():
    scores, ranks = torch.tensor([[0.5, 2.5]]), torch.tensor([[1, 0]])
    for loss in (plackett_luce_loss, best_of_loss):
        assert loss(scores, ranks, mask=full(1, 2)).losses.item() == pytest.approx(0.126928, abs=1e-6)


def test_ties_are_never_compared():
    # 0 and 1 tie for best, 2 is worst: each of the two is chosen over 2 alone, a softmax of two.
    scores = [0.3, -1.2, 2.0]
    expected = -log_sigmoid(0.3 - 2.0) - log_sigmoid(-1.2 - 2.0)
    result = plackett_luce_loss(torch.tensor([scores]), torch.tensor([[0, 0, 1]]), mask=full(1, 3))
    assert result.losses.item() == pytest.approx(expected, abs=1e-6)
    averaged = best_of_loss(torch.tensor([scores]), torch.tensor([[0, 0, 1]]), mask=full(1, 3))
    assert averaged.losses.item() == pytest.approx(expected / 2, abs=1e-6)


def test_best_of_is_softmax_cross_entropy():
    scores, ranks = torch.randn(6, 4), torch.stack([torch.randperm(4) for _ in range(6)])
    expected = nn.functional.cross_entropy(scores, ranks.argmin(dim=1), reduction="none")
    torch.testing.assert_close(best_of_loss(scores, ranks, mask=full(6, 4)).losses, expected)


def test_a_prompt_counts_once_however_many_candidates_it_has():
    # Prompt 0 has 2 candidates with gap 1, prompt 1 has 4 with the same score: log 2 per pair.
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False, False], [True] * 4])
    result = pairwise_ranking_loss(scores, torch.tensor([[0, 1, 0, 0], [0, 1, 2, 3]]), mask=mask)
    assert result.mean().item() == pytest.approx((-log_sigmoid(1.0) + math.log(2)) / 2, abs=1e-6)


# --- centering ----------------------------------------------------------------------------------------------------


def test_centering():
    scores, mask = torch.tensor([[1.0, 2.0, 100.0]]), torch.tensor([[True, True, False]])
    assert centering_loss(scores, mask=mask).item() == pytest.approx((1 + 4) / 2)
    assert centering_loss(scores, mask=mask, form="pair_sums").item() == pytest.approx((1 + 2) ** 2)
    # Three candidates: pair sums 3, 4, 5.
    three = centering_loss(torch.tensor([[1.0, 2.0, 3.0]]), mask=full(1, 3), form="pair_sums")
    assert three.item() == pytest.approx((9 + 16 + 25) / 3)


# --- config -------------------------------------------------------------------------------------------------------


class Holder(Config):
    loss: AllPairs | PlackettLuce | BestOf


def test_config_names_the_loss():
    scores, ranks = torch.randn(3, 4), torch.stack([torch.randperm(4) for _ in range(3)])
    expected = {
        AllPairs(label_smoothing=0.1): pairwise_ranking_loss(scores, ranks, mask=full(3, 4), label_smoothing=0.1),
        PlackettLuce(top_m=2, divide_by="choices"): plackett_luce_loss(
            scores, ranks, mask=full(3, 4), top_m=2, divide_by="choices"
        ),
        BestOf(): best_of_loss(scores, ranks, mask=full(3, 4)),
    }
    for loss, result in expected.items():
        torch.testing.assert_close(ranking_loss(scores, ranks, mask=full(3, 4), loss=loss).losses, result.losses)


@pytest.mark.parametrize(
    "settings", [{"type": "all_pairs", "label_smoothing": 0.5}, {"type": "plackett_luce", "top_m": 0}]
)
def test_config_refuses_what_has_no_meaning(settings):
    with pytest.raises(ConfigError):
        validate(Holder, {"loss": settings})
