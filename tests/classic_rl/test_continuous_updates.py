"""One update of each agent against plain autograd on torch's own layers, written independently, and against
Stable-Baselines3 on the same weights, batch and noise."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.testing import assert_close

from classic_rl.ddpg import DDPGConfig
from classic_rl.discrete_sac import DiscreteSACConfig, soft_values
from classic_rl.sac import SACConfig
from classic_rl.td3 import TD3Config

RATES = {"learning_rate": 1e-3, "critic_learning_rate": 2e-3, "target_rate": 0.1}


class Layers(nn.Module):
    """The members of one of our stacks as separate networks of nn.Linear."""

    def __init__(self, stack):
        super().__init__()
        self.members = nn.ModuleList()
        for member in range(stack.members):
            layers = []
            for weight, bias in zip(stack.weights, stack.biases, strict=True):
                linear = nn.Linear(weight.shape[1], weight.shape[2])
                linear.weight.data = weight[member].detach().t().clone()
                linear.bias.data = bias[member, 0].detach().clone()
                layers += [linear, nn.ReLU()]
            self.members.append(nn.Sequential(*layers[:-1]))

    def forward(self, *parts):
        return [member(torch.cat(parts, dim=-1)) for member in self.members]


def assert_equal_networks(stack, layers):
    """Equal gradients of the last step, and equal weights after it.

    Adam's step hides the gradient's size and enlarges rounding where it is nearly 0: hence the gradients, to six
    digits, and a tolerance of a tenth of a step for the weights.
    """
    assert_close(list(Layers(stack).parameters()), list(layers.parameters()), rtol=1e-4, atol=1e-4)
    for member, network in enumerate(layers.members):
        linears = [layer for layer in network if isinstance(layer, nn.Linear)]
        for weight, bias, linear in zip(stack.weights, stack.biases, linears, strict=True):
            if linear.weight.grad is not None:
                assert_close(weight.grad[member].t(), linear.weight.grad, rtol=1e-4, atol=1e-6)
                assert_close(bias.grad[member, 0], linear.bias.grad, rtol=1e-4, atol=1e-6)


def batch_of(agent):
    """The batch that the next update draws."""
    state = agent.replay.state_dict()["generator"]
    state = copy.deepcopy(state)
    batch = agent.replay.sample(agent.config.batch_size)
    agent.replay._generator.bit_generator.state = state
    return batch


def noise_of(agent, *shape):
    """The noise that the next update draws."""
    generator = torch.Generator()
    generator.set_state(agent.noise_generator.get_state())
    return torch.randn(*shape, generator=generator)


def polyak(target, online, rate):
    for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
        slow.data = (1 - rate) * slow.data + rate * fast.data


def prepared(continuous, config, identifier="Pendulum-v1"):
    agent, *_ = continuous.agent_for(config, identifier)
    continuous.fill(agent)
    return agent, batch_of(agent)


@pytest.mark.parametrize("temperature", [{"type": "automatic", "initial": 0.7}, {"type": "fixed", "value": 0.3}])
@pytest.mark.parametrize("n_step", [1, 3])
def test_sac(continuous, temperature, n_step):
    config = SACConfig(**continuous.SMALL, **RATES, temperature=temperature, n_step=n_step)
    agent, batch = prepared(continuous, config)
    actor, critics = Layers(agent.actor.network.trunk), Layers(agent.critics.network)
    targets = copy.deepcopy(critics)
    noise, next_noise = noise_of(agent, 2, 32, 1)
    log_alpha = torch.tensor([math.log(temperature.get("initial", temperature.get("value")))], requires_grad=True)
    alpha = log_alpha.exp().item()

    def draw(observations, noise):
        mean, log_std = actor(observations)[0].chunk(2, dim=-1)
        normal = Normal(mean, log_std.clamp(-20, 2).exp())
        u = normal.loc + normal.scale * noise
        return torch.tanh(u), (normal.log_prob(u) - torch.log(1 - torch.tanh(u) ** 2)).sum(-1)

    with torch.no_grad():
        next_actions, next_log_probs = draw(batch.next_observations, next_noise)
        following = torch.minimum(*targets(batch.next_observations, next_actions))[:, 0]
        y = batch.rewards + batch.discounts * (following - alpha * next_log_probs)
    optimizer = torch.optim.Adam(critics.parameters(), lr=2e-3)
    loss = sum(0.5 * nn.functional.mse_loss(q[:, 0], y) for q in critics(batch.observations, batch.actions))
    loss.backward()
    optimizer.step()
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    actions, log_probs = draw(batch.observations, noise)
    worth = torch.minimum(*critics(batch.observations, actions))[:, 0]
    actor_loss = (alpha * log_probs - worth).mean()
    actor_loss.backward(inputs=list(actor.parameters()))
    actor_optimizer.step()
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=2e-3)
    (-log_alpha * (log_probs.detach() - 1)).mean().backward()  # target entropy -1: one action component
    alpha_optimizer.step()
    polyak(targets, critics, 0.1)

    metrics = agent.update(env_steps=100)
    assert_equal_networks(agent.actor.network.trunk, actor)
    assert_equal_networks(agent.critics.network, critics)
    assert_equal_networks(agent.targets.network, targets)
    assert metrics["critic_loss"].item() == pytest.approx(loss.item() / 2, rel=1e-4)  # a mean over both critics
    assert metrics["actor_loss"].item() == pytest.approx(actor_loss.item(), rel=1e-4)
    expected = log_alpha if temperature["type"] == "automatic" else torch.tensor([math.log(0.3)])
    assert_close(agent.temperature.log_alpha.detach(), expected.detach())


def test_the_temperatures_gradient(continuous):
    agent, _ = prepared(continuous, SACConfig(**continuous.SMALL, temperature={"type": "automatic", "initial": 2.0}))
    log_probs = torch.tensor([0.5, 1.5, -0.2])
    agent.temperature.descend(log_probs.mean(), learning_rate=0.0)
    log_alpha = torch.tensor(2.0).log().requires_grad_()
    (-(log_alpha * (log_probs - 1.0)).mean()).backward()
    assert_close(agent.temperature.log_alpha.grad[0], log_alpha.grad)
    # Mean log pi is .6, so the entropy is -.6 where -1 was asked for: too random, and alpha falls.
    assert agent.temperature.log_alpha.grad.item() == pytest.approx(1.0 - 0.6)


def test_td3(continuous):
    config = TD3Config(**continuous.SMALL, **RATES, target_noise=0.4, target_noise_clip=0.3)
    agent, _ = prepared(continuous, config)
    actor, critics = Layers(agent.actor.network.trunk), Layers(agent.critics.network)
    target_actor, targets = copy.deepcopy(actor), copy.deepcopy(critics)
    optimizer = torch.optim.Adam(critics.parameters(), lr=2e-3)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    for update in (1, 2, 3, 4):
        batch, noise = batch_of(agent), noise_of(agent, 32, 1)
        assert ((0.4 * noise).abs() > 0.3).any()
        with torch.no_grad():
            moved = torch.tanh(target_actor(batch.next_observations)[0]) + torch.clip(0.4 * noise, -0.3, 0.3)
            following = torch.minimum(*targets(batch.next_observations, torch.clip(moved, -1, 1)))[:, 0]
            y = batch.rewards + batch.discounts * following
        optimizer.zero_grad()
        sum(nn.functional.mse_loss(q[:, 0], y) for q in critics(batch.observations, batch.actions)).backward()
        optimizer.step()
        if update % 2 == 0:
            actor_optimizer.zero_grad()
            actions = torch.tanh(actor(batch.observations)[0])
            worth = critics(batch.observations, actions)[0].mean()
            (-worth).backward(inputs=list(actor.parameters()))
            actor_optimizer.step()
            polyak(target_actor, actor, 0.1)
            polyak(targets, critics, 0.1)
        agent.update(env_steps=100)
        for flat, layers in (
            (agent.actor, actor),
            (agent.critics, critics),
            (agent.target_actor, target_actor),
            (agent.target_critics, targets),
        ):
            network = flat.network
            assert_equal_networks(getattr(network, "trunk", network), layers)


def test_ddpg(continuous):
    agent, batch = prepared(continuous, DDPGConfig(**continuous.SMALL, **RATES))
    actor, critics = Layers(agent.actor.network.trunk), Layers(agent.critics.network)
    target_actor, targets = copy.deepcopy(actor), copy.deepcopy(critics)
    with torch.no_grad():
        next_actions = torch.tanh(target_actor(batch.next_observations)[0])
        y = batch.rewards + batch.discounts * targets(batch.next_observations, next_actions)[0][:, 0]
    optimizer = torch.optim.Adam(critics.parameters(), lr=2e-3)
    nn.functional.mse_loss(critics(batch.observations, batch.actions)[0][:, 0], y).backward()
    optimizer.step()
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    # grad_theta mu(s) grad_a Q(s, a) at a = mu(s), in two steps: no logarithm anywhere.
    actions = torch.tanh(actor(batch.observations)[0])
    held = actions.detach().requires_grad_()
    of_actions = torch.autograd.grad(critics(batch.observations, held)[0].mean(), held)[0]
    actions.backward(-of_actions)
    actor_optimizer.step()
    polyak(target_actor, actor, 0.1)
    polyak(targets, critics, 0.1)
    agent.update(env_steps=100)
    assert_equal_networks(agent.actor.network.trunk, actor)
    assert_equal_networks(agent.critics.network, critics)
    assert_equal_networks(agent.target_actor.network.trunk, target_actor)
    assert_equal_networks(agent.target_critics.network, targets)


def test_discrete_sac(continuous):
    config = DiscreteSACConfig(**continuous.SMALL, **RATES, temperature={"type": "automatic", "initial": 0.4})
    agent, batch = prepared(continuous, config, "CartPole-v1")
    actor, critics = Layers(agent.actor.network), Layers(agent.critics.network)
    targets = copy.deepcopy(critics)
    log_alpha = torch.tensor([math.log(0.4)], requires_grad=True)
    y = []
    with torch.no_grad():  # by enumeration of states and actions
        values = torch.minimum(*targets(batch.next_observations))
        probabilities = torch.softmax(actor(batch.next_observations)[0], dim=-1)
        for row in range(32):
            value = 0.0
            for action in range(2):
                p = probabilities[row, action].item()
                value += p * (values[row, action].item() - 0.4 * math.log(p))
            y.append(batch.rewards[row].item() + batch.discounts[row].item() * value)
    y = torch.tensor(y)
    optimizer = torch.optim.Adam(critics.parameters(), lr=2e-3)
    chosen = [q[torch.arange(32), batch.actions] for q in critics(batch.observations)]
    sum(0.5 * nn.functional.mse_loss(q, y) for q in chosen).backward()
    optimizer.step()
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)
    distribution = torch.distributions.Categorical(logits=actor(batch.observations)[0])
    worth = torch.minimum(*critics(batch.observations)).detach()
    (-(distribution.probs * worth).sum(-1) - 0.4 * distribution.entropy()).mean().backward()
    actor_optimizer.step()
    # Half of log 2 is asked for.
    entropy = distribution.entropy().mean().detach()
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=2e-3)
    (log_alpha * (entropy - 0.5 * math.log(2))).backward()
    alpha_optimizer.step()
    polyak(targets, critics, 0.1)
    agent.update(env_steps=100)
    assert_equal_networks(agent.actor.network, actor)
    assert_equal_networks(agent.critics.network, critics)
    assert_equal_networks(agent.targets.network, targets)
    assert_close(agent.temperature.log_alpha.detach(), log_alpha.detach())


def test_soft_values_by_hand():
    # 1/4 (1 + 2 log 4) + 3/4 (3 - 2 log 3/4), alpha 2
    expected = 0.25 * (1 + 2 * math.log(4)) + 0.75 * (3 - 2 * math.log(0.75))
    values = soft_values(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[1.0, 3.0]]), torch.tensor(2.0))
    assert values.item() == pytest.approx(expected)


def test_gsde_updates_its_matrix_through_both_losses(continuous):
    agent, _ = prepared(continuous, continuous.CONFIGS["sac_gsde"])
    before = agent.actor.network.log_std.detach().clone()
    agent.update(env_steps=100)
    assert not torch.equal(agent.actor.network.log_std, before)


# --- Stable-Baselines3 ------------------------------------------------------------------------------------------------


def copy_into(layers, module):
    """Put our weights into one of Stable-Baselines3's networks, layer by layer."""
    own = [part for part in layers if isinstance(part, nn.Linear)]
    theirs = [part for part in module if isinstance(part, nn.Linear)]
    for mine, other in zip(own, theirs, strict=True):
        other.load_state_dict(mine.state_dict())


