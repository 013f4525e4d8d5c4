"""Judging a policy, and keeping it in a folder."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from classic_rl.collector import CollectSteps
from classic_rl.environments import EnvironmentConfig
from classic_rl.evaluation import EvaluationConfig, evaluate
from classic_rl.policy import ActorCritic
from classic_rl.saving import load, save
from rlhf.errors import ConfigError, ModelError


def test_evaluation_counts_whole_episodes():
    policy = ActorCritic(spaces.Box(-np.inf, np.inf, (1,)), spaces.Discrete(2), seed=0)
    results = evaluate(
        policy, EnvironmentConfig(id="Countdown-v0", kwargs={"length": 7}), EvaluationConfig(episodes=3, max_steps=99)
    )
    assert results == {
        "return_mean": 7.0, "return_std": 0.0, "return_min": 7.0, "return_max": 7.0, "length_mean": 7.0,
    }  # fmt: skip


def test_evaluation_repeats_itself_and_changes_nothing(make):
    policy, collector = make("Pendulum-v1", "ppo", CollectSteps(steps=50), normalize_observations=True)
    collector.collect()
    environment, normalizer = EnvironmentConfig(id="Pendulum-v1"), collector.observation_normalizer
    count = normalizer.count
    first, second = (evaluate(policy, environment, EvaluationConfig(episodes=3), normalizer=normalizer) for _ in "ab")
    assert first == second
    assert normalizer.count == count


def test_a_greedy_policy_is_judged_as_by_hand():
    policy = ActorCritic(spaces.Box(-4, 4, (4,)), spaces.Discrete(2), seed=3)
    results = evaluate(policy, EnvironmentConfig(id="CartPole-v1", vectorization="sync"), EvaluationConfig(episodes=4))
    returns = []
    for seed in range(1_000_000, 1_000_004):
        environment = gymnasium.make("CartPole-v1")
        observation, _ = environment.reset(seed=seed)
        total, over = 0.0, False
        while not over:
            action = policy.actor(torch.from_numpy(observation)).argmax().item()
            observation, reward, terminated, truncated, _ = environment.step(action)
            total, over = total + reward, terminated or truncated
        returns.append(total)
    assert results["return_mean"] == np.mean(returns)
    assert results["return_min"] == min(returns)
    assert results["return_std"] == pytest.approx(np.std(returns))


def test_episodes_that_never_end_need_a_limit():
    policy = ActorCritic(spaces.Box(-1, 1, (1,)), spaces.Discrete(2), seed=0)
    environment = EnvironmentConfig(id="Forever-v0")
    with pytest.raises(ConfigError, match=r"evaluation\.max_steps"):
        evaluate(policy, environment)
    assert evaluate(policy, environment, EvaluationConfig(max_steps=5, episodes=2))["return_mean"] == 5


@pytest.mark.parametrize("identifier", ["CartPole-v1", "Pendulum-v1"])
def test_a_saved_policy_acts_alike(make, tmp_path, identifier):
    policy, collector = make(identifier, "ppo", CollectSteps(steps=64), normalize_observations=True)
    collector.collect()
    save(tmp_path / "policy", policy, normalizer=collector.observation_normalizer)
    trained = load(tmp_path / "policy")
    environment = gymnasium.make(identifier)
    observation, _ = environment.reset(seed=0)
    action = trained.predict(observation)
    assert environment.action_space.contains(action)
    flat = torch.from_numpy(collector.observation_normalizer(observation[None]))
    expected = policy.distribution.to_environment(policy.distribution.greedy(policy.actor(flat).detach().numpy()))[0]
    np.testing.assert_allclose(action, expected, rtol=1e-5)
    drawn = {np.asarray(trained.predict(observation, deterministic=False)).item() for _ in range(50)}
    assert len(drawn) > 1


def test_a_folder_that_is_no_policy_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no policy.json"):
        load(tmp_path)
    policy = ActorCritic(spaces.Box(-1, 1, (1,)), spaces.Discrete(2), seed=0)
    save(tmp_path, policy)
    (tmp_path / "policy.json").write_text("{}")
    with pytest.raises(ModelError, match="not a saved policy"):
        load(tmp_path)
