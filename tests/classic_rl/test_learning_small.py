"""Collector, estimate and learner together, on environments whose answer is known."""

from __future__ import annotations

import copy

import pytest
import torch

from classic_rl.collector import CollectSteps
from classic_rl.environments import EnvironmentConfig
from classic_rl.episodes import CollectEpisodes
from classic_rl.evaluation import EvaluationConfig, evaluate
from rlhf.core.algorithm import AlgorithmConfig, Gae, PolicyGradient, SquaredValueLoss
from rlhf.core.estimate import estimate
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig


def _train(policy, collector, algorithm, *, iterations, **update):
    learner = Learner(policy, algorithm, UpdateConfig(flatten_parameters=True, **update), seed=0)
    for _ in range(iterations):
        learner.update(estimate(collector.collect(), algorithm), kl_coef=0.0)
    return learner


@pytest.mark.parametrize("handled", [True, False])
def test_a_truncated_forever_is_worth_its_discounted_sum(make, handled):
    # Reward 1 forever at discount .98 is worth 1 / .02 = 50; a limit of 8 steps must not change that. Cut as if it were
    # an end, the value of the single state is an average over what is left, below 8. (Stable-Baselines3's test_gae.py
    # asks for |V - 50| < 1 with the truncation handled, and > 1 without.)
    algorithm = AlgorithmConfig(
        advantages=Gae(discount=0.98, gae_lambda=0.98), surrogate=PolicyGradient(), value_loss=SquaredValueLoss()
    )
    policy, collector = make("ForeverLimited-v0", algorithm, CollectSteps(steps=128), num_envs=2)
    learner = Learner(policy, algorithm, UpdateConfig(learning_rate=1e-2, flatten_parameters=True), seed=0)
    for _ in range(250):
        rollout = collector.collect()
        if not handled:
            rollout.next_values[rollout.episode_ends] = 0
        learner.update(estimate(rollout, algorithm))
    with torch.no_grad():
        value = policy.values(torch.ones(1)).item()
    assert abs(value - 50) < 1 if handled else value < 8


@pytest.mark.parametrize("kind", ["discrete", "multi_discrete", "multi_binary", "box"])
@pytest.mark.parametrize("preset", ["ppo", "a2c"])
def test_the_identity_is_learned(make, preset, kind):
    # Stable-Baselines3's tests/test_identity.py: a mean return above 90 of 100 over 20 episodes, gamma .4.
    algorithm = ALGORITHMS[preset]
    settings = {"advantages": algorithm.advantages.model_copy(update={"discount": 0.4})}
    if preset == "ppo":
        settings |= {"value_loss": SquaredValueLoss(), "epochs": 5}
    algorithm = algorithm.model_copy(update=settings)
    kwargs = {"kind": kind}
    policy, collector = make("Identity-v0", algorithm, CollectSteps(steps=32), num_envs=8, kwargs=kwargs)
    rate, iterations = (5e-3, 40) if preset == "ppo" else (1e-2, 100)
    _train(policy, collector, algorithm, iterations=iterations, learning_rate=rate, shuffle="actions")
    environment = EnvironmentConfig(id="Identity-v0", kwargs=kwargs)
    assert evaluate(policy, environment, EvaluationConfig(max_steps=100))["return_mean"] > 90


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["discrete", "multi_discrete", "multi_binary"])
@pytest.mark.parametrize("preset", ["ppo", "a2c"])
def test_the_identity_is_learned_in_stable_baselines3s_budget(make, preset, kind):
    # One environment, gamma .4, seed 3, and for PPO 512 steps a rollout and 5 epochs, as in its tests/test_identity.py:
    # 1,200 steps, which PPO rounds up to three rollouts.
    algorithm = ALGORITHMS[preset]
    settings = {"advantages": algorithm.advantages.model_copy(update={"discount": 0.4})}
    steps, iterations, rate = 5, 240, 3e-3
    if preset == "ppo":
        settings |= {"value_loss": SquaredValueLoss(), "epochs": 5, "minibatches": 8}
        steps, iterations, rate = 512, 3, 3e-3
    algorithm = algorithm.model_copy(update=settings)
    kwargs = {"kind": kind}
    policy, collector = make("Identity-v0", algorithm, CollectSteps(steps=steps), num_envs=1, kwargs=kwargs, seed=3)
    _train(policy, collector, algorithm, iterations=iterations, learning_rate=rate, shuffle="actions")
    environment = EnvironmentConfig(id="Identity-v0", kwargs=kwargs)
    assert evaluate(policy, environment, EvaluationConfig(max_steps=100))["return_mean"] > 90


@pytest.mark.parametrize("preset", sorted(name for name, row in ALGORITHMS.items() if row.language_only is None))
def test_every_preset_makes_a_step_on_every_kind_of_action(make, preset):
    algorithm = ALGORITHMS[preset].with_length(500)
    for identifier in ("CartPole-v1", "Pendulum-v1"):
        # A KL term in the loss is exactly 0 at the reference; the surrogate alone moves the policy.
        collect = CollectEpisodes(group_size=2, max_steps=20)
        policy, collector = make(identifier, algorithm, collect, num_envs=16)
        before = copy.deepcopy(policy.state_dict())
        learner = Learner(policy, algorithm, UpdateConfig(learning_rate=1e-3), seed=0)
        rollout = collector.collect()
        if identifier == "CartPole-v1":
            rollout.rewards[::2] *= 2  # equal lengths would give groups without contrast
        if preset == "maxrl":
            rollout.rewards.abs_()  # it refuses negative returns, which are no rate of success
        metrics = learner.update(estimate(rollout, algorithm, kl_coef=0.01), kl_coef=0.01)
        assert all(value == value for value in metrics.values()), "NaN"
        assert not torch.equal(before["actor.layers.0.weight"], policy.actor.layers[0].weight)


@pytest.mark.parametrize(("preset", "what"), [("remax", "greedy"), ("gdpo", "parts"), ("decoupled_ppo", "engine")])
def test_what_only_language_models_can_run_is_refused(make, preset, what):
    with pytest.raises(ConfigError, match=rf"algorithm: the algorithm needs .*{what}.*only a language model"):
        make("CartPole-v1", ALGORITHMS[preset], CollectEpisodes(group_size=2), num_envs=4)


def test_state_weights_need_whole_episodes(make):
    algorithm = ALGORITHMS["a2c"].model_copy(update={"discounted_state_weight": True})
    with pytest.raises(ConfigError, match=r"discounted_state_weight.*collect: \{type: episodes\}"):
        make("CartPole-v1", algorithm, CollectSteps(steps=8), num_envs=4)


def test_collector_and_learner_resume_exactly(make, tmp_path):
    algorithm, collect = ALGORITHMS["ppo"], CollectSteps(steps=16)
    update = UpdateConfig(shuffle="actions", flatten_parameters=True)
    policy, collector = make("CartPole-v1", algorithm, collect, num_envs=4)
    learner = Learner(policy, algorithm, update, seed=0)

    def go_on(collector, learner):
        learner.update(estimate(collector.collect(), algorithm))

    for _ in range(3):
        go_on(collector, learner)
    torch.save({"collector": collector.state_dict(), "learner": learner.state_dict()}, tmp_path / "state.pt")
    for _ in range(3):
        go_on(collector, learner)
    other, resumed = make("CartPole-v1", algorithm, collect, num_envs=4, seed=0)
    relearner = Learner(other, algorithm, update, seed=0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["collector"])
    relearner.load_state_dict(state["learner"])
    for _ in range(3):
        go_on(resumed, relearner)
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
