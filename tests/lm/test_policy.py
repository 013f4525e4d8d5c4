import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from rlhf.errors import DataError, ModelError
from rlhf.lm.loading import LoraSettings, add_lora
from rlhf.lm.policy import VALUE_HEAD_FILE, LanguageModelPolicy
from tests.lm.fresh_models import CONFIGS, END, PAD, VOCABULARY, fresh_model, left_padded


def batch(prompt_lengths=(3, 9, 5, 1), completion_lengths=(7, 4, 2, 6), *, seed=5, prompt_width=None, width=None):
    """Inputs and actions with random tokens."""
    prompt_ids, prompt_mask = left_padded(prompt_lengths, seed=seed, width=prompt_width)
    width = width or max(completion_lengths)
    completion_mask = torch.arange(width)[None] < torch.tensor(completion_lengths)[:, None]
    generator = torch.Generator().manual_seed(seed + 1)
    longest = max(completion_lengths)
    actions = torch.randint(3, VOCABULARY, (len(completion_lengths), longest), generator=generator)
    actions = torch.nn.functional.pad(actions, (0, width - longest)).masked_fill(~completion_mask, PAD)
    return {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_mask": completion_mask}, actions


def row_by_row(model, inputs, actions, temperature=1.0):
    """The definition: each row alone, unpadded, through the model's own forward; [B, T] log-probs, 0 where masked."""
    expected = torch.zeros(actions.shape, dtype=torch.promote_types(model.dtype, torch.float32))
    for row in range(len(actions)):
        prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row]]
        mask = inputs["completion_mask"][row]
        ids = torch.cat([prompt, actions[row][mask]])[None]
        log_p = torch.log_softmax(model(ids).logits[0].to(expected.dtype) / temperature, dim=-1)
        expected[row, mask] = log_p[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).squeeze(1)
    return expected


@pytest.mark.parametrize("name", CONFIGS)
def test_log_probs_are_those_of_the_models_own_forward(name):
    model = fresh_model(name)
    inputs, actions = batch()
    with torch.no_grad():
        output = LanguageModelPolicy(model, temperature=0.7)(inputs, actions)
        expected = row_by_row(model, inputs, actions, temperature=0.7)
    assert output.values is None
    torch.testing.assert_close(output.log_probs, expected, atol=2e-5, rtol=1e-5)


def test_float64_model_agrees_to_float64_precision():
    model = fresh_model(dtype=torch.float64)
    inputs, actions = batch()
    with torch.no_grad():
        output = LanguageModelPolicy(model, chunk_tokens=3)(inputs, actions)
        torch.testing.assert_close(output.log_probs, row_by_row(model, inputs, actions), atol=1e-12, rtol=1e-10)


def test_gradients_equal_those_of_the_models_own_forward():
    inputs, actions = batch()
    model = fresh_model(dtype=torch.float64)
    (LanguageModelPolicy(model, chunk_tokens=3)(inputs, actions).log_probs ** 2).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    (row_by_row(model, inputs, actions) ** 2).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("widths", [(9, 7), (12, 7), (9, 11), (20, 30)])
def test_amount_of_padding_changes_nothing(widths):
    policy = LanguageModelPolicy(fresh_model(), critic="head")
    nn.init.normal_(policy.value_head.weight)
    inputs, actions = batch()
    padded_inputs, padded_actions = batch(prompt_width=widths[0], width=widths[1])
    padded_inputs["prompt_ids"][:, : widths[0] - 9] = 7  # whatever lies under the mask
    padded_actions[:, 7:] = -100
    for key in ("prompt_ids", "prompt_mask"):  # the same real tokens, further to the right
        padded_inputs[key][:, widths[0] - 9 :] = inputs[key]
    with torch.no_grad():
        output, padded = policy(inputs, actions), policy(padded_inputs, padded_actions)
    for expected, got in zip(output, padded, strict=True):
        assert torch.equal(got[:, :7], expected)
        assert not got[:, 7:].any()


def test_side_of_the_prompt_padding_changes_nothing():
    policy = LanguageModelPolicy(fresh_model())
    inputs, actions = batch()
    order = torch.argsort(~inputs["prompt_mask"], dim=1, stable=True)
    right = {**inputs, **{key: inputs[key].gather(1, order) for key in ("prompt_ids", "prompt_mask")}}
    with torch.no_grad():
        assert torch.equal(policy(inputs, actions).log_probs, policy(right, actions).log_probs)


def test_masked_positions_are_zero_and_tokens_in_gaps_are_not_read():
    policy = LanguageModelPolicy(fresh_model(), critic="head")
    inputs, actions = batch()
    inputs["completion_mask"][0] = torch.tensor([True, False, True, True, False, True, False])
    changed = actions.masked_fill(~inputs["completion_mask"], 9)
    with torch.no_grad():
        output, other = policy(inputs, actions), policy(inputs, changed)
        torch.testing.assert_close(output.log_probs, row_by_row(policy.model, inputs, actions), atol=2e-5, rtol=1e-5)
    assert torch.equal(output.log_probs, other.log_probs)
    for tensor in output:
        assert not tensor[~inputs["completion_mask"]].any()


