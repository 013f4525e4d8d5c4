import copy

import pytest
import torch

from rlhf.errors import ModelError
from rlhf.lm.loading import LoraSettings, add_lora
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.reference import FrozenReference, clone_model
from tests.lm.fresh_models import fresh_model
from tests.lm.test_policy import batch


def train_one_step(policy):
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    policy(*batch()).log_probs.sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gemma3", "mixtral"])
def test_kl_is_exactly_zero_at_the_start_and_training_leaves_the_reference_alone(name):
    policy = LanguageModelPolicy(fresh_model(name), temperature=0.8, critic="head")
    reference = FrozenReference(policy)
    inputs, actions = batch()
    start = policy(inputs, actions).log_probs.detach()
    assert torch.equal(reference.log_probs(inputs, actions), start)
    train_one_step(policy)
    assert torch.equal(reference.log_probs(inputs, actions), start)
    assert not torch.allclose(policy(inputs, actions).log_probs, start)


def test_reference_shares_no_memory_with_the_policy():
    model = fresh_model("llama_tied")
    clone = clone_model(model)
    pointers = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert all(tensor.data_ptr() not in pointers for tensor in [*clone.parameters(), *clone.buffers()])
    assert clone.lm_head.weight is clone.model.embed_tokens.weight  # still tied


def test_wrapped_forward_is_not_inherited():
    # What accelerate leaves behind after a trainer ran: an instance attribute bound to the live model. A deep copy
    # takes it along and computes with the live weights (KL 0 forever); a freshly built model does not.
    model = fresh_model()
    live = model.forward
    model.forward = lambda *arguments, **settings: live(*arguments, **settings)
    tokens = torch.arange(6)[None]
    start = model(tokens).logits.detach()
    naive, clone = copy.deepcopy(model), clone_model(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert not torch.allclose(naive(tokens).logits, start)  # the trap
    torch.testing.assert_close(clone(tokens).logits, start)


def test_adapters_off_is_the_reference_of_a_lora_policy():
    policy = LanguageModelPolicy(add_lora(fresh_model(), LoraSettings(rank=4)))
    reference = FrozenReference(policy)
    inputs, actions = batch()
    start = policy(inputs, actions).log_probs.detach()
    assert torch.equal(reference.log_probs(inputs, actions), start)
    train_one_step(policy)
    train_one_step(policy)
    assert torch.equal(reference.log_probs(inputs, actions), start)
    assert not torch.allclose(policy(inputs, actions).log_probs, start)  # and the adapters are on again
    assert sum(parameter.requires_grad for parameter in policy.parameters()) > 0


def test_trained_adapters_are_refused():
    policy = LanguageModelPolicy(add_lora(fresh_model(), LoraSettings(rank=4)))
    train_one_step(policy)
    with pytest.raises(ModelError, match="trained before"):
        FrozenReference(policy)


def test_reference_needs_no_gradient_and_runs_no_critic():
    policy = LanguageModelPolicy(fresh_model(), critic=fresh_model(seed=2))
    reference = FrozenReference(policy)
    calls = []
    policy.critic.register_forward_pre_hook(lambda *_arguments: calls.append(1))
    assert not reference.log_probs(*batch()).requires_grad
    assert not calls


@pytest.mark.slow
def test_reference_after_trl_sft_in_the_same_process(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm

    tokenizer = character_tokenizer("abc ")
    settings = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = load_causal_lm(ModelConfig(config={**settings, "intermediate_size": 16}), tokenizer)
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to=[], save_strategy="no"
    )
    SFTTrainer(
        model, args=arguments, train_dataset=Dataset.from_dict({"text": ["ab c"] * 8}), processing_class=tokenizer
    ).train()
    policy = LanguageModelPolicy(model)
    reference = FrozenReference(policy)
    inputs, actions = batch()
    inputs["prompt_ids"], actions = inputs["prompt_ids"] % 7, actions % 7
    start = policy(inputs, actions).log_probs.detach()
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.5)
    policy(inputs, actions).log_probs.sum().backward()
    optimizer.step()
    torch.testing.assert_close(reference.log_probs(inputs, actions), start)
    assert not torch.allclose(policy(inputs, actions).log_probs, start)