def stable_baselines(name, agent, monkeypatch, **settings):
    """Its agent with our weights and our batch."""
    library = pytest.importorskip("stable_baselines3")
    model = getattr(library, name)(
        "MlpPolicy",
        "Pendulum-v1",
        learning_rate=1e-3,
        batch_size=32,
        tau=0.1,
        policy_kwargs={"net_arch": [16, 16]},
        device="cpu",
        **settings,
    )
    model._setup_learn(100)
    batch = batch_of(agent)
    column = torch.Tensor.unsqueeze
    # Ours has the discount with the end in it; theirs multiplies (1 - done) and gamma.
    replayed = library.common.type_aliases.ReplayBufferSamples(
        batch.observations,
        batch.actions,
        batch.next_observations,
        (batch.discounts == 0).float().unsqueeze(1),
        column(batch.rewards, 1),
        None,
    )
    monkeypatch.setattr(model.replay_buffer, "sample", lambda *_, **__: replayed)
    return model


def critic_members(model):
    return [model.critic.qf0, model.critic.qf1]


def assert_same_parameters(stack, modules, *, tolerance):
    for member, module in zip(Layers(stack).members, modules, strict=True):
        ours, theirs = list(member.parameters()), list(module.parameters())
        assert_close(ours, theirs, rtol=1e-3, atol=tolerance)


