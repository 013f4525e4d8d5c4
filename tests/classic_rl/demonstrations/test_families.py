"""Row 60: A2C's family and DDPG's, on-policy and off-policy, where the answer is known.

One step, one state, reward -(a - .5)^2. A2C climbs E[log-prob x advantage], which is the gradient of the return only
for actions drawn from the policy that climbs. DDPG fits Q to whatever actions there are and climbs Q at its own.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces

from classic_rl.ddpg import DDPGConfig
from classic_rl.distributions import DiagonalGaussian
from rlhf.core.objective import Objective
from rlhf.core.presets import ALGORITHMS
from rlhf.core.types import Experience, PolicyOutput

BEST, STD = 0.5, 0.5
DISTRIBUTION = DiagonalGaussian(spaces.Box(-1, 1, (1,), np.float32), initial_log_std=float(np.log(STD)))
OBJECTIVE = Objective(ALGORITHMS["a2c"])


def draw(mean: float, count: int, seed: int) -> torch.Tensor:
    return mean + STD * torch.randn(count, 1, 1, generator=torch.Generator().manual_seed(seed))


def a2c_gradient(mean: float, actions: torch.Tensor, *, baseline: float) -> float:
    """The ascent direction of the policy's mean that A2C's loss gives for actions [N, 1, 1] with V = baseline."""
    rewards = -(actions[..., 0] - BEST).square()
    means = torch.full_like(actions, mean, requires_grad=True)
    log_probs, entropy = DISTRIBUTION.log_probs_and_entropy(means, actions)
    rows = Experience(
        inputs={},
        actions=actions,
        action_mask=torch.ones(len(actions), 1, dtype=torch.bool),
        old_log_probs=log_probs.detach(),
        advantages=rewards - baseline,
        returns=rewards,
        old_values=torch.full_like(rewards, baseline),
    )
    output = PolicyOutput(log_probs, entropy, torch.full_like(rewards, baseline))
    loss = OBJECTIVE.loss(OBJECTIVE(output, rows), OBJECTIVE.denominators(rows.action_mask))
    (gradient,) = torch.autograd.grad(loss, means)
    return -gradient.sum().item()


def test_a2c_s_gradient_is_that_of_the_return_for_its_own_actions_only():
    """J(m) = -(m - c)^2 - s^2, so dJ = -2 (m - c), 1 at m = 0. With actions of N(b, s^2) instead the same loss gives
    E[(a - m) r(a)] / s^2 = -(b - m) ((b - c)^2 + s^2) / s^2 - 2 (b - c): at b = 1, -(1/4 + 1/4) x 4 - 1 = -3.
    """
    assert a2c_gradient(0.0, draw(0.0, 200_000, 0), baseline=0.0) == pytest.approx(1.0, abs=0.02)
    assert a2c_gradient(0.0, draw(1.0, 200_000, 0), baseline=0.0) == pytest.approx(-3.0, abs=0.03)


def test_old_actions_lead_ddpg_to_the_optimum_and_a2c_away_from_it(continuous):
    stored = draw(-0.2, 1000, 1).clamp(-1, 1)
    mean, baseline = -0.2, -(stored - BEST).square().mean().item()
    for _ in range(600):
        mean += 0.05 * a2c_gradient(mean, stored, baseline=baseline)
    assert mean > 3, "beyond the box: what is good about actions that nobody takes any more"

    agent = ddpg_with(stored, continuous)
    observation = np.zeros((1, 3), np.float32)
    for _ in range(600):
        agent.update(env_steps=10)
    assert agent.greedy(observation).item() == pytest.approx(BEST, abs=0.05)


def test_a2c_with_new_actions_each_time_finds_it_too_and_uses_each_once():
    mean = -0.2
    for step in range(600):
        actions = draw(mean, 50, step)
        mean += 0.05 * a2c_gradient(mean, actions, baseline=-(actions - BEST).square().mean().item())
    assert mean == pytest.approx(BEST, abs=0.1)


def ddpg_with(actions: torch.Tensor, continuous):
    """An agent whose replay holds one-step episodes with these actions."""
    config = DDPGConfig(
        network={"hidden_sizes": [32, 32]}, batch_size=64, replay={"capacity": 2000}, critic_learning_rate=3e-3
    )
    agent, *_ = continuous.agent_for(config, "Pendulum-v1")
    zeros = np.zeros((1, 3), np.float32)
    for action in actions[:, 0, 0].tolist():
        agent.replay.add(
            observations=zeros, actions=np.array([[action]], np.float32), rewards=np.array([-((action - BEST) ** 2)]),
            next_observations=zeros, terminated=np.ones(1, bool), truncated=np.zeros(1, bool), mask=np.ones(1, bool),
        )  # fmt: skip
    return agent