def test_head_sees_completion_positions_only_and_in_chunks():
    model = fresh_model()
    seen = []
    policy = LanguageModelPolicy(model, chunk_tokens=4)
    model.lm_head.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].shape))
    inputs, actions = batch()
    policy(inputs, actions).log_probs.sum().backward()
    # 7 + 4 + 2 + 6 = 19 completion tokens in chunks of 4: 4, 4, 4, 4, 3, once forward and once backward.
    assert [shape[0] for shape in seen] == [4, 4, 4, 4, 3] * 2


def test_body_sees_rows_trimmed_to_the_longest_real_row():
    model = fresh_model()
    widths = []
    policy = LanguageModelPolicy(model)
    model.model.embed_tokens.register_forward_pre_hook(lambda _module, arguments: widths.append(arguments[0].shape[1]))
    policy(*batch(prompt_width=40, width=50))
    # rows are 3+7, 9+4, 5+2, 1+6 long; of the longest, 13, the last token predicts nothing that is asked for.
    assert widths == [12]


def test_ratio_is_exactly_one_in_training_though_the_config_asks_for_dropout():
    model = fresh_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    policy = LanguageModelPolicy(model).train()
    inputs, actions = batch()
    with torch.no_grad():
        old = policy.eval()(inputs, actions).log_probs
    assert torch.equal(policy.train()(inputs, actions).log_probs, old)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_gradient_checkpointing_gives_the_same_output_and_gradient(name):
    dropout = {"gpt2": {"resid_pdrop": 0.5, "attn_pdrop": 0.5}, "opt": {"dropout": 0.5}, "llama": {}}[name]
    inputs, actions = batch()
    results = []
    for checkpointing in (False, True):
        model = fresh_model(name, dtype=torch.float64, **dropout)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy = LanguageModelPolicy(model).train()
        calls = []
        first_layer = next(module for module in model.modules() if type(module).__name__.endswith(("Layer", "Block")))
        attention = next(module for key, module in first_layer.named_children() if "att" in key and "norm" not in key)
        attention.register_forward_pre_hook(lambda *_arguments, calls=calls: calls.append(1))
        log_probs = policy(inputs, actions).log_probs
        log_probs.sum().backward()
        results.append((log_probs.detach(), [parameter.grad for parameter in model.parameters()], len(calls)))
    (plain, plain_gradients, once), (checkpointed, gradients, twice) = results
    assert (once, twice) == (1, 2)  # the layer really was recomputed
    torch.testing.assert_close(plain, checkpointed)
    torch.testing.assert_close(plain_gradients, gradients)


def test_zero_head_starts_with_values_of_zero_and_learns():
    policy = LanguageModelPolicy(fresh_model(), critic="head")
    inputs, actions = batch()
    values = policy(inputs, actions).values
    assert values.shape == actions.shape
    assert not values.any()
    ((values - 1.0) * inputs["completion_mask"]).square().sum().backward()
    assert policy.value_head.weight.grad.abs().sum() > 0


def test_values_come_from_the_state_before_each_action():
    policy = LanguageModelPolicy(fresh_model(), critic="head")
    nn.init.normal_(policy.value_head.weight)
    inputs, actions = batch()
    with torch.no_grad():
        values = policy(inputs, actions).values
        for row in range(len(actions)):
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row]]
            completion = actions[row][inputs["completion_mask"][row]]
            ids = torch.cat([prompt, completion])[None]
            hidden = policy.model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
            expected = hidden @ policy.value_head.weight[0] + policy.value_head.bias
            torch.testing.assert_close(values[row, : len(completion)], expected, atol=1e-4, rtol=1e-4)
        changed = actions.clone()
        changed[0, 3] = 4 if actions[0, 3] != 4 else 5
        later = policy(inputs, changed).values
    assert torch.equal(later[0, :4], values[0, :4])  # V(s_t) cannot know a_t
    assert (later[0, 4:] != values[0, 4:]).all()


def reward_model(labels=1, **changes):
    config = {**CONFIGS["llama"], **changes}
    config.pop("model_type")
    torch.manual_seed(8)
    settings = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "num_labels": labels, **config}
    return AutoModelForSequenceClassification.from_config(LlamaConfig(**settings)).eval()


def test_critic_from_a_reward_model_starts_with_its_scores():
    scorer = reward_model()
    inputs, actions = batch((4,), (5,))
    with torch.no_grad():
        values = LanguageModelPolicy(fresh_model(), critic=scorer)(inputs, actions).values
        for step in range(5):
            prefix = torch.cat([inputs["prompt_ids"], actions[:, :step]], dim=1)
            score = scorer(prefix, attention_mask=torch.ones_like(prefix)).logits
            torch.testing.assert_close(values[0, step], score[0, 0], atol=1e-5, rtol=1e-5)