def test_sac_is_stable_baselines3s(continuous, monkeypatch):
    config = SACConfig(**continuous.SMALL, learning_rate=1e-3, target_rate=0.1)
    agent, _ = prepared(continuous, config)
    model = stable_baselines("SAC", agent, monkeypatch)
    (actor,) = Layers(agent.actor.network.trunk).members
    copy_into(list(actor)[:-1], model.actor.latent_pi)
    for head, rows in ((model.actor.mu, slice(0, 1)), (model.actor.log_std, slice(1, 2))):
        head.weight.data, head.bias.data = actor[-1].weight.data[rows].clone(), actor[-1].bias.data[rows].clone()
    for members in (critic_members(model), [model.critic_target.qf0, model.critic_target.qf1]):
        for own, theirs in zip(Layers(agent.critics.network).members, members, strict=True):
            copy_into(own, theirs)
    noise = list(noise_of(agent, 2, 32, 1))  # theirs draws for s first, too
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda *_, **__: noise.pop(0))
    model.train(1, batch_size=32)
    assert not noise
    agent.update(env_steps=0)
    assert_same_parameters(agent.critics.network, critic_members(model), tolerance=2e-5)
    assert_same_parameters(agent.targets.network, [model.critic_target.qf0, model.critic_target.qf1], tolerance=2e-5)
    (actor,) = Layers(agent.actor.network.trunk).members
    assert_close(actor[0].weight.data, model.actor.latent_pi[0].weight.data, rtol=1e-3, atol=2e-5)
    assert_close(actor[-1].weight.data[:1], model.actor.mu.weight.data, rtol=1e-3, atol=2e-5)
    assert_close(actor[-1].weight.data[1:], model.actor.log_std.weight.data, rtol=1e-3, atol=2e-5)
    assert_close(agent.temperature.log_alpha.data, model.log_ent_coef.data)


