"""Best-of-n: the estimator against every subset, its expectation, the KL against a distribution without ties."""

import itertools
import math

import pytest
import torch

from rlhf.errors import DataError
from rlhf.lm.best_of_n import best_of_n_kl, best_of_n_mean, best_of_n_weights


def mean_over_subsets(proxy: list[float], values: list[float], n: int) -> float:
    """The definition: all subsets of n answers, each represented by its best; ties share."""
    chosen = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[index] for index in subset)
        tied = [values[index] for index in subset if proxy[index] == best]
        chosen.append(sum(tied) / len(tied))
    return sum(chosen) / len(chosen)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_the_estimate_is_the_mean_over_all_subsets(n):
    generator = torch.Generator().manual_seed(n)
    proxy, values = torch.randn(3, 7, generator=generator), torch.rand(3, 7, generator=generator)
    expected = [mean_over_subsets(p, v, n) for p, v in zip(proxy.tolist(), values.tolist(), strict=True)]
    assert best_of_n_mean(proxy, values, n).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_ties_are_broken_at_random(n):
    proxy, values = [2.0, 1.0, 2.0, 0.0, 2.0], [0.0, 5.0, 3.0, 1.0, 9.0]
    # Random breaking: every order of the tied answers, averaged.
    orders = itertools.permutations([0.1, 0.2, 0.3])
    broken = [[2.0 + a, 1.0, 2.0 + b, 0.0, 2.0 + c] for a, b, c in orders]
    expected = sum(mean_over_subsets(order, values, n) for order in broken) / len(broken)
    estimate = best_of_n_mean(torch.tensor([proxy]), torch.tensor([values]), n)
    assert estimate.item() == pytest.approx(expected)


def test_the_estimate_is_unbiased():
    """Answers from {0, 1, 2, 3} with known probabilities: P(best of n = k) = F(k)^n - F(k-1)^n exactly."""
    probabilities, n = torch.tensor([0.4, 0.3, 0.2, 0.1]), 3
    gold = torch.tensor([0.0, 1.0, 2.0, -4.0])  # what the proxy likes most is worst
    cumulative = [0.0, 0.4, 0.7, 0.9, 1.0]
    exact = sum(
        (cumulative[k + 1] ** n - cumulative[k] ** n) * gold[k].item() for k in range(4)
    )  # 0.279 + 0.772 - 1.084 = -0.033
    answers = torch.multinomial(
        probabilities.expand(40_000, 4), 8, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    estimates = best_of_n_mean(answers.float(), gold[answers], n)
    error = estimates.std().item() / math.sqrt(len(estimates))
    assert exact == pytest.approx(-0.033)
    assert estimates.mean().item() == pytest.approx(exact, abs=4 * error)
    assert error < 0.01


def test_weights_are_those_of_binomial_coefficients_and_do_not_overflow():
    exact = [math.comb(i - 1, 5) / math.comb(20, 6) for i in range(1, 21)]
    assert best_of_n_weights(20, 6).tolist() == pytest.approx(exact, rel=1e-12)
    for n in (1, 100, 2500, 5000):  # C(5000, 2500) has 1,503 digits
        weights = best_of_n_weights(5000, n)
        assert weights.sum().item() == pytest.approx(1.0, rel=1e-9)
        assert (weights.diff() >= 0).all()


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_the_kl_is_that_of_a_distribution_without_ties(n):
    """M equally likely answers, all of different score: P_n(i) = (i/M)^n - ((i-1)/M)^n against 1/M."""
    size = 200_000
    cumulative = torch.arange(size + 1, dtype=torch.float64) / size
    best = cumulative[1:] ** n - cumulative[:-1] ** n
    chosen = best[best > 0]
    direct = (chosen * (chosen * size).log()).sum().item()
    assert best_of_n_kl(n) == pytest.approx(direct, abs=1e-4)


def test_the_kl_is_an_upper_bound_where_answers_tie():
    """Two equally likely answers: the best of 4 is the better one with probability 15/16."""
    direct = 15 / 16 * math.log(15 / 8) + 1 / 16 * math.log(1 / 8)
    assert 0 < direct < best_of_n_kl(4)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(DataError, match="Draw more answers"):
        best_of_n_weights(4, 5)
    with pytest.raises(DataError, match="n = 0"):
        best_of_n_mean(torch.zeros(1, 4), torch.zeros(1, 4), 0)
    with pytest.raises(DataError, match="one answer or more"):
        best_of_n_kl(0)
