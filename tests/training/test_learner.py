"""The learner against a hand-written PPO, against itself under other splits, and in trouble."""

from dataclasses import replace
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_worlds import (
    ActorCritic,
    LengthAware,
    make_experience,
    make_language_experience,
    tiny_language_policy,
    without_rows,
)
from torch import nn

from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError, ModelError, TrainingError
from rlhf.training.learner import Learner
from rlhf.training.optimizer import step_alone
from rlhf.training.update_config import UpdateConfig


def change(name, **changes):
    return ALGORITHMS[name].model_copy(update=changes)


def updated(policy, algorithm, update, experience, *, updates=1, **arguments):
    learner = Learner(policy, algorithm, update, seed=3)
    for _ in range(updates):
        metrics = learner.update(experience, **arguments)
    return learner, metrics


def weights(policy):
    return {name: tensor.detach().clone() for name, tensor in policy.state_dict().items()}


def assert_same(first, second, **tolerance):
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], **tolerance)


def hand_written_ppo(policy, experience, *, epochs, minibatches, optimizer, max_norm, seed):
    """PPO as in CleanRL's ppo.py, on single actions: clip 0.2, value clip 0.2, coefficient 0.5, no entropy bonus.

    Only the biased standard deviation and its epsilon under the root are the toolkit's (SPEC, whitening).
    """
    kept = experience.action_mask.flatten()
    observations = experience.inputs["observations"].flatten(0, 1)[kept]
    columns = (experience.actions, experience.old_log_probs, experience.advantages, experience.returns)
    actions, old, advantages, returns = (column.flatten()[kept] for column in columns)
    old_values = experience.old_values.flatten()[kept]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(actions), generator=generator).tensor_split(minibatches):
            output = policy({"observations": observations[rows]}, actions[rows])
            ratio = (output.log_probs - old[rows]).exp()
            a = advantages[rows]
            a = (a - a.mean()) / (a.var(correction=0) + 1e-8).sqrt()
            policy_loss = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
            clipped = old_values[rows] + (output.values - old_values[rows]).clamp(-0.2, 0.2)
            value_loss = 0.5 * torch.max((output.values - returns[rows]) ** 2, (clipped - returns[rows]) ** 2).mean()
            optimizer.zero_grad()
            (policy_loss + 0.5 * value_loss).backward()
            nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
            optimizer.step()


ORACLES = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=3e-3, eps=1e-5),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3, eps=1e-5, weight_decay=0.1),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=3e-3, eps=1e-5, alpha=0.99),
}


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("name", ORACLES)
def test_is_a_hand_written_ppo(name, flatten):
    experience = without_rows(make_experience(20, 6))
    expected = ActorCritic()
    optimizer = ORACLES[name](expected.parameters())
    hand_written_ppo(expected, experience, epochs=4, minibatches=4, optimizer=optimizer, max_norm=0.5, seed=3)
    policy = ActorCritic()
    update = UpdateConfig(
        learning_rate=3e-3,
        optimizer=name,
        weight_decay=0.1 if name == "adamw" else 0.0,
        max_grad_norm=0.5,
        shuffle="actions",
        flatten_parameters=flatten,
    )
    updated(policy, change("ppo"), update, experience)
    assert_same(weights(policy), weights(expected), rtol=1e-4, atol=2e-6)


