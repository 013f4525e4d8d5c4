import pytest
import torch
from scipy.stats import chisquare
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rlhf.config import validate
from rlhf.errors import ConfigError
from rlhf.lm.sampling import SamplingConfig, choose_tokens


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
