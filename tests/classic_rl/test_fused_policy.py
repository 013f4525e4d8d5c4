"""The fused actor-critic against torch's own layers and autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from gymnasium import spaces
from torch.testing import assert_close

from classic_rl import networks
from classic_rl.networks import NetworkConfig
from classic_rl.policy import ActorCritic
from rlhf.core.presets import ALGORITHMS
from rlhf.core.types import Experience
from rlhf.training.learner import Learner
from rlhf.training.optimizer import FlatParameters
from rlhf.training.update_config import UpdateConfig

BOX = spaces.Box(-1.0, 1.0, (3,))
ACTIONS = {"discrete": spaces.Discrete(4), "box": spaces.Box(-1.0, 1.0, (2,))}


def pair(
    actions: str, *, critic: bool = True, activation: str = "tanh"
) -> tuple[ActorCritic, ActorCritic, FlatParameters]:
    """A fused policy, one of equal weights on torch's own path, and the fused one's flat parameters."""
    policies = [
        ActorCritic(
            BOX,
            ACTIONS[actions],
            network=NetworkConfig(hidden_sizes=[16, 8], activation=activation, kernel=kernel),
            critic=critic,
            seed=3,
        )
        for kernel in ("auto", "torch")
    ]
    for policy in policies:
        with torch.no_grad():
            for parameter in policy.parameters():  # the initial output layer is too small to show anything
                parameter.add_(torch.linspace(-0.4, 0.4, parameter.numel()).view(parameter.shape))
    flat = FlatParameters(list(policies[0].named_parameters()))
    policies[0].attach_flat(flat)
    return policies[0], policies[1], flat


def batch(actions: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(5, 2, 3, generator=generator)
    if actions == "discrete":
        return {"observations": observations}, torch.randint(4, (5, 2), generator=generator)
    return {"observations": observations}, torch.randn(5, 2, 2, generator=generator)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("entropy", [0.0, 0.3])
@pytest.mark.parametrize("critic", [True, False])
@pytest.mark.parametrize("actions", ["discrete", "box"])
def test_outputs_and_gradients_are_those_of_autograd(actions, critic, entropy, activation):
    fused, plain, _ = pair(actions, critic=critic, activation=activation)
    assert fused.fused is not None
    inputs, taken = batch(actions)
    weights = torch.linspace(-1, 1, 10).view(5, 2)
    for policy in (fused, plain):
        output = policy(inputs, taken)
        loss = (weights * output.log_probs).sum() + entropy * output.entropy.square().sum()
        if critic:
            loss = loss + (output.values - weights).square().sum()
        loss.backward()
    assert_close(fused(inputs, taken)[:2], plain(inputs, taken)[:2], rtol=1e-5, atol=1e-6)
    for (name, own), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert_close(own.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_add_up_over_backward_passes_as_autograd_s_do():
    fused, _, flat = pair("discrete")
    inputs, taken = batch("discrete")
    fused(inputs, taken).log_probs.sum().backward()
    once = flat.gradient.clone()
    assert once.abs().sum() > 0
    fused(inputs, taken).log_probs.sum().backward()
    assert_close(flat.gradient, 2 * once)


def test_an_optimizer_s_step_is_seen_at_once():
    fused, _, flat = pair("discrete")
    inputs, taken = batch("discrete")
    before = fused(inputs, taken).log_probs
    with torch.no_grad():
        flat.parameter.mul_(0.5)
    assert not torch.allclose(before, fused(inputs, taken).log_probs)


def test_a_copy_and_a_policy_that_moved_take_the_ordinary_path():
    fused, _, _ = pair("discrete")
    inputs, taken = batch("discrete")
    twin = copy.deepcopy(fused)
    assert twin.fused is None
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert_close(twin(inputs, taken).log_probs, torch.full((5, 2), 0.25).log())
    moved = fused.double()
    assert moved({"observations": inputs["observations"].double()}, taken).values.dtype == torch.float64


def test_masks_of_valid_actions_are_respected():
    fused, plain, _ = pair("discrete")
    inputs, taken = batch("discrete")
    masks = torch.ones(5, 2, 4, dtype=torch.bool)
    masks[..., 1] = False
    taken = taken.masked_fill(taken == 1, 0)
    own, theirs = (policy({**inputs, "action_masks": masks}, taken) for policy in (fused, plain))
    assert_close(own.log_probs, theirs.log_probs)
    assert not torch.allclose(own.log_probs, fused(inputs, taken).log_probs)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_large_layers_through_the_other_library_give_the_same(activation, monkeypatch):
    monkeypatch.setattr(networks, "onednn_pays", lambda: True)
    network = networks.MLP([5, 160, 160, 2], activation=activation)
    x, results = torch.randn(130, 5), []
    for limit in (0, 2**40):  # every product, and none
        monkeypatch.setattr(networks, "MIN_PRODUCTS", limit)
        network.zero_grad()
        output = network(x)
        output.square().sum().backward()
        results.append([output, *(parameter.grad.clone() for parameter in network.parameters())])
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("actions", ["discrete", "box"])
def test_by_hand_gives_what_autograd_leaves(actions):
    fused, _, flat = pair(actions)
    inputs, taken = batch(actions)
    slopes = [torch.linspace(-1, 1, 10).view(5, 2), torch.full((5, 2), 0.3), torch.linspace(2, 0, 10).view(5, 2)]
    expected = fused(inputs, taken)
    torch.autograd.backward(list(expected), slopes)
    found = fused.by_hand(inputs, taken)
    assert found is not None
    output, backward = found
    assert not any(tensor.requires_grad for tensor in output)
    for own, theirs in zip(output, expected, strict=True):
        assert torch.equal(own, theirs)
    assert torch.equal(backward(slopes), flat.gradient)
    assert torch.equal(backward([None, None, None]), torch.zeros_like(flat.gradient))


def test_by_hand_is_left_to_autograd_where_it_does_not_fit():
    fused, plain, _ = pair("discrete")
    inputs, taken = batch("discrete")
    assert plain.by_hand(inputs, taken) is None
    assert fused.by_hand({**inputs, "action_masks": torch.ones(5, 2, 4, dtype=torch.bool)}, taken) is None
    assert copy.deepcopy(fused).by_hand(inputs, taken) is None


class Counting(ActorCritic):
    """Counts what goes by hand."""

    by_hand_calls = 0

    def by_hand(self, inputs, actions):
        self.by_hand_calls += 1
        return super().by_hand(inputs, actions)


class ByAutograd(ActorCritic):
    """Leaves everything to autograd."""

    def by_hand(self, inputs, actions):
        return None


@pytest.mark.parametrize("preset", ["ppo", "a2c"])
def test_a_learner_moves_the_weights_alike_by_hand_and_by_autograd(preset):
    results = []
    for kind in (Counting, ByAutograd):
        policy = kind(BOX, ACTIONS["discrete"], network=NetworkConfig(hidden_sizes=[16, 8]), seed=3)
        update = UpdateConfig(flatten_parameters=True, shuffle="actions", learning_rate=1e-2)
        learner = Learner(policy, ALGORITHMS[preset], update, seed=0)
        metrics = [learner.update(experience(policy)) for _ in range(2)]
        results.append((metrics, [parameter.detach().clone() for parameter in policy.parameters()]))
        if isinstance(policy, Counting):  # all but the minibatch that was recorded
            assert policy.by_hand_calls == 2 * ALGORITHMS[preset].epochs * ALGORITHMS[preset].minibatches - 1
    assert results[0][0] == results[1][0]
    for own, theirs in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(own, theirs)


def experience(policy: ActorCritic) -> Experience:
    """A hundred and twenty-eight random actions with random credit."""
    generator = torch.Generator().manual_seed(1)
    observations, actions = torch.randn(4, 32, 3, generator=generator), torch.randint(4, (4, 32), generator=generator)
    with torch.no_grad():
        output = policy({"observations": observations}, actions)
    return Experience(
        inputs={"observations": observations},
        actions=actions,
        action_mask=torch.ones(4, 32, dtype=torch.bool),
        old_log_probs=output.log_probs,
        advantages=torch.randn(4, 32, generator=generator),
        returns=torch.randn(4, 32, generator=generator),
        old_values=output.values,
    )
