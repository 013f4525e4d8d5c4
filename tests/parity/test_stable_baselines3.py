"""Stable-Baselines3's rollout buffer, PPO step and DQN updates against ours."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from classic_rl.agents import make_agent
from classic_rl.dqn_config import DQNConfig
from classic_rl.environments import EnvironmentConfig
from classic_rl.off_policy import OffPolicySchedule
from classic_rl.replay import Transitions
from rlhf.core.advantages import carry_values, gae
from rlhf.core.algorithm import AlgorithmConfig, Clipped, Gae, SquaredValueLoss
from rlhf.core.masking import standardize
from rlhf.core.objective import Objective
from rlhf.core.types import Experience, PolicyOutput

pytest.importorskip("stable_baselines3")
import gymnasium as gym
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import RolloutBuffer

STEPS, ENVS = 64, 3


@pytest.mark.parametrize(("discount", "gae_lambda"), [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0), (0.98, 0.8)])
def test_gae_with_episode_starts_and_terminations(discount, gae_lambda):
    """SB3 has no truncation in its buffer: its collector adds discount * V(s') to the reward and calls it an end.

    We keep the reward and give V(s') as next value; both must come to the same advantages and returns.
    """
    generator = np.random.default_rng(0)
    rewards, values, tails = generator.normal(size=(3, STEPS, ENVS)).astype(np.float32)
    ends = generator.random((STEPS, ENVS)) < 0.15
    truncated = ends & (generator.random((STEPS, ENVS)) < 0.5)
    ends[-1, 0], truncated[-1, 0] = True, False
    last_values = torch.tensor(generator.normal(size=ENVS).astype(np.float32))

    buffer = RolloutBuffer(
        STEPS, gym.spaces.Box(-1, 1, (1,)), gym.spaces.Discrete(2), gae_lambda=gae_lambda, gamma=discount, n_envs=ENVS
    )
    starts = np.vstack([np.ones((1, ENVS)), ends[:-1]]).astype(np.float32)
    for t in range(STEPS):
        buffer.add(
            np.zeros((ENVS, 1)),
            np.zeros((ENVS, 1)),
            rewards[t] + discount * tails[t] * truncated[t],
            starts[t],
            torch.tensor(values[t]),
            torch.zeros(ENVS),
        )
    buffer.compute_returns_and_advantage(last_values=last_values, dones=ends[-1].astype(np.float32))

    rows = {"r": rewards, "v": values, "tail": tails, "end": ends, "cut": truncated}
    rows = {name: torch.tensor(np.ascontiguousarray(array.T)) for name, array in rows.items()}
    mask = torch.ones(ENVS, STEPS, dtype=torch.bool)
    next_values = carry_values(rows["v"], mask, episode_ends=rows["end"], bootstrap=last_values)
    advantages, returns = gae(
        rows["r"],
        rows["v"],
        next_values=torch.where(rows["cut"], rows["tail"], next_values),
        episode_ends=rows["end"],
        mask=mask,
        discount=discount,
        gae_lambda=gae_lambda,
    )
    assert torch.allclose(advantages, torch.tensor(buffer.advantages.T), atol=1e-5)
    assert torch.allclose(returns, torch.tensor(buffer.returns.T), atol=1e-5)


@pytest.mark.parametrize("vf_coef", [0.5, 0.25])
def test_one_step_of_ppo(vf_coef):
    """`PPO.train` takes one SGD step with rate 1 on the whole buffer; the step is minus our gradient.

    SB3's value loss is (V - R)^2 and ours 1/2 (V - R)^2, so our coefficient is twice its vf_coef.
    """
    ppo = PPO(
        "MlpPolicy",
        gym.make("CartPole-v1"),
        n_steps=32,
        batch_size=32,
        n_epochs=1,
        clip_range=0.2,
        clip_range_vf=None,
        normalize_advantage=False,
        ent_coef=0.01,
        vf_coef=vf_coef,
        max_grad_norm=1e9,
        learning_rate=1.0,
        policy_kwargs={"optimizer_class": torch.optim.SGD, "net_arch": [16]},
        seed=0,
        device="cpu",
    )
    ppo.learn(32)
    generator = torch.Generator().manual_seed(0)
    buffer = ppo.rollout_buffer
    buffer.reset()
    for _ in range(32):
        observation = torch.randn(1, 4, generator=generator)
        action = torch.randint(0, 2, (1,), generator=generator)
        with torch.no_grad():
            value, log_prob, _ = ppo.policy.evaluate_actions(observation, action)
        moved = log_prob + 0.3 * torch.randn(1, generator=generator)
        buffer.add(observation.numpy(), action.numpy(), np.ones(1), np.zeros(1), value, moved)
    buffer.compute_returns_and_advantage(torch.zeros(1), np.ones(1))
    data = next(buffer.get(None))
    policy = copy.deepcopy(ppo.policy)
    before = [parameter.detach().clone() for parameter in ppo.policy.parameters()]
    ppo.train()
    steps = [new.detach() - old for new, old in zip(ppo.policy.parameters(), before, strict=True)]

    algorithm = AlgorithmConfig(
        advantages=Gae(),
        surrogate=Clipped(clip_low=0.2, clip_high=0.2),
        value_loss=SquaredValueLoss(coefficient=2 * vf_coef),
        entropy_coef=0.01,
    )
    values, log_probs, entropy = policy.evaluate_actions(data.observations, data.actions.long().flatten())

    def column(tensor):
        return tensor.reshape(-1, 1)

    experience = Experience(
        inputs={},
        actions=column(data.actions),
        action_mask=torch.ones(32, 1, dtype=torch.bool),
        old_log_probs=column(data.old_log_prob),
        advantages=column(data.advantages),
        returns=column(data.returns),
        old_values=column(data.old_values),
    )
    objective = Objective(algorithm)
    sums = objective(PolicyOutput(column(log_probs), column(entropy), column(values)), experience)
    objective.loss(sums, objective.denominators(experience.action_mask)).backward()
    clipped = sums.metrics[objective.metric_names.index("clip_fraction")].item()
    assert 0 < clipped < 32
    for parameter, step in zip(policy.parameters(), steps, strict=True):
        gradient = torch.zeros_like(step) if parameter.grad is None else parameter.grad
        assert torch.allclose(-gradient, step, atol=2e-5)


def test_standardization_divides_by_the_population_deviation_sb3_by_the_samples():
    """SB3: (A - mean) / (std_{n-1} + 1e-8). Ours: / sqrt(var_n + 1e-8). They differ by sqrt(n / (n - 1))."""
    advantages = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    sb3 = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ours = standardize(advantages, torch.ones(4, dtype=torch.bool))
    assert torch.allclose(ours, sb3 * (4 / 3) ** 0.5)


def test_fifty_updates_of_dqn():
    """The same weights and batches, fresh Adams: Huber loss, bootstrap from the target network, clipped gradient."""
    sizes, rate, batch_size = [32, 16], 1e-3, 16
    theirs = DQN(
        "MlpPolicy", "CartPole-v1", learning_rate=rate, batch_size=batch_size, learning_starts=0, max_grad_norm=0.5,
        policy_kwargs={"net_arch": sizes, "activation_fn": nn.ReLU}, seed=0, device="cpu",
    )  # fmt: skip
    theirs.learn(total_timesteps=300)
    with torch.no_grad():  # two networks that differ, as between two synchronizations
        for parameter in theirs.q_net_target.parameters():
            parameter.mul_(0.5)
    config = DQNConfig(
        batch_size=batch_size,
        network={"hidden_sizes": sizes},
        optimizer={"learning_rate": rate, "max_grad_norm": 0.5},
        target={"type": "hard", "every_steps": 10_000},
    )
    schedule = OffPolicySchedule(total_steps=1000, start_steps=0)
    agent = make_agent(config, environment=EnvironmentConfig(id="CartPole-v1"), schedule=schedule, seed=1)
    for own, other in ((agent.online, theirs.q_net), (agent.target, theirs.q_net_target)):
        own.vector.copy_(torch.cat([parameter.detach().flatten() for parameter in other.parameters()]))
    theirs.policy.optimizer = torch.optim.Adam(theirs.q_net.parameters(), lr=rate)
    for step in range(50):
        np.random.seed(step)  # their buffer draws from NumPy's global generator
        data = theirs.replay_buffer.sample(batch_size)
        np.random.seed(step)
        theirs.train(gradient_steps=1, batch_size=batch_size)
        batch = Transitions(
            observations=data.observations,
            actions=data.actions[:, 0],
            rewards=data.rewards[:, 0],
            next_observations=data.next_observations,
            discounts=0.99 * (1 - data.dones[:, 0]),
            weights=None,
            indices=np.arange(batch_size),
        )
        agent.replay.sample = lambda _, batch=batch: batch
        agent.update(env_steps=step)
    expected = torch.cat([parameter.detach().flatten() for parameter in theirs.q_net.parameters()])
    torch.testing.assert_close(agent.online.vector.detach(), expected, atol=2e-5, rtol=1e-4)