def test_separate_critic_leaves_the_policy_alone():
    policy = LanguageModelPolicy(fresh_model(), critic=fresh_model(seed=1))
    inputs, actions = batch()
    policy.value_head.weight.data.fill_(0.1)
    policy(inputs, actions).values.sum().backward()
    assert all(parameter.grad is None for parameter in policy.model.parameters())
    assert policy.critic.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("critic", "message"),
    [
        (lambda: reward_model(vocab_size=50), "vocabularies differ"),
        (lambda: reward_model(labels=3), "one label"),
        (lambda: "shared", "unknown critic"),
    ],
)
def test_unusable_critics_are_refused(critic, message):
    with pytest.raises(ModelError, match=message):
        LanguageModelPolicy(fresh_model(), critic=critic())


class ShiftedLlama(LlamaForCausalLM):
    """Does something to its logits that no config key tells."""

    def forward(self, *arguments, **settings):
        output = super().forward(*arguments, **settings)
        output.logits = output.logits.clamp(max=30.0)
        return output


def test_model_with_an_unknown_change_of_logits_is_refused():
    model = fresh_model()
    model.__class__ = ShiftedLlama
    with pytest.raises(ModelError, match="changes its logits after the output layer"):
        LanguageModelPolicy(model)


def test_empty_prompt_is_refused_with_its_row():
    inputs, actions = batch()
    inputs["prompt_mask"][2] = False
    with pytest.raises(DataError, match="row 2"):
        LanguageModelPolicy(fresh_model())(inputs, actions)


def test_fully_masked_batch_gives_every_parameter_a_zero_gradient():
    policy = LanguageModelPolicy(fresh_model(), critic="head")
    inputs, actions = batch()
    inputs["completion_mask"][:] = False
    output = policy(inputs, actions)
    (output.log_probs.sum() + output.entropy.sum() + output.values.sum()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_row_lengths_count_what_forward_processes():
    inputs, actions = batch()
    policy = LanguageModelPolicy(fresh_model())
    # prompt + completion: 3 + 7, 9 + 4, 5 + 2, 1 + 6
    assert policy.row_lengths(inputs, torch.ones_like(actions, dtype=torch.bool)).tolist() == [10, 13, 7, 7]


def test_lora_wrapped_policy_trains_adapters_and_value_head_only():
    policy = LanguageModelPolicy(add_lora(fresh_model(), LoraSettings(rank=2)), critic="head")
    inputs, actions = batch()
    with torch.no_grad():
        expected = row_by_row(fresh_model(), inputs, actions)
    output = policy(inputs, actions)
    torch.testing.assert_close(output.log_probs, expected, atol=2e-5, rtol=1e-5)
    (output.log_probs.sum() + output.values.sum()).backward()
    with_gradient = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert with_gradient
    assert all("lora_" in name or "value_head" in name for name in with_gradient)


def test_lora_on_the_output_layer_gets_its_gradient():
    model = fresh_model(dtype=torch.float64)
    policy = LanguageModelPolicy(add_lora(model, LoraSettings(rank=2, target_modules=["lm_head"])), chunk_tokens=3)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    inputs, actions = batch()
    policy(inputs, actions).log_probs.sum().backward()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradients = [parameter.grad.clone() for parameter in trained]
    policy.zero_grad()
    row_by_row(policy.model, inputs, actions).sum().backward()
    torch.testing.assert_close(gradients, [parameter.grad for parameter in trained], atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("with_lora", [False, True])
def test_saved_policy_opens_as_an_ordinary_model(tmp_path, with_lora):
    fresh_model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if with_lora:
        model = add_lora(model, LoraSettings(rank=2))
    policy = LanguageModelPolicy(model, critic="head")
    nn.init.normal_(policy.value_head.weight)
    policy.save(tmp_path / "policy")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    inputs, actions = batch()
    again = LanguageModelPolicy(opened, critic="head")
    again.load_value_head(tmp_path / "policy")
    with torch.no_grad():
        for expected, got in zip(policy(inputs, actions), again(inputs, actions), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


def test_missing_value_head_is_named(tmp_path):
    with pytest.raises(ModelError, match=VALUE_HEAD_FILE):
        LanguageModelPolicy(fresh_model(), critic="head").load_value_head(tmp_path)
    with pytest.raises(ModelError, match="no critic"):
        LanguageModelPolicy(fresh_model()).load_value_head(tmp_path)


def test_end_token_as_padding_is_told_apart_by_the_mask():
    policy = LanguageModelPolicy(fresh_model())
    inputs, actions = batch()
    actions[:, 1] = END
    with torch.no_grad():
        first = policy(inputs, actions.masked_fill(~inputs["completion_mask"], END)).log_probs
        second = policy(inputs, actions.masked_fill(~inputs["completion_mask"], PAD)).log_probs
    assert torch.equal(first, second)
