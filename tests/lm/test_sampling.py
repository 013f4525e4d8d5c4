import pytest
import torch
from scipy.stats import chisquare
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rlhf.config import validate
from rlhf.errors import ConfigError
from rlhf.lm.sampling import SamplingConfig, choose_tokens, invert_cdf


def uniforms(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


def warped_log_probs(logits, sampling):
    """What transformers' own warpers leave, in its order: temperature, top-k, top-p."""
    scores = logits / sampling.temperature
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    return torch.log_softmax(scores, dim=-1)


SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 5},
    {"top_p": 0.7},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
    {"top_k": 1},
    {"top_p": 1e-6},
    {"top_k": 1000},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_distribution_and_log_probs_are_those_of_transformers_warpers(settings):
    sampling = SamplingConfig(**settings)
    torch.manual_seed(0)
    logits = (2 * torch.randn(1, 40)).expand(20_000, 40)
    tokens, log_probs = choose_tokens(logits, sampling, uniforms=uniforms(20_000))
    expected = warped_log_probs(logits[:1], sampling)[0]
    torch.testing.assert_close(log_probs, expected[tokens], atol=1e-5, rtol=1e-5)
    counts = torch.bincount(tokens, minlength=40).double()
    kept = expected.exp() > 0
    assert counts[~kept].sum() == 0
    if kept.sum() > 1:
        frequencies = expected[kept].double().exp()
        assert chisquare(counts[kept], frequencies / frequencies.sum() * 20_000).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_greedy_takes_the_most_likely_token_and_reports_its_full_log_prob(temperature):
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 3.5]])
    tokens, log_probs = choose_tokens(logits, SamplingConfig(greedy=True, temperature=temperature, top_k=1))
    assert tokens.tolist() == [1, 2]
    expected = torch.log_softmax(logits / temperature, dim=-1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(log_probs, expected)


def test_inverse_cdf_by_hand():
    # p = [0.5, 0, 0.25, 0.25]: u < 0.5 gives 0, [0.5, 0.75) gives 2, the rest 3; token 1 never.
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(6, 4)
    numbers = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.76, 1 - 2**-24])
    tokens, _ = choose_tokens(logits, SamplingConfig(), uniforms=numbers)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]


def test_largest_uniform_never_gives_an_impossible_token():
    # The last tokens have probability 0; rounding in the sum of many must not reach them.
    torch.manual_seed(1)
    logits = torch.randn(200, 5000)
    logits[:, -10:] = float("-inf")
    tokens, log_probs = choose_tokens(logits, SamplingConfig(), uniforms=torch.full((200,), 1 - 2**-24))
    assert (tokens < 4990).all()
    assert torch.isfinite(log_probs).all()


def test_smallest_uniform_never_gives_an_impossible_token():
    logits = torch.tensor([[float("-inf"), float("-inf"), 0.0]])
    assert choose_tokens(logits, SamplingConfig(), uniforms=torch.zeros(1))[0].tolist() == [2]


@pytest.mark.parametrize("width", [2048, 2049, 5000])  # 5000 is no multiple of the block
def test_search_in_two_levels_finds_what_one_cumulative_sum_in_float64_finds(width):
    weights = torch.rand(2000, width, generator=torch.Generator().manual_seed(0)) ** 8
    weights[:, ::3] = 0.0
    random = uniforms(2000, seed=1)[:, None]
    chosen, total = invert_cdf(weights, random)
    exact = weights.double().cumsum(dim=1)
    expected = torch.searchsorted(exact, random.double() * exact[:, -1:], right=True)
    torch.testing.assert_close(total.double(), exact[:, -1:])
    assert (weights.gather(1, chosen) > 0).all()
    # Rounding moves a boundary by about 1e-7 of the total, so few rows choose a neighbour.
    assert (chosen == expected).double().mean() > 0.995
    reached = exact.gather(1, chosen) / exact[:, -1:]
    assert (reached - random.double()).min() > -1e-5


def test_search_in_two_levels_draws_every_part_of_a_large_vocabulary_as_often_as_it_should():
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(2))
    draws = 60_000
    random = uniforms(draws, seed=3).split(2000)
    tokens = torch.cat([choose_tokens(logits.expand(2000, -1), SamplingConfig(), uniforms=part)[0] for part in random])
    counts = torch.bincount(tokens % 100, minlength=100).double()  # tokens of every block in each of 100 classes
    expected = torch.softmax(logits.double(), dim=1).view(30, 100).sum(dim=0) * draws
    assert chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_search_in_two_levels_never_gives_an_impossible_token(uniform):
    weights = torch.zeros(1, 4097)
    weights[0, [1000, 1001, 2500]] = torch.tensor([1e-30, 0.7, 0.3])
    chosen, _ = invert_cdf(weights, torch.tensor([[uniform]]))
    assert chosen.item() == (1000 if uniform == 0.0 else 2500)


def test_a_rows_choice_does_not_depend_on_its_neighbours():
    torch.manual_seed(2)
    logits, numbers = torch.randn(9, 30), uniforms(9)
    together, _ = choose_tokens(logits, SamplingConfig(top_p=0.9), uniforms=numbers)
    alone = [
        choose_tokens(logits[i : i + 1], SamplingConfig(top_p=0.9), uniforms=numbers[i : i + 1])[0] for i in range(9)
    ]
    assert together.tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"max_completion_length": 0}]
)
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        validate(SamplingConfig, settings)


def test_full_support():
    assert SamplingConfig(temperature=0.3).full_support
    assert SamplingConfig(greedy=True, top_k=3).full_support
    assert not SamplingConfig(top_p=0.99).full_support
    assert not SamplingConfig(top_k=3).full_support