SPLITS = [{"microbatch_rows": 1}, {"microbatch_rows": 2}, {"microbatch_rows": 5}, {"microbatch_tokens": 11}]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["ppo", "ppo_kl", "grpo", "gspo", "rloo", "cispo"])
def test_microbatches_change_no_gradient(name, split):
    algorithm = change(name, minibatches=2, epochs=2, entropy_coef=0.01)
    experience = make_experience(13, 5)
    whole, parts = ActorCritic(), ActorCritic()
    _, expected = updated(whole, algorithm, UpdateConfig(learning_rate=1e-2), experience, kl_coef=0.1)
    _, metrics = updated(parts, algorithm, UpdateConfig(learning_rate=1e-2, **split), experience, kl_coef=0.1)
    assert_same(weights(parts), weights(whole), rtol=1e-4, atol=1e-5)
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("split", [{"microbatch_rows": 3}, {"microbatch_tokens": 12}, {"microbatch_tokens": 40}])
def test_microbatches_change_no_gradient_of_a_language_model(split):
    algorithm, experience = change("ppo_rlhf", epochs=1, minibatches=2), make_language_experience()
    whole, parts = tiny_language_policy(), tiny_language_policy()
    updated(whole, algorithm, UpdateConfig(learning_rate=1e-2, optimizer="rmsprop"), experience)
    updated(parts, algorithm, UpdateConfig(learning_rate=1e-2, optimizer="rmsprop", **split), experience)
    assert_same(weights(parts), weights(whole), rtol=1e-3, atol=1e-4)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 30))
