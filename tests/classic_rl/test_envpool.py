"""EnvPool behind gymnasium's vector interface: the same episodes, the same ends."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import TimeLimit
from torch.testing import assert_close

from classic_rl.agents import make_agent
from classic_rl.collector import CollectSteps
from classic_rl.dqn import DQNConfig
from classic_rl.environments import EnvironmentConfig, episode_limit, make_environments, start_with_seeds
from classic_rl.episodes import CollectEpisodes
from classic_rl.evaluation import EvaluationConfig, evaluate
from classic_rl.off_policy import OffPolicySchedule, Player, start
from rlhf.config import validate
from rlhf.core.algorithm import AlgorithmConfig, Gae, PolicyGradient, SquaredValueLoss
from rlhf.core.estimate import estimate
from rlhf.errors import ConfigError
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig

pytest.importorskip("envpool")
pytestmark = pytest.mark.filterwarnings("ignore:.*precision lowered by casting")


def cart_poles(num_envs, limit=8, **settings):
    return EnvironmentConfig(
        id="CartPole-v1",
        num_envs=num_envs,
        vectorization="envpool",
        kwargs={} if limit is None else {"max_episode_steps": limit},
        **settings,
    )


@pytest.mark.parametrize("limit", [8, 10, 500])
def test_episodes_are_gymnasiums(limit):
    # gymnasium's CartPole, put into EnvPool's first states, must go the same way; its TimeLimit(8) ends episodes as
    # EnvPool's do. All 0: the pole falls after 8 to 10 steps, so some fall at a limit of 8 or 10 itself.
    environments = make_environments(cart_poles(16, limit))
    ours, _ = start_with_seeds(environments, range(16))
    theirs = [TimeLimit(CartPoleEnv(), limit) for _ in range(16)]

    def begin(index):
        theirs[index].reset()
        theirs[index].unwrapped.state = ours[index].astype(np.float64)

    for index in range(16):
        begin(index)
    ended = np.zeros(16, dtype=bool)
    both, seen = 0, 0
    for _ in range(30):
        ours, rewards, terminated, truncated, _ = environments.step(np.zeros(16, dtype=np.int64))
        for index in range(16):
            if ended[index]:  # the step after an end only resets
                assert (rewards[index], terminated[index], truncated[index]) == (0, False, False)
                assert np.abs(ours[index]).max() <= 0.05
                begin(index)
                continue
            expected = theirs[index].step(0)
            np.testing.assert_allclose(ours[index], expected[0], atol=1e-4)
            assert (rewards[index], terminated[index], truncated[index]) == expected[1:4]
            both, seen = both + int(expected[2] and expected[3]), seen + int(expected[2] or expected[3])
        ended = terminated | truncated
    assert seen >= 32
    assert (both > 0) == (limit < 500), "EnvPool itself would call these truncated and not terminated"
    environments.close()


def test_seeds_make_episodes():
    environments = make_environments(cart_poles(3))
    first, _ = start_with_seeds(environments, [5, 5, 6])
    assert (first[0] == first[1]).all()
    assert not (first[0] == first[2]).any()
    for _ in range(20):
        after = environments.step(np.ones(3, dtype=np.int64))[0]
    again, _ = start_with_seeds(environments, [5, 5, 6])
    np.testing.assert_array_equal(first, again)
    for _ in range(20):
        repeated = environments.step(np.ones(3, dtype=np.int64))[0]
    np.testing.assert_array_equal(after, repeated)
    derived = [start(environments, seed)[0] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(derived[0], derived[1])
    assert not (derived[0] == derived[2]).any()
    assert not (derived[0][0] == derived[0][1]).any()


def test_what_the_collectors_rely_on(make):
    environments = make_environments(cart_poles(2))
    assert environments.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    assert episode_limit(environments) == 8
    assert environments.render_mode is None
    policy, collector = make(
        "CartPole-v1", "ppo", CollectSteps(steps=20), vectorization="envpool", kwargs={"max_episode_steps": 8}
    )
    policy.actor.layers[-1].bias.data = torch.tensor([0.0, 0.0])
    rollout = collector.collect()
    assert rollout.action_mask[0].tolist() == ([True] * 8 + [False]) * 2 + [True] * 2
    assert rollout.rewards[0].tolist() == ([1.0] * 8 + [0.0]) * 2 + [1.0] * 2
    seen = rollout.inputs["observations"]
    with torch.no_grad():
        values = policy.values(seen)
    # Truncated, so V of the true last observation bootstraps: it stands where the reset step begins.
    assert_close(rollout.next_values[:, 7], values[:, 8])
    assert rollout.episode_ends[:, 7].all()
    assert rollout.metrics["rollout/return_mean"] == 8


def test_an_eight_step_limit_does_not_change_values(make):
    # Drawn actions hardly ever let the pole fall within 8 steps (it takes 8 equal ones), so reward 1 lasts forever and
    # V = 1 / (1 - .98) = 50 where truncation is handled: Stable-Baselines3's test_gae.py, in EnvPool.
    algorithm = AlgorithmConfig(
        advantages=Gae(discount=0.98, gae_lambda=0.98), surrogate=PolicyGradient(), value_loss=SquaredValueLoss()
    )
    settings = {"vectorization": "envpool", "kwargs": {"max_episode_steps": 8}, "num_envs": 2}
    policy, collector = make("CartPole-v1", algorithm, CollectSteps(steps=128), **settings)
    learner = Learner(policy, algorithm, UpdateConfig(learning_rate=1e-2, flatten_parameters=True), seed=0)
    for _ in range(250):
        rollout = collector.collect()
        assert rollout.rewards[rollout.action_mask].eq(1).all()
        learner.update(estimate(rollout, algorithm))
    with torch.no_grad():
        assert abs(policy.values(rollout.inputs["observations"]).mean().item() - 50) < 1


def test_groups_evaluation_and_off_policy_agents(make):
    _, collector = make("CartPole-v1", "grpo", CollectEpisodes(group_size=2), num_envs=4, vectorization="envpool")
    starts = collector.collect().inputs["observations"][:, 0]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    judged = [evaluate(collector.policy, cart_poles(1, None), EvaluationConfig(episodes=3)) for _ in "ab"]
    assert judged[0] == judged[1]
    schedule = OffPolicySchedule(total_steps=60, start_steps=1000)
    agent = make_agent(DQNConfig(), environment=cart_poles(2), schedule=schedule, seed=0)
    player = Player(agent, cart_poles(2), schedule, seed=0)
    metrics = player.play_until(60)
    assert metrics["rollout/length_mean"] == 8
    assert metrics["rollout/env_steps"] in (60, 61)
    assert len(agent.replay) in (60, 61), "reset steps are not stored"


def test_simulators_keep_their_types(make):
    _, collector = make("HalfCheetah-v5", "ppo", CollectSteps(steps=4), vectorization="envpool", num_envs=2)
    observations, rewards, *_ = collector.environments.step(np.zeros((2, 6), dtype=np.float32))
    assert (observations.dtype, rewards.dtype) == (np.float64, np.float32)
    assert collector.collect().inputs["observations"].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"id": "CartPole-v9"}, "EnvPool has no such environment"),
        ({"id": "MiniGrid-Empty-5x5-v0"}, "reward from its limit"),
        ({"id": "CartPole-v1", "kwargs": {"batch_size": 1}}, r"environment\.kwargs.*batch_size"),
        ({"id": "CartPole-v1", "kwargs": {"gravitation": 3}}, "cannot be made.*gravitation"),
    ],
)
def test_what_cannot_be_made_is_told(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_environments(EnvironmentConfig(vectorization="envpool", **settings))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ConfigError, match=r"rlhf-toolkit\[envpool\]"):
        make_environments(cart_poles(1))


def test_randomization_is_refused():
    settings = {"id": "CartPole-v1", "vectorization": "envpool", "randomization": {}}
    with pytest.raises(ConfigError, match="cannot be randomized"):
        validate(EnvironmentConfig, settings)
