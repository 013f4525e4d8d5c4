"""The continuous agents as users meet them: spaces, noise, learning, truncation, determinism, resume, saving."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from classic_rl.action_noise import ActionNoise, GaussianNoise, OrnsteinUhlenbeckNoise
from classic_rl.continuous_policy import BoxActions
from classic_rl.ddpg import DDPGConfig
from classic_rl.evaluation import EvaluationConfig, evaluate_agent
from classic_rl.sac import SACConfig
from classic_rl.saving import load, save_agent
from classic_rl.td3 import TD3Config
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.errors import ConfigError
from rlhf.training.run import Run

AGENTS = ["sac", "sac_gsde", "td3", "ddpg", "discrete_sac"]


# --- spaces and noise -------------------------------------------------------------------------------------------------


def test_actions_are_scaled_to_uneven_bounds():
    box = BoxActions(spaces.Box(np.array([[-1.0], [2.0]]), np.array([[3.0], [2.5]]), dtype=np.float64))
    scaled = box.to_environment(np.array([[-1.0, -1.0], [0.0, 0.0], [1.0, 0.5]], dtype=np.float32))
    assert scaled.tolist() == [[[-1.0], [2.0]], [[1.0], [2.25]], [[3.0], [2.375]]]
    assert scaled.dtype == np.float64


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(-np.inf, np.inf, (2,)), "finite"),
        (spaces.Box(np.array([0.0]), np.array([np.inf])), "finite"),
        (spaces.Discrete(3), "dqn or discrete_sac"),
        (spaces.Box(0, 5, (1,), np.int64), "Box of floats"),
    ],
)
def test_other_spaces_are_refused(space, message):
    with pytest.raises(ConfigError, match=message):
        BoxActions(space)


def test_agents_refuse_environments_they_cannot_act_in(continuous):
    with pytest.raises(ConfigError, match="sac, td3 or ddpg"):
        continuous.agent_for(continuous.CONFIGS["discrete_sac"], "Pendulum-v1")
    with pytest.raises(ConfigError, match="dqn or discrete_sac"):
        continuous.agent_for(continuous.CONFIGS["td3"], "CartPole-v1")


@pytest.mark.parametrize("name", ["sac", "sac_gsde", "td3", "ddpg"])
def test_every_action_is_inside_the_bounds(continuous, name):
    # The environment refuses anything else; two environments, observations and actions with two axes.
    config = continuous.CONFIGS[name]
    agent, environment, schedule = continuous.agent_for(config, "OddBox-v0", total_steps=80, start_steps=40, num_envs=2)
    metrics = continuous.train(agent, environment, schedule)
    assert metrics["updates"] > 0
    assert np.abs(agent.replay.sample(50).actions.numpy()).max() <= 1


def test_first_steps_are_uniform(continuous):
    agent, *_ = continuous.agent_for(continuous.CONFIGS["sac"], "Pendulum-v1", start_steps=10_000)
    drawn = np.concatenate([agent.act(np.zeros((50, 3), np.float32), env_steps=0) for _ in range(200)])
    # Variance 1/3 and kurtosis 9/5 of U(-1, 1).
    assert drawn.var() == pytest.approx(1 / 3, rel=0.03)
    assert (drawn**4).mean() / drawn.var() ** 2 == pytest.approx(1.8, rel=0.03)


def test_ornstein_uhlenbeck_noise_by_hand():
    class Draws:
        def standard_normal(self, shape, dtype):
            return np.array([[1.0], [-2.0]], dtype=dtype)

    noise = ActionNoise(OrnsteinUhlenbeckNoise(std=0.5, theta=0.2, dt=0.04), shape=(2, 1))
    first = noise(Draws(), starts=np.array([True, True]))
    # x = .5 sqrt(.04) n = .1 n; then x + .2 (0 - x) .04 + .1 n = .992 x + .1 n, from 0 in the second environment
    np.testing.assert_allclose(first, [[0.1], [-0.2]], rtol=1e-6)
    second = noise(Draws(), starts=np.array([False, True]))
    np.testing.assert_allclose(second, [[0.992 * 0.1 + 0.1], [-0.2]], rtol=1e-6)


def test_long_run_spread_of_the_noises():
    generator, never = np.random.default_rng(0), np.zeros(1000, bool)
    noise = ActionNoise(OrnsteinUhlenbeckNoise(std=0.3, theta=1.5, dt=0.01), shape=(1000, 1))
    for _ in range(600):
        values = noise(generator, starts=never)
    # The discrete recursion's: sd^2 = std^2 dt / (1 - (1 - theta dt)^2)
    assert values.std() == pytest.approx(0.3 * math.sqrt(0.01 / (1 - 0.985**2)), rel=0.08)
    gaussian = ActionNoise(GaussianNoise(std=0.3), shape=(1000, 4))(generator, starts=never)
    assert gaussian.std() == pytest.approx(0.3, rel=0.06)


def test_noise_starts_anew_with_every_episode(continuous):
    # Episodes have 20 steps, and the step after the last one only resets.
    config = DDPGConfig(**continuous.SMALL, noise={"type": "ornstein_uhlenbeck", "std": 0.5})
    agent, environment, schedule = continuous.agent_for(config, "OddBox-v0", total_steps=60, start_steps=0)
    begins = []
    original = agent.replay.starts

    def watched():
        begins.append(bool(original()[0]))
        return original()

    agent.replay.starts = watched
    continuous.train(agent, environment, schedule)
    assert [index for index, begin in enumerate(begins) if begin] == [0, 21, 42]


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", [SACConfig, TD3Config, DDPGConfig])
def test_identity_is_learnt_in_400_steps(continuous, config):
    # Stable-Baselines3's tests/test_identity.py: 2 x 64, gamma .95, learning rate 1e-3, 100 first random steps, and
    # more than 90 of 100 over 20 episodes.
    agent, environment, schedule = continuous.agent_for(
        config(network={"hidden_sizes": [64, 64]}, discount=0.95, learning_rate=1e-3),
        "Identity-v0",
        total_steps=400,
        start_steps=100,
        kind="box",
    )
    continuous.train(agent, environment, schedule)
    assert evaluate_agent(agent, environment, EvaluationConfig(episodes=20, max_steps=100))["return_mean"] > 90


@pytest.mark.slow
def test_identity_is_learnt_by_discrete_sac(continuous):
    config = continuous.CONFIGS["discrete_sac"].model_copy(update={"discount": 0.4, "learning_rate": 2e-3})
    agent, environment, schedule = continuous.agent_for(config, "Identity-v0", total_steps=1200, start_steps=100)
    continuous.train(agent, environment, schedule)
    assert evaluate_agent(agent, environment, EvaluationConfig(episodes=20, max_steps=100))["return_mean"] > 90


@pytest.mark.slow
@pytest.mark.parametrize("handled", [True, False])
@pytest.mark.parametrize("name", ["sac", "td3"])
def test_a_truncated_forever_is_worth_its_discounted_sum(continuous, name, handled):
    # Reward 1 forever at discount .98 is worth 50, which a limit of 8 steps must not change; cut as if it ended, the
    # single state is worth 1 / (1 - .98 x 7/8) = 7 on average, and somewhat more where the actor finds actions that
    # happened to end fewer episodes (after Stable-Baselines3's tests/test_gae.py).
    shared = {"discount": 0.98, "learning_rate": 1e-2, "target_rate": 0.5, **continuous.SMALL}
    config = SACConfig(**shared, temperature={"type": "fixed", "value": 0.0})
    if name == "td3":
        config = TD3Config(**shared, policy_delay=1)
    agent, environment, schedule = continuous.agent_for(
        config, "ForeverBoxLimited-v0", total_steps=200, start_steps=200
    )
    if not handled:
        store = agent.replay.add
        agent.replay.add = lambda *, terminated, truncated, **rest: store(
            terminated=terminated | truncated, truncated=truncated & False, **rest
        )
    continuous.train(agent, environment, schedule)
    for update in range(700):
        agent.update(env_steps=200)
        if update == 500:  # a smaller rate for the rest: the value is to settle
            agent.critics.optimizer.set_learning_rate(1e-3)
    values = agent.critics.network(torch.ones(1, 1), torch.zeros(1, 1))
    if handled:
        assert (values - 50).abs().max() < 1
    else:
        assert values.max() < 25


# --- determinism, resume, saving --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_two_runs_are_equal(continuous, name):
    runs = []
    for seed in (0, 0, 1):
        config = continuous.CONFIGS[name]
        agent, environment, schedule = continuous.agent_for(
            config, continuous.environment_for(config), seed=seed, total_steps=500, start_steps=300
        )
        metrics = continuous.train(agent, environment, schedule, seed=seed)
        runs.append((metrics, continuous.weights(agent)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][key], runs[1][1][key]) for key in runs[0][1])
    assert any(not torch.equal(runs[0][1][key], runs[2][1][key]) for key in runs[0][1])


@pytest.mark.parametrize("name", AGENTS)
def test_a_resumed_run_equals_an_uninterrupted_one(continuous, tmp_path, monkeypatch, name):
    recipe = import_recipe(find_recipe("off_policy"))
    config = continuous.CONFIGS[name]
    settings = {
        "environment": {"id": continuous.environment_for(config), "num_envs": 2, "vectorization": "sync"},
        "agent": config.model_dump(mode="json"),
        "schedule": {"total_steps": 240, "start_steps": 60, "train_every": 2, "steps_per_iteration": 40},
        "evaluation": {"episodes": 2, "max_steps": 30},
    }

    def run(folder, **more):
        settings["run"] = {"directory": str(tmp_path / folder), "checkpoint_every": 1, **more}
        return recipe.main(recipe.CONFIG.model_validate(settings))

    straight = run("straight")
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_iteration", _then_stop(Run.finish_iteration, after=3))
        with pytest.raises(Stopped):
            run("halves")
    resumed = run("halves", resume=True)
    assert {key: value for key, value in resumed.items() if not key.startswith("time/")} == {
        key: value for key, value in straight.items() if not key.startswith("time/")
    }
    states = [
        torch.load(tmp_path / folder / "checkpoints/iteration_000006/agent.pt", weights_only=True)
        for folder in ("straight", "halves")
    ]
    assert flattened(states[0]) == flattened(states[1])


class Stopped(Exception):
    """Raised where a run is to break off."""


def _then_stop(original, *, after):
    def finish(self, iteration, rollout, metrics):
        original(self, iteration, rollout, metrics)
        if iteration == after:
            raise Stopped

    return finish


def flattened(state, prefix=""):
    """Every leaf of nested containers, tensors as bytes: bitwise equality."""
    if isinstance(state, dict):
        return {
            key: part for name, value in state.items() for key, part in flattened(value, f"{prefix}.{name}").items()
        }
    if isinstance(state, list | tuple):
        parts = [flattened(value, f"{prefix}.{index}") for index, value in enumerate(state)]
        return {key: part for own in parts for key, part in own.items()}
    return {prefix: state.numpy().tobytes() if isinstance(state, torch.Tensor) else state}


@pytest.mark.parametrize("name", AGENTS)
def test_a_saved_policy_acts_as_its_agent(continuous, tmp_path, name):
    config = continuous.CONFIGS[name]
    identifier = continuous.environment_for(config)
    agent, *_ = continuous.agent_for(config, identifier)
    continuous.fill(agent)
    agent.update(env_steps=10)
    save_agent(tmp_path, agent)
    policy, environment = load(tmp_path), gymnasium.make(identifier)
    observation, _ = environment.reset(seed=0)
    expected = agent.to_environment(agent.greedy(observation[None]))[0]
    assert np.array_equal(policy.predict(observation), expected)
    assert environment.action_space.contains(policy.predict(observation))
    if name in ("td3", "ddpg"):
        with pytest.raises(ConfigError, match="deterministic"):
            policy.predict(observation, deterministic=False)
    else:
        drawn = [policy.predict(observation, deterministic=False) for _ in range(40)]
        assert all(environment.action_space.contains(action) for action in drawn)
        assert len({float(np.asarray(action).sum()) for action in drawn}) > 1


def test_a_part_of_a_group_keeps_the_algorithms_defaults():
    config = TD3Config.model_validate({"network": {"activation": "tanh"}, "noise": {"type": "gaussian"}})
    assert (config.network.hidden_sizes, config.noise.std) == ([400, 300], 0.1)
    with pytest.raises(ConfigError, match="hidden_size"):
        load_config(
            import_recipe(find_recipe("off_policy")).CONFIG, None,
            ["environment.id=Pendulum-v1", "agent={type: td3, network: {hidden_size: [3]}}", "schedule.total_steps=1"],
        )  # fmt: skip
