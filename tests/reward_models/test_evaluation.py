"""Ranking metrics against counts done by hand and against scipy."""

import math

import pytest
import torch
from scipy import stats

from reward_models.collation import EncodedRanking
from reward_models.evaluation import (
    best_of_accuracy,
    bootstrap_accuracy,
    calibration_error,
    evaluate_scores,
    kendall_tau,
    pair_outcomes,
    within_prompt_correlation,
)
from rlhf.errors import DataError


def full(rows, columns):
    return torch.ones(rows, columns, dtype=torch.bool)


def test_pairs_counted_by_hand():
    # Ranks 0 < 1 < 2 with scores 3, 1, 2: pairs (0,1) right, (0,2) right, (1,2) wrong.
    # Second row: candidates 0 and 1 tie in rank, so 2 pairs; scores 1, 0, 0: right, and a tied score counts half.
    scores, ranks = torch.tensor([[3.0, 1.0, 2.0], [1.0, 0.0, 0.0]]), torch.tensor([[0, 1, 2], [0, 0, 1]])
    won, pairs = pair_outcomes(scores, ranks, mask=full(2, 3))
    assert won.tolist() == [2.0, 1.5]
    assert pairs.tolist() == [3.0, 2.0]


def test_absent_candidates_are_no_pairs():
    mask = torch.tensor([[True, True, False]])
    won, pairs = pair_outcomes(torch.tensor([[3.0, 1.0, 9.0]]), torch.tensor([[0, 1, 2]]), mask=mask)
    assert (won.item(), pairs.item()) == (1.0, 1.0)


def test_bootstrap_interval_agrees_with_the_normal_approximation():
    # 400 prompts of one pair each, 70 % won: standard error sqrt(.7 x .3 / 400) = 0.0229, 1.96 of it = 0.0449.
    won = torch.zeros(400, dtype=torch.float64)
    won[:280] = 1
    accuracy = bootstrap_accuracy(won, torch.ones(400, dtype=torch.float64))
    assert accuracy.value == pytest.approx(0.7)
    assert accuracy.low == pytest.approx(0.7 - 0.0449, abs=0.006)
    assert accuracy.high == pytest.approx(0.7 + 0.0449, abs=0.006)
    assert accuracy.pairs == 400


def test_interval_resamples_prompts_not_pairs():
    # 40 prompts of 10 pairs that are won or lost together are 40 observations: standard error sqrt(.25 / 40) = 0.079.
    won = torch.tensor([10.0, 0.0], dtype=torch.float64).repeat(20)
    accuracy = bootstrap_accuracy(won, torch.full((40,), 10.0, dtype=torch.float64))
    assert accuracy.high - accuracy.low == pytest.approx(2 * 1.96 * 0.079, abs=0.04)


def test_kendall_tau_equals_scipy():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (20, 5), generator=generator).float()
    ranks = torch.randint(0, 4, (20, 5), generator=generator)
    taus = [stats.kendalltau(s.numpy(), -r.numpy()).statistic for s, r in zip(scores, ranks, strict=True)]
    expected = [tau for tau in taus if not math.isnan(tau)]
    assert kendall_tau(scores, ranks, mask=full(20, 5)) == pytest.approx(sum(expected) / len(expected), abs=1e-9)


def test_best_of_accuracy():
    scores, ranks = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 9.0]]), torch.tensor([[0, 1, 2], [1, 0, 0]])
    mask = torch.tensor([[True] * 3, [True, True, False]])
    assert best_of_accuracy(scores, ranks, mask=mask) == 1.0
    assert best_of_accuracy(-scores, ranks, mask=mask) == 0.0


def test_calibration_error_by_hand():
    # Gaps log 3 and -log 3: both say 0.75 for the higher score; one is right, so accuracy 0.5 and error 0.25.
    gap = math.log(3)
    scores, ranks = torch.tensor([[gap, 0.0], [0.0, gap]]), torch.tensor([[0, 1], [0, 1]])
    assert calibration_error(scores, ranks, mask=full(2, 2)) == pytest.approx(0.25, abs=1e-6)


def test_calibrated_scores_have_no_calibration_error():
    generator = torch.Generator().manual_seed(0)
    gaps = torch.randn(40_000, generator=generator)
    wins = torch.rand(40_000, generator=generator) < torch.sigmoid(gaps)
    ranks = torch.stack([~wins, wins], dim=1).long()
    assert calibration_error(torch.stack([gaps, 0 * gaps], dim=1), ranks, mask=full(40_000, 2)) < 0.01


def test_correlation_is_within_prompts():
    # Between prompts, score and length rise together; within each, they move oppositely.
    scores, lengths = torch.tensor([[0.0, 1.0], [10.0, 11.0]]), torch.tensor([[2.0, 1.0], [20.0, 19.0]])
    assert within_prompt_correlation(scores, lengths, mask=full(2, 2)) == pytest.approx(-1.0)
    assert within_prompt_correlation(scores, 0 * lengths, mask=full(2, 2)) == 0.0


def ranking(ranks, lengths):
    return EncodedRanking(sequences=[[3]] * len(ranks), ranks=ranks, gold_scores=None, lengths=lengths)


def test_report_compares_with_the_longer_answer():
    rankings = [ranking([0, 1], [10, 5]), ranking([0, 1, 2], [3, 2, 9])]
    scores = torch.tensor([[1.0, 0.0, 0.0], [3.0, 2.0, 1.0]])
    report = evaluate_scores(scores, rankings)
    assert report["accuracy"] == 1.0
    assert report["length_accuracy"] == pytest.approx(2 / 4)  # 10 > 5, 3 > 2, but 3 < 9 and 2 < 9
    assert report["accuracy_over_length"] == pytest.approx(2 / 4)
    assert (report["pairs"], report["prompts"], report["chance"]) == (4, 2, 0.5)
    assert report["kendall_tau"] == pytest.approx(1.0)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(DataError, match="no pair"):
        evaluate_scores(torch.zeros(1, 2), [ranking([0, 0], [1, 2])])