def test_any_split_gives_the_same_gradient_norm(rows, tokens):
    experience = make_experience(9, 4)
    norms = [
        updated(LengthAware(), change("ppo", epochs=1, minibatches=1), update, experience)[1]["grad_norm"]
        for update in (UpdateConfig(), UpdateConfig(microbatch_rows=rows, microbatch_tokens=max(4, tokens)))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_rows_are_sorted_by_length_inside_a_minibatch_and_each_is_used_once():
    policy, experience = LengthAware(), make_experience(12, 5)
    updated(policy, change("ppo", epochs=2, minibatches=3), UpdateConfig(microbatch_rows=2), experience)
    lengths = experience.action_mask.sum(1)
    per_epoch = [list(chain(*policy.calls[:6])), list(chain(*policy.calls[6:12]))]
    for rows in per_epoch:
        assert sorted(rows) == list(range(12))
        for minibatch in (rows[:4], rows[4:8], rows[8:]):
            assert lengths[minibatch].tolist() == sorted(lengths[minibatch].tolist(), reverse=True)
    assert per_epoch[0] != per_epoch[1], "every epoch draws anew"


def test_shuffled_actions_of_one_minibatch_give_the_gradient_of_whole_rows():
    algorithm, experience = change("ppo", epochs=1, minibatches=1), without_rows(make_experience())
    rows, actions = ActorCritic(), ActorCritic()
    _, expected = updated(rows, algorithm, UpdateConfig(), experience)
    _, metrics = updated(actions, algorithm, UpdateConfig(shuffle="actions"), experience)
    assert metrics == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert_same(weights(rows), weights(actions), rtol=1e-4, atol=1e-6)


def test_masked_actions_may_hold_anything():
    experience = make_experience()
    poisoned = replace(
        experience,
        advantages=torch.where(experience.action_mask, experience.advantages, torch.nan),
        returns=torch.where(experience.action_mask, experience.returns, torch.inf),
    )
    clean, dirty = ActorCritic(), ActorCritic()
    updated(clean, change("ppo"), UpdateConfig(), experience)
    updated(dirty, change("ppo"), UpdateConfig(), poisoned)
    assert_same(weights(clean), weights(dirty), rtol=0, atol=0)


def test_metrics_are_those_of_arithmetic():
    policy = ActorCritic()
    experience = make_experience(7, 4, policy=policy)
    _, metrics = updated(policy, change("ppo_rlhf", epochs=1, minibatches=1), UpdateConfig(), experience, kl_coef=0.2)
    mask = experience.action_mask
    returns, values = experience.returns[mask].double(), experience.old_values[mask].double()
    difference = (experience.old_log_probs - experience.ref_log_probs)[mask]
    assert metrics["rows"] == 7
    assert metrics["actions"] == mask.sum().item()
    assert metrics["kl_to_ref"] == pytest.approx(difference.mean().item(), rel=1e-5)
    assert metrics["kl_to_ref_per_sequence"] == pytest.approx(difference.sum().item() / 7, rel=1e-5)
    explained = 1 - ((returns - values).var(correction=0) / returns.var(correction=0)).item()
    assert metrics["explained_variance"] == pytest.approx(explained, rel=1e-5)
    assert metrics["learning_rate"] == 3e-4
    assert metrics["kl_coef"] == 0.2
    assert metrics["epochs_run"] == 1


def test_the_reported_gradient_norm_is_that_before_clipping():
    policy, experience = ActorCritic(), make_experience()
    _, metrics = updated(policy, change("a2c"), UpdateConfig(max_grad_norm=1e-3), experience)
    probe = ActorCritic()
    learner = Learner(probe, change("a2c"), UpdateConfig(max_grad_norm=None))
    learner._optimizer.step = lambda **_: None
    learner.update(experience)
    norm = torch.cat([parameter.grad.flatten() for parameter in probe.parameters()]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_constant_returns_explain_nothing():
    experience = replace(make_experience(), returns=torch.ones(12, 5))
    _, metrics = updated(ActorCritic(), change("ppo"), UpdateConfig(), experience)
    assert metrics["explained_variance"] != metrics["explained_variance"]


def test_stops_before_the_step_whose_kl_is_too_large():
    policy = ActorCritic()
    experience = make_experience(policy=policy)
    # A step of Adam at this rate moves the policy far beyond the limit, which the second minibatch then sees.
    update = UpdateConfig(learning_rate=0.1, target_kl=0.02)
    experience = replace(experience, old_log_probs=policy(experience.inputs, experience.actions).log_probs.detach())
    one_step = ActorCritic()
    updated(one_step, change("ppo", epochs=1, minibatches=1), update, experience)
    _, metrics = updated(policy, change("ppo", epochs=10, minibatches=1), update, experience)
    assert metrics["epochs_run"] == 1
    assert_same(weights(policy), weights(one_step), rtol=0, atol=0)
    ratio = (policy(experience.inputs, experience.actions).log_probs - experience.old_log_probs).detach()
    measured = (ratio.exp() - 1 - ratio)[experience.action_mask].mean().item()
    assert metrics["approx_kl"] == pytest.approx(measured, rel=1e-3)
    assert measured > 1.5 * 0.02
    assert all(parameter.grad is None for parameter in policy.parameters()), "the refused gradient is gone"


def test_an_adaptive_kl_to_the_old_policy_is_measured_after_the_last_step():
    policy = ActorCritic()
    experience = make_experience(policy=policy)
    _, metrics = updated(policy, change("ppo_kl"), UpdateConfig(learning_rate=1e-2), experience, kl_coef=1.0)
    ratio = (policy(experience.inputs, experience.actions).log_probs - experience.old_log_probs).detach()
    measured = (ratio.exp() - 1 - ratio)[experience.action_mask]
    assert metrics["kl_to_old_after"] == pytest.approx(measured.mean().item(), rel=1e-4)
    assert metrics["kl_to_old_after_per_sequence"] == pytest.approx(measured.sum().item() / 12, rel=1e-4)


def test_schedules_reach_the_step_and_the_clip():
    update = UpdateConfig(learning_rate=0.01, learning_rate_schedule="linear", clip_schedule="linear")
    learner, metrics = updated(ActorCritic(), change("ppo"), update, make_experience(), progress=0.75)
    assert metrics["learning_rate"] == pytest.approx(0.0025)
    # Every ratio but 1 itself lies outside a range of 0.
    _, metrics = updated(ActorCritic(), change("ppo", epochs=1), update, make_experience(), progress=1.0)
    assert metrics["clip_fraction"] == pytest.approx(0.5, abs=0.2)
    assert learner.updates == 1


def test_a_minibatch_without_actions_is_skipped():
    experience = make_experience(4, 3)
    experience = replace(experience, action_mask=experience.action_mask & (torch.arange(4) < 1).unsqueeze(1))
    policy = ActorCritic()
    _, metrics = updated(policy, change("ppo", epochs=1, minibatches=4), UpdateConfig(), experience)
    assert metrics["minibatches_skipped"] == 3
    assert metrics["epochs_run"] == 0.25


# --- trouble --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize(
    ("field", "part"), [("advantages", "policy loss"), ("returns", "value loss"), ("old_log_probs", "policy loss")]
)
def test_a_loss_that_is_not_finite_never_reaches_the_weights(field, part, flatten):
    experience = make_experience(8, 4, ragged=False)
    broken = getattr(experience, field).clone()
    broken[3, 2] = torch.nan
    policy = ActorCritic()
    before = weights(policy)
    algorithm = change("ppo", advantages=ALGORITHMS["a2c"].advantages, minibatches=1)
    learner = Learner(policy, algorithm, UpdateConfig(flatten_parameters=flatten))
    with pytest.raises(TrainingError, match=rf"update 1, epoch 1, minibatch 1: .*{part}.*experience: {field}"):
        learner.update(replace(experience, **{field: broken}))
    assert_same(weights(policy), before, rtol=0, atol=0)
    learner.update(experience)  # and learning goes on
    assert all(torch.isfinite(tensor).all() for tensor in weights(policy).values())


@pytest.mark.parametrize("flatten", [False, True])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(flatten):
    def surrogate(ratio, log_probs, advantages):
        return (ratio - ratio.detach()).abs().sqrt() * advantages  # 0, with a derivative of 0 / 0

    policy = ActorCritic()
    before = weights(policy)
    update = UpdateConfig(flatten_parameters=flatten)
    learner = Learner(policy, change("ppo", minibatches=1), update, surrogate=surrogate)
    with pytest.raises(TrainingError, match=r"the gradient is not finite.*gradient: actor\.0\.weight"):
        learner.update(make_experience())
    assert_same(weights(policy), before, rtol=0, atol=0)


def test_weights_that_are_not_finite_are_named():
    policy = ActorCritic()
    with torch.no_grad():
        policy.actor[2].bias[0] = torch.inf
    with pytest.raises(TrainingError, match=r"weights: actor\.2\.bias"):
        Learner(policy, change("ppo"), UpdateConfig()).update(make_experience())


def test_fewer_rows_than_minibatches_are_refused():
    with pytest.raises(TrainingError, match=r"3 rows for algorithm\.minibatches=4"):
        updated(ActorCritic(), change("ppo"), UpdateConfig(), make_experience(3))


def test_a_rollout_without_actions_is_refused():
    experience = without_rows(make_experience())
    empty = replace(experience, action_mask=torch.zeros_like(experience.action_mask))
    with pytest.raises(TrainingError, match="no row with an action"):
        updated(ActorCritic(), change("ppo"), UpdateConfig(shuffle="actions"), empty)


def test_single_actions_are_not_shuffled_where_rows_mean_something():
    with pytest.raises(ConfigError, match=r"update.shuffle=rows"):
        Learner(ActorCritic(), change("gspo"), UpdateConfig(shuffle="actions"))


def test_dropout_is_refused():
    policy = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.1))
    with pytest.raises(ModelError, match=r"policy\.1: dropout"):
        Learner(policy, change("grpo"), UpdateConfig())


