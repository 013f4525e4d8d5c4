"""Several adapters on one backbone: each computes what it would compute alone, and trains what is its own."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ModelError
from rlhf.lm.adapters import CRITIC, AdapterCritic, AdapterSwitch, add_critic_adapter
from rlhf.lm.loading import LoraSettings, add_lora
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.reference import FrozenReference
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig
from tests.lm.fresh_models import fresh_model
from tests.lm.test_policy import batch


def adapter_policy(name="llama", **changes):
    model = add_lora(fresh_model(name, **changes), LoraSettings(rank=2))
    add_critic_adapter(model)
    return LanguageModelPolicy(model, critic=AdapterCritic(model))


def move(policy, part, *, seed=3):
    """Give the adapter of this name, or the value head, weights that matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if part in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_policy_and_critic_each_compute_with_their_own_adapter(name):
    policy = adapter_policy(name)
    inputs, actions = batch()
    with torch.no_grad():
        start = policy(inputs, actions)
        assert not start.values.any()  # a zero head
        move(policy, "value_head")
        plain = policy(inputs, actions)
        move(policy, f".{CRITIC}.")
        critic_moved = policy(inputs, actions)
        move(policy, ".default.", seed=4)
        both_moved = policy(inputs, actions)
    assert torch.equal(critic_moved.log_probs, start.log_probs)
    assert not torch.allclose(critic_moved.values, plain.values)
    assert torch.equal(both_moved.values, critic_moved.values)
    assert not torch.allclose(both_moved.log_probs, start.log_probs)


def test_losses_reach_their_own_adapter_only():
    policy = adapter_policy()
    move(policy, "value_head")
    inputs, actions = batch()
    policy(inputs, actions).values.sum().backward()
    reached = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached
    assert all(f".{CRITIC}." in name or "value_head" in name for name in reached)
    policy.zero_grad()
    policy(inputs, actions).log_probs.sum().backward()
    reached = {n for n, p in policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached
    assert all(".default." in name for name in reached)


def test_a_pass_of_the_reference_freezes_nothing():
    policy = adapter_policy()
    inputs, actions = batch()
    start = policy(inputs, actions).log_probs.detach()
    reference = FrozenReference(policy)
    asked = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    move(policy, ".default.")
    assert torch.equal(reference.log_probs(inputs, actions), start)
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == asked
    # The trap: PEFT's own context manager wakes the active adapter only.
    with policy.model.disable_adapter():
        pass
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} < asked


def test_the_switch_goes_back_after_an_error():
    policy = adapter_policy()
    switch = AdapterSwitch(policy.model)
    inputs, actions = batch()
    move(policy, ".default.")
    before = policy(inputs, actions).log_probs
    with pytest.raises(RuntimeError), switch.only(None):
        raise RuntimeError
    assert torch.equal(policy(inputs, actions).log_probs, before)


def test_saved_policy_has_its_adapter_at_the_root_and_the_critics_beside(tmp_path):
    fresh_model().save_pretrained(tmp_path / "base")
    model = add_lora(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraSettings(rank=2))
    add_critic_adapter(model)
    policy = LanguageModelPolicy(model, critic=AdapterCritic(model))
    for part in (".default.", f".{CRITIC}.", "value_head"):
        move(policy, part)
    policy.save(tmp_path / "policy")
    inputs, actions = batch()
    opened = LanguageModelPolicy(AutoModelForCausalLM.from_pretrained(tmp_path / "policy"))
    with torch.no_grad():
        expected, got = policy(inputs, actions), opened(inputs, actions)
    torch.testing.assert_close(got.log_probs, expected.log_probs, atol=1e-6, rtol=1e-5)
    assert (tmp_path / "policy" / CRITIC / "adapter_model.safetensors").is_file()


def test_checkpointing_is_refused_and_so_is_a_model_without_adapters():
    model = add_lora(fresh_model(), LoraSettings(rank=2))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(ModelError, match="recompute the critic's layers"):
        add_critic_adapter(model)
    with pytest.raises(ModelError, match=r"Set model\.lora"):
        add_critic_adapter(fresh_model())


def critic_names_that_moved(policy, *, critic_only, updates=2):
    """Names of parameters that two updates on random experience changed."""
    from tests.training.small_worlds import make_language_experience

    learner = Learner(policy, ALGORITHMS["ppo_rlhf"], UpdateConfig(learning_rate=1e-2, weight_decay=0.1))
    before = {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}
    for _ in range(updates):
        learner.update(make_language_experience(), kl_coef=0.1, critic_only=critic_only)
    return {name for name, parameter in policy.named_parameters() if not torch.equal(parameter, before[name])}


def test_warm_up_moves_the_critic_alone():
    model = fresh_model()
    head = LanguageModelPolicy(model, critic="head")
    assert critic_names_that_moved(head, critic_only=True) == {"value_head.weight", "value_head.bias"}
    separate = LanguageModelPolicy(fresh_model(), critic=fresh_model(seed=1))
    moved = critic_names_that_moved(separate, critic_only=True)
    assert any(name.startswith("critic.") for name in moved)
    assert all(name.startswith(("critic.", "value_head.")) for name in moved)
    adapter = adapter_policy()
    moved = critic_names_that_moved(adapter, critic_only=True)
    assert any(f".{CRITIC}." in name for name in moved)
    assert all(f".{CRITIC}." in name or "value_head" in name for name in moved)
    # And without it, all learn.
    assert any(name.startswith("model.") for name in critic_names_that_moved(head, critic_only=False))


def test_warm_up_takes_the_steps_of_the_value_loss_alone():
    """The head after a warm-up step is that of plain AdamW on the value loss: nothing of the policy's loss leaks in."""
    from rlhf.core.objective import Objective
    from tests.training.small_worlds import make_language_experience

    experience = make_language_experience()
    algorithm = ALGORITHMS["ppo_rlhf"].model_copy(update={"epochs": 1})
    policy = LanguageModelPolicy(fresh_model(), critic="head")
    Learner(policy, algorithm, UpdateConfig(learning_rate=1e-2, max_grad_norm=None)).update(
        experience, kl_coef=0.1, critic_only=True
    )
    twin = LanguageModelPolicy(fresh_model(), critic="head")
    optimizer = torch.optim.AdamW(twin.value_head.parameters(), lr=1e-2, eps=1e-5, weight_decay=0.0)
    objective = Objective(algorithm)
    sums = objective(twin(experience.inputs, experience.actions), experience, kl_coef=0.1)
    (sums.value / experience.action_mask.sum()).backward()
    optimizer.step()
    torch.testing.assert_close(policy.value_head.weight, twin.value_head.weight, atol=1e-6, rtol=1e-5)
    assert isinstance(policy.value_head, nn.Linear)
