import pytest
import torch
from torch import nn

from rlhf.lm.backbone import LogitsHead
from rlhf.lm.log_probs import CHUNK_ELEMENTS, default_chunk_tokens, selected_log_probs

ROWS, WIDTH, VOCABULARY = 13, 6, 17


def plain(hidden, head, targets, temperature):
    """The definition: all logits at once, torch's own Categorical."""
    distribution = torch.distributions.Categorical(logits=head(hidden) / temperature)
    return distribution.log_prob(targets), distribution.entropy()


def example(dtype=torch.float64, bias=True):
    torch.manual_seed(3)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype)
    hidden = (3 * torch.randn(ROWS, WIDTH, dtype=dtype)).requires_grad_()
    return hidden, head, torch.randint(VOCABULARY, (ROWS,))


class RecordingHead(nn.Module):
    """Remembers how often, and for how many positions at once, it was asked."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.largest, self.calls, self.out_features = inner, 0, 0, VOCABULARY

    def forward(self, hidden):
        self.largest = max(self.largest, len(hidden))
        self.calls += 1
        return self.inner(hidden)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 13, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_are_those_of_a_categorical(chunk_tokens, temperature):
    hidden, head, targets = example()
    log_probs, entropy = selected_log_probs(hidden, head, targets, temperature=temperature, chunk_tokens=chunk_tokens)
    expected_log_probs, expected_entropy = plain(hidden, head, targets, temperature)
    torch.testing.assert_close(log_probs, expected_log_probs)
    torch.testing.assert_close(entropy, expected_entropy)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 13, None])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.3, -0.4)])
@pytest.mark.parametrize("head_settings", [{}, {"scale": 0.3}, {"softcap": 2.0}, {"scale": 2.0, "softcap": 3.0}])
def test_gradients_equal_those_of_the_plain_computation(chunk_tokens, weights, head_settings):
    hidden, layer, targets = example()
    head = LogitsHead(layer, **head_settings)
    factors = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
    gradients = []
    for log_probs, entropy in (
        selected_log_probs(hidden, head, targets, temperature=0.8, chunk_tokens=chunk_tokens),
        plain(hidden, head, targets, 0.8),
    ):
        loss = weights[0] * (factors * log_probs).sum() + weights[1] * (factors * entropy).sum()
        gradients.append(torch.autograd.grad(loss, [hidden, layer.weight, layer.bias]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_gradient_when_only_one_output_is_used():
    hidden, head, targets = example()
    for index in (0, 1):
        outputs = [f(hidden, head, targets) for f in (selected_log_probs, lambda h, m, t: plain(h, m, t, 1.0))]
        gradients = [torch.autograd.grad(output[index].sum(), [hidden, head.weight]) for output in outputs]
        torch.testing.assert_close(gradients[0], gradients[1])


def test_gradcheck():
    hidden, head, targets = example()
    assert torch.autograd.gradcheck(
        lambda states: selected_log_probs(states, head, targets, temperature=1.4, chunk_tokens=5), hidden
    )


def test_only_a_chunk_of_positions_ever_meets_the_head():
    hidden, inner, targets = example()
    head = RecordingHead(inner)
    log_probs, entropy = selected_log_probs(hidden, head, targets, chunk_tokens=4)
    (log_probs.sum() + entropy.sum()).backward()
    assert head.largest == 4  # forward and backward


def test_one_small_chunk_meets_the_head_once(monkeypatch):
    hidden, inner, targets = example()
    head = RecordingHead(inner)
    sum(output.sum() for output in selected_log_probs(hidden, head, targets)).backward()
    assert head.calls == 1
    monkeypatch.setattr("rlhf.lm.log_probs.KEPT_ELEMENTS", ROWS * VOCABULARY - 1)
    sum(output.sum() for output in selected_log_probs(hidden, head, targets)).backward()
    assert head.calls == 3


def test_a_second_backward_finds_the_gradient_of_the_first():
    hidden, head, targets = example()
    log_probs, entropy = selected_log_probs(hidden, head, targets)
    loss = log_probs.sum() - 0.3 * entropy.sum()
    first = torch.autograd.grad(loss, [hidden, head.weight], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, [hidden, head.weight]), first)


def test_nothing_is_kept_where_nothing_learns():
    hidden, inner, targets = example()
    seen = []
    inner.register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    with torch.no_grad():
        selected_log_probs(hidden, inner, targets)
    assert seen == [False]


def test_frozen_head_and_frozen_body():
    hidden, head, targets = example()
    head.requires_grad_(False)
    selected_log_probs(hidden, head, targets)[0].sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None
    head.requires_grad_(True)
    selected_log_probs(hidden.detach(), head, targets)[0].sum().backward()
    assert head.weight.grad is not None


def test_no_positions_give_zero_gradients_and_not_none():
    # A fully masked microbatch must still give every parameter a gradient, or distributed training waits forever.
    _, head, _ = example()
    hidden = torch.zeros(0, WIDTH, dtype=torch.float64, requires_grad=True)
    log_probs, entropy = selected_log_probs(hidden, head, torch.zeros(0, dtype=torch.int64))
    (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == (0,)
    assert torch.equal(head.weight.grad, torch.zeros_like(head.weight))


def test_half_precision_hidden_states_give_float32():
    hidden, head, targets = example(torch.bfloat16)
    log_probs, entropy = selected_log_probs(hidden, head, targets, chunk_tokens=4)
    assert log_probs.dtype == entropy.dtype == torch.float32
    expected, _ = plain(hidden.float(), head.float(), targets, 1.0)
    torch.testing.assert_close(log_probs, expected, atol=0.15, rtol=0.05)


def test_autocast_is_repeated_in_backward():
    hidden, head, targets = example(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs, _ = selected_log_probs(hidden, head, targets, chunk_tokens=4)
    log_probs.sum().backward()  # outside autocast, as accelerate does it
    gradient = hidden.grad.clone()
    hidden.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(hidden)
    torch.log_softmax(logits.float(), dim=-1).gather(1, targets[:, None]).sum().backward()
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(gradient, hidden.grad, atol=2e-2, rtol=2e-2)


def test_extreme_logits_stay_finite():
    head = nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[1e4], [0.0], [-1e4]])
    hidden = torch.ones(3, 1, requires_grad=True)
    log_probs, entropy = selected_log_probs(hidden, head, torch.tensor([0, 1, 2]))
    (log_probs.sum() + entropy.sum()).backward()
    # softmax([1e4, 0, -1e4]) is one-hot: log-probs are the differences of logits, entropy 0.
    assert log_probs.tolist() == [0.0, -1e4, -2e4]
    assert entropy.tolist() == [0.0, 0.0, 0.0]
    assert torch.isfinite(hidden.grad).all()


def test_default_chunk_respects_the_budget():
    assert default_chunk_tokens(2**20, torch.device("cpu")) * 2**20 <= CHUNK_ELEMENTS["cpu"]
    assert default_chunk_tokens(10**9, torch.device("cpu")) == 1