def test_a_frozen_policy_is_refused():
    with pytest.raises(ModelError, match="no trainable parameter"):
        Learner(ActorCritic().requires_grad_(False), change("ppo"), UpdateConfig())


def test_a_row_that_fits_into_no_microbatch_is_refused():
    with pytest.raises(TrainingError, match="a row of 5 tokens does not fit"):
        updated(ActorCritic(), change("ppo"), UpdateConfig(microbatch_tokens=4), make_experience())


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_flat", [False, True])
@pytest.mark.parametrize("loaded_flat", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_a_state_goes_on_flat_or_not(saved_flat, loaded_flat, optimizer):
    experience = make_experience()

    def learner(flat, seed):
        update = UpdateConfig(flatten_parameters=flat, optimizer=optimizer, learning_rate=1e-2)
        return Learner(ActorCritic(seed=seed), change("ppo"), update, seed=seed)

    first = learner(saved_flat, 0)
    first.update(experience)
    state = first.state_dict()
    second = learner(loaded_flat, 1)
    second.load_state_dict(state)
    first.update(experience)
    second.update(experience)
    exact = {"rtol": 0, "atol": 0} if saved_flat == loaded_flat else {"rtol": 1e-4, "atol": 1e-6}
    assert_same(weights(first.policy), weights(second.policy), **exact)
    assert second.updates == 2


@pytest.mark.parametrize("flatten", [False, True])
def test_the_state_is_per_parameter_and_shares_no_storage(flatten):
    learner, _ = updated(ActorCritic(), change("ppo"), UpdateConfig(flatten_parameters=flatten), make_experience())
    state = learner.state_dict()
    assert state["policy"]["learned"].keys() == dict(ActorCritic().state_dict()).keys()
    for name, tensor in state["policy"]["learned"].items():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
        assert state["optimizer"][name]["exp_avg"].shape == tensor.shape
        assert state["optimizer"][name]["step"].item() == 16


def test_another_policys_state_is_refused():
    state = Learner(ActorCritic(width=8), change("ppo"), UpdateConfig()).state_dict()
    with pytest.raises(ConfigError, match=r"another policy; got 'actor.0.bias"):
        Learner(ActorCritic(), change("ppo"), UpdateConfig()).load_state_dict(state)


def test_leaving_the_flat_tensor_is_noticed():
    policy = ActorCritic()
    learner = Learner(policy, change("ppo"), UpdateConfig(flatten_parameters=True))
    policy.zero_grad(set_to_none=True)
    with pytest.raises(ModelError, match="left the flat tensor"):
        learner.update(make_experience())


def test_flat_parameters_of_two_kinds_are_refused():
    policy = ActorCritic()
    policy.critic.double()
    with pytest.raises(ModelError, match="one dtype and one device"):
        Learner(policy, change("ppo"), UpdateConfig(flatten_parameters=True))


def test_frozen_parameters_stay_where_they_are():
    policy = ActorCritic()
    policy.critic.requires_grad_(False)
    before = weights(policy)
    updated(policy, change("grpo"), UpdateConfig(flatten_parameters=True), make_experience())
    after = weights(policy)
    assert_same({k: v for k, v in before.items() if "critic" in k}, after, rtol=0, atol=0)
    assert not torch.equal(before["actor.0.weight"], after["actor.0.weight"])


def test_frozen_parameters_are_not_stored_but_recognised():
    def learner(seed):
        policy = ActorCritic(seed=seed)
        policy.actor[0].requires_grad_(False)  # as the model under an adapter
        return Learner(policy, change("ppo"), UpdateConfig())

    first = learner(0)
    first.update(make_experience())
    state = first.state_dict()
    assert "actor.0.weight" not in state["policy"]["learned"]
    same = learner(0)
    same.load_state_dict(state)
    assert_same(weights(first.policy), weights(same.policy), rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"another policy; got 'actor.0.bias, actor.0.weight'"):
        learner(1).load_state_dict(state)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_a_step_without_torch_s_bookkeeping_is_the_same_step(kind):
    settings = {"lr": 1e-2, "weight_decay": 0.1} | ({} if kind is torch.optim.RMSprop else {"fused": True})
    parameters = [torch.nn.Parameter(torch.linspace(-1, 1, 50)) for _ in range(2)]
    ordinary, alone = (kind([parameter], **settings) for parameter in parameters)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(50, generator=generator)
        for parameter in parameters:
            parameter.grad = gradient.clone()
        ordinary.step()
        step_alone(alone, parameters[1])
    assert torch.equal(*parameters)
    for key, value in ordinary.state[parameters[0]].items():
        assert torch.equal(value, alone.state[parameters[1]][key]), key