def test_td3_is_stable_baselines3s(continuous, monkeypatch):
    agent, _ = prepared(continuous, TD3Config(**continuous.SMALL, learning_rate=1e-3, target_rate=0.1, policy_delay=1))
    model = stable_baselines("TD3", agent, monkeypatch, policy_delay=1)
    (actor,) = Layers(agent.actor.network.trunk).members
    for theirs in (model.actor.mu, model.actor_target.mu):
        copy_into(actor, theirs)
    for members in (critic_members(model), [model.critic_target.qf0, model.critic_target.qf1]):
        for own, theirs in zip(Layers(agent.critics.network).members, members, strict=True):
            copy_into(own, theirs)
    noise = noise_of(agent, 32, 1)
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, _, std: self.copy_(std * noise))
    model.train(1, batch_size=32)
    monkeypatch.undo()
    agent.update(env_steps=0)
    assert_same_parameters(agent.critics.network, critic_members(model), tolerance=2e-5)
    assert_same_parameters(
        agent.target_critics.network, [model.critic_target.qf0, model.critic_target.qf1], tolerance=2e-5
    )
    assert_same_parameters(agent.actor.network.trunk, [model.actor.mu], tolerance=2e-5)
    assert_same_parameters(agent.target_actor.network.trunk, [model.actor_target.mu], tolerance=2e-5)


def test_learning_rates_fall_with_the_run(continuous):
    config = SACConfig(**continuous.SMALL, learning_rate=1e-3, learning_rate_schedule="linear")
    agent, _ = prepared(continuous, config)
    before = continuous.weights(agent)
    agent.update(env_steps=1000)  # the schedule's last step: rate 0
    after = continuous.weights(agent)
    assert all(torch.equal(before[name], after[name]) for name in before)
    agent.update(env_steps=500)
    # Adam's first effective step is at most the rate, here 5e-4 (times a little for its second moment's bias).
    moved = (continuous.weights(agent)["critics.weights.0"] - after["critics.weights.0"]).abs().max().item()
    assert 1e-4 < moved < 1e-3
