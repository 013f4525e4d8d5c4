"""The fused training pass against the models' own forward and autograd."""

import pytest
import torch

from rlhf.lm.fused_training import read_fused_pass
from rlhf.lm.fused_training_probe import exact_fused_pass
from rlhf.lm.loading import LoraSettings, add_lora
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.token_layout import lay_out
from tests.lm.fresh_models import VOCABULARY, fresh_model
from tests.lm.test_fused_decoding import FUSED, randomized

TRAINED = ["llama", "all_heads", "one_key_head", "wide_heads", "linear", "dynamic", "llama3", "qwen2", "mistral"]
OWN = ["biases", "gelu", "qwen3"]
"""Structures that decode fused but train through their own forward."""


def batch(prompts, group_size, *, prompt_width=9, width=14, seed=0):
    """Left-padded prompts of random lengths, each several times, with completions of random lengths, 0 included."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, prompt_width + 1, (prompts,), generator=generator).repeat_interleave(group_size)
    ids = torch.randint(VOCABULARY, (prompts, prompt_width), generator=generator).repeat_interleave(group_size, dim=0)
    completions = torch.randint(0, width + 1, (len(ids),), generator=generator)
    return {
        "prompt_ids": ids,
        "prompt_mask": torch.arange(prompt_width) >= prompt_width - lengths[:, None],
        "completion_mask": torch.arange(width) < completions[:, None],
    }, torch.randint(VOCABULARY, (len(ids), width), generator=generator)


def scores_and_gradients(policy, inputs, actions):
    policy.zero_grad(set_to_none=True)
    output = policy(inputs, actions)
    slope = torch.linspace(-1.0, 1.0, actions.numel()).view_as(output.log_probs)
    loss = (slope * output.log_probs).sum() + 0.1 * output.entropy.sum()
    if output.values is not None:
        loss = loss + (slope * output.values).sum()
    loss.backward()
    return output, {name: parameter.grad for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("order", ["grouped", "mixed"])
@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("case", TRAINED)
def test_scores_and_every_gradient_equal_the_models_own(case, group_size, order):
    policy = LanguageModelPolicy(randomized(*FUSED[case]), critic="head")
    torch.nn.init.normal_(policy.value_head.weight)
    inputs, actions = batch(4, group_size)
    if order == "mixed":
        rows = torch.randperm(len(actions), generator=torch.Generator().manual_seed(1))
        inputs, actions = {name: tensor[rows] for name, tensor in inputs.items()}, actions[rows]
    assert exact_fused_pass(policy.model.model) is not None
    output, gradients = scores_and_gradients(policy, inputs, actions)
    policy.model.model.register_forward_hook(lambda *_: None)  # a hook wants the model's own forward
    assert exact_fused_pass(policy.model.model) is None
    own_output, own_gradients = scores_and_gradients(policy, inputs, actions)
    for got, expected in zip(output, own_output, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    for name, expected in own_gradients.items():
        assert (gradients[name] - expected).abs().max() < 2e-5 * (1 + expected.abs().max()), name


def test_a_critic_of_its_own_is_fused_too():
    inputs, actions = batch(3, 2)
    policy = LanguageModelPolicy(fresh_model(), critic=fresh_model("llama_tied"))
    assert exact_fused_pass(policy.critic) is not None
    torch.nn.init.normal_(policy.value_head.weight)
    values = policy(inputs, actions).values
    policy.critic.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(values, policy(inputs, actions).values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", OWN)
def test_other_parts_take_the_models_own_forward(case):
    assert exact_fused_pass(randomized(*FUSED[case]).model) is None


@pytest.mark.parametrize(
    "name", ["gpt2", "gemma", "gemma2", "granite", "cohere", "phi3", "mixtral", "mistral", "olmo2"]
)
def test_other_models_take_their_own_forward(name):
    model = fresh_model(name)
    assert exact_fused_pass(getattr(model, model.base_model_prefix)) is None


def test_adapters_checkpointing_and_other_precisions_take_the_models_own_forward():
    model = fresh_model()
    assert read_fused_pass(model.model) is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert read_fused_pass(model.model) is None
    model.model.gradient_checkpointing = True
    assert read_fused_pass(model.model) is None
    model.model.gradient_checkpointing = False
    assert read_fused_pass(fresh_model().double().model) is None
    assert read_fused_pass(add_lora(model, LoraSettings(rank=4)).get_base_model().model) is None


def test_probe_sees_another_attention():
    model = fresh_model()
    for layer in model.model.layers:  # its class ignores `scaling`
        layer.self_attn.__class__ = type("Other", (type(layer.self_attn),), {"forward": _without_scaling})
    assert read_fused_pass(model.model) is not None
    assert exact_fused_pass(model.model) is None


def _without_scaling(self, *args, **kwargs):
    scaling, self.scaling = self.scaling, 1.0
    try:
        return super(type(self), self).forward(*args, **kwargs)
    finally:
        self.scaling = scaling


def test_layout_counts_each_prompt_once():
    # Rows: a prompt of two tokens twice, another of one token; completions of 2, 1 and 3 tokens.
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 0], [5, 1, 2, 3]])
    layout = lay_out(ids, torch.tensor([4, 3, 4]), torch.tensor([2, 2, 1]))
    assert sorted(layout.ids.tolist()) == sorted([5, 6, 5, 7, 8, 9, 1, 2, 3])  # 9 tokens, not 11
    rows = layout.to_rows(layout.ids[:, None]).squeeze(-1)
    real = torch.arange(4) < torch.tensor([4, 3, 4])[:, None]
    assert torch.equal(rows[real], ids[real])
    assert torch.equal(layout.to_rows(layout.positions[:, None]).squeeze(-1)[real], torch.arange(4).expand(3, 4)[real])


@pytest.mark.parametrize("shared", [True, False])
def test_layout_maps_are_each_others_transpose(shared):
    ids = torch.tensor([[5, 6, 7, 8], [5, 6 if shared else 4, 9, 0], [5, 1, 2, 3]])
    lengths = torch.tensor([4, 3, 4])
    layout = lay_out(ids, lengths, torch.tensor([2, 2, 1]))
    assert (layout.copies is not None) == shared
    torch.manual_seed(0)
    real = (torch.arange(4) < lengths[:, None])[..., None]
    rows, tokens = torch.randn(3, 4, 2) * real, torch.randn(len(layout.ids), 2)
    # <A x, y> = <x, A^T y>, for real places.
    torch.testing.assert_close((layout.to_rows(tokens) * rows).sum(), (tokens * layout.sum_to_tokens(rows)).sum())
    torch.testing.assert_close((layout.to_tokens(rows) * tokens).sum(), (rows * layout.spread(tokens)).sum())
