"""The DQN family: targets, masks, schedules, baselines, exact resume, saving, learning on small problems."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from classic_rl.agents import make_agent
from classic_rl.dqn_config import DQNConfig, EpsilonGreedy, PrioritizedReplay, epsilon_at
from classic_rl.environments import EnvironmentConfig
from classic_rl.evaluation import EvaluationConfig, evaluate_agent
from classic_rl.off_policy import OffPolicySchedule, Player
from classic_rl.replay import Transitions
from classic_rl.saving import load, save_agent
from rlhf.config import validate
from rlhf.errors import ConfigError, ModelError

RAINBOW = {
    "double": True,
    "n_step": 3,
    "network": {"hidden_sizes": [16, 16], "dueling": {}, "noisy": True},
    "values": {"type": "categorical", "atoms": 11, "low": 0.0, "high": 20.0},
    "replay": {"type": "proportional", "capacity": 500},
}
VARIANTS = {
    "plain": {"network": {"hidden_sizes": [16, 16]}},
    "naive": {"replay": {"type": "none"}, "target": {"type": "none"}, "optimizer": {"name": "sgd"}},
    "soft_double": {"double": True, "target": {"type": "soft", "rate": 0.1}},
    "dueling_max": {"network": {"hidden_sizes": [16], "dueling": {"aggregation": "max"}}},
    "rank_based": {"replay": {"type": "rank_based", "capacity": 300}, "n_step": 2},
    "quantile": {"values": {"type": "quantile", "quantiles": 5}, "optimizer": {"schedule": "linear"}},
    "noisy": {"network": {"hidden_sizes": [16, 16], "noisy": True}},
    "c51_rmsprop": {"values": {"type": "categorical", "atoms": 11}, "optimizer": {"name": "rmsprop", "momentum": 0.9}},
    "rainbow": RAINBOW,
}


class Valid(gymnasium.Env):
    """Only one of three actions is valid in each state, reward 1; another one is an error. Twenty steps."""

    observation_space = spaces.Box(0, 1, (3,), np.float32)
    action_space = spaces.Discrete(3, start=5)

    def __init__(self, *, told: str = "info") -> None:
        self.told = told
        if told == "method":
            self.action_masks = lambda: np.arange(3) == self.valid

    def _now(self):
        self.valid = int(self.np_random.integers(3))
        mask = {"action_mask": np.arange(3) == self.valid} if self.told == "info" else {}
        return np.eye(3, dtype=np.float32)[self.valid], mask

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.made = 0
        return self._now()

    def step(self, action):
        assert action - 5 == self.valid, "an invalid action was taken"
        self.made += 1
        observation, told = self._now()
        return observation, 1.0, False, self.made >= 20, told


if "Valid-v0" not in gymnasium.registry:
    gymnasium.register("Valid-v0", Valid, max_episode_steps=100)


def build(identifier="CartPole-v1", *, seed=0, num_envs=1, total=400, start=50, kwargs=None, every=1, **settings):
    environment = EnvironmentConfig(id=identifier, num_envs=num_envs, kwargs=kwargs or {}, vectorization="sync")
    schedule = OffPolicySchedule(total_steps=total, start_steps=start, train_every=every, steps_per_iteration=100)
    agent = make_agent(validate(DQNConfig, settings), environment=environment, schedule=schedule, seed=seed)
    return agent, Player(agent, environment, schedule, seed=seed)


def batch_of(next_observations, *, masks=None):
    count = len(next_observations)
    return Transitions(
        observations=next_observations,
        actions=torch.zeros(count, dtype=torch.int64),
        rewards=torch.ones(count),
        next_observations=next_observations,
        discounts=torch.full((count,), 0.5),
        weights=None,
        indices=np.arange(count),
        next_action_masks=masks,
    )


def set_constant(holder, values):
    """Let a plain network answer `values` whatever it sees."""
    last = holder.network.plain.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor(values))


@pytest.mark.parametrize(("double", "expected"), [(False, 1 + 0.5 * 10), (True, 1 + 0.5 * 2)])
def test_double_dqn_lets_the_online_network_choose(double, expected):
    """Target values (2, 10), online values (5, 3): DQN takes max = 10, Double DQN the value 2 of online's choice."""
    agent, _ = build(double=double)
    set_constant(agent.online, [5.0, 3.0])
    set_constant(agent.target, [2.0, 10.0])
    assert agent.bootstrap(batch_of(torch.zeros(1, 4))).tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_invalid_actions_are_not_bootstrapped_from(kernel):
    agent, _ = build(network={"kernel": kernel})
    set_constant(agent.target, [2.0, 10.0])
    masks = torch.tensor([[True, False], [True, True]])
    with torch.no_grad():
        assert agent.bootstrap(batch_of(torch.zeros(2, 4), masks=masks)).tolist() == [2.0, 6.0]


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "torch"])
def test_an_end_without_a_valid_action_is_worth_its_reward(kernel, double):
    agent, _ = build(network={"kernel": kernel}, double=double)
    set_constant(agent.target, [2.0, 10.0])
    batch = batch_of(torch.zeros(1, 4), masks=torch.tensor([[False, False]]))._replace(discounts=torch.zeros(1))
    with torch.no_grad():
        assert agent.bootstrap(batch).tolist() == [1.0]


def test_without_a_target_network_the_online_one_is_taken():
    agent, _ = build(target={"type": "none"})
    set_constant(agent.online, [5.0, 3.0])
    assert agent.bootstrap(batch_of(torch.zeros(1, 4))).tolist() == [3.5]


@pytest.mark.parametrize("told", ["info", "method"])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_only_valid_actions_are_taken(told, num_envs):
    """The environment itself refuses others, while exploring and greedily, over resets too."""
    agent, player = build("Valid-v0", num_envs=num_envs, kwargs={"told": told}, exploration={"final": 0.5}, every=8)
    player.play_until(200)
    environment = EnvironmentConfig(id="Valid-v0", kwargs={"told": told})
    assert evaluate_agent(agent, environment, EvaluationConfig(episodes=3))["return_mean"] == 20.0
    player.environments.close()


def test_epsilon_falls_linearly_then_stays():
    """From 1 to .05 over 16 % of 50,000 steps: .525 at 4,000."""
    epsilon = EpsilonGreedy(fraction=0.16, final=0.05)
    assert [round(epsilon_at(epsilon, step, total_steps=50_000), 6) for step in (0, 4000, 8000, 50_000)] == [
        1,
        0.525,
        0.05,
        0.05,
    ]
    assert epsilon_at(EpsilonGreedy(fraction=0.0, final=0.0), 0, total_steps=10) == 0.0


def test_beta_rises_to_one():
    assert [PrioritizedReplay(beta=0.4).beta_at(share) for share in (0.0, 0.5, 1.0)] == [0.4, 0.7, 1.0]


@pytest.mark.parametrize(("every", "updates"), [(1, 350), (4, 88), (64, 6)])
def test_updates_are_as_many_as_the_schedule_says(every, updates):
    """Trainings are due at multiples of `every`; those after step 50 of 400 happen: 350, 100 - 12, 6 - 0."""
    _, player = build(every=every)
    player.play_until(400)
    assert (player.env_steps, player.updates) == (400, updates)


def test_steps_that_only_reset_are_not_counted():
    """CartPole under random actions ends often: the lengths of all episodes, the unfinished one too, sum up to 400."""
    _, player = build(start=400)
    metrics = player.play_until(400)
    finished = metrics["rollout/length_mean"] * metrics["rollout/episodes"]
    assert finished + player.episode_lengths.sum() == 400 == len(player.agent.replay)
    assert metrics["rollout/return_mean"] == metrics["rollout/length_mean"]  # reward 1 a step


def test_a_hard_target_is_copied_when_due_and_not_between():
    agent, player = build(target={"type": "hard", "every_steps": 100}, start=0)
    player.play_until(99)
    assert torch.equal(agent.target.vector, build()[0].online.vector)  # seed 0's initial weights
    player.play_until(100)
    held = agent.target.vector.clone()
    assert not torch.equal(held, agent.online.vector)
    player.play_until(150)
    assert torch.equal(agent.target.vector, held)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_equals_an_uninterrupted_one(variant):
    """Bitwise: metrics, weights, target, replay draws, exploration and noise, in the same episodes."""
    straight = build(every=4, **VARIANTS[variant])
    straight[1].play_until(120)
    saved = [part.state_dict() for part in straight]
    resumed = build(every=4, **VARIANTS[variant])
    resumed[1].play_until(55)  # whatever it was before is replaced
    for part, state in zip(resumed, saved, strict=True):
        part.load_state_dict(state)
    assert straight[1].play_until(200) == resumed[1].play_until(200)
    assert torch.equal(straight[0].online.vector, resumed[0].online.vector)
    if straight[0].target is not None:
        assert torch.equal(straight[0].target.vector, resumed[0].target.vector)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_agent_acts_alike(variant, tmp_path):
    agent, player = build(**VARIANTS[variant])
    player.play_until(60)
    save_agent(tmp_path, agent)
    loaded = load(tmp_path)
    observations = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    expected = agent.greedy(observations).tolist()
    assert [loaded.predict(observation) for observation in observations] == expected
    with pytest.raises(ConfigError, match="greedily"):
        loaded.predict(observations[0], deterministic=False)


def test_a_broken_folder_is_told(tmp_path):
    save_agent(tmp_path, build()[0])
    (tmp_path / "policy.json").write_text('{"agent": {"type": "dqn"}}')
    with pytest.raises(ModelError, match="not a saved policy"):
        load(tmp_path)


def test_environments_that_cannot_be_saved_start_anew_and_say_so():
    agent, player = build()
    player.play_until(100)
    states = agent.state_dict(), player.state_dict() | {"environments": None}
    other_agent, other = build()
    other_agent.load_state_dict(states[0])
    with pytest.warns(UserWarning, match="starts new episodes"):
        other.load_state_dict(states[1])
    other.play_until(200)
    assert len(other_agent.replay) == 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"double": True, "target": {"type": "none"}}, "needs a target network"),
        ({"n_step": 3, "replay": {"type": "none"}}, "needs a replay buffer"),
    ],
)
def test_meaningless_combinations_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(DQNConfig, settings)


def test_other_actions_and_normalization_are_refused():
    with pytest.raises(ConfigError, match="finitely many actions"):
        build("Pendulum-v1")
    environment = EnvironmentConfig(id="CartPole-v1", normalize_observations=True)
    with pytest.raises(ConfigError, match="raw observations"):
        Player(build()[0], environment, OffPolicySchedule(total_steps=1))


@pytest.mark.slow
def test_the_value_of_an_endless_task_cut_by_a_time_limit():
    """Reward 1 for ever, gamma .98: V = 1 / .02 = 50, though episodes are cut after 8 steps (Stable-Baselines3's test).

    Were a cut taken for an end, values would stay below 8.
    """
    agent, player = build(
        "ForeverLimited-v0",
        total=3000,
        start=32,
        discount=0.98,
        n_step=8,
        network={"hidden_sizes": [8]},
        optimizer={"learning_rate": 0.01, "max_grad_norm": None},
        target={"type": "soft", "rate": 0.05},
        values={"type": "scalar", "huber": None},
    )
    player.play_until(3000)
    assert agent.policy.action_values(np.ones((1, 1), np.float32)).max() == pytest.approx(50.0, abs=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["plain", "soft_double", "rainbow", "quantile", "rank_based"])
def test_learns_the_identity(variant):
    """Stable-Baselines3's bound: above 90 of 100 after 1,200 steps, gamma .4, learning rate 2e-3."""
    settings = {"discount": 0.4, "optimizer": {"learning_rate": 2e-3}, **VARIANTS[variant]}
    settings["optimizer"] = {"learning_rate": 2e-3}
    if variant == "rainbow":
        settings["values"] = {"type": "categorical", "atoms": 21, "low": 0.0, "high": 2.0}
    settings["target"] = {"type": "hard", "every_steps": 50}
    agent, player = build("Identity-v0", total=1200, start=100, seed=3, exploration={"fraction": 0.5}, **settings)
    player.play_until(1200)
    environment = EnvironmentConfig(id="Identity-v0", vectorization="sync")
    result = evaluate_agent(agent, environment, EvaluationConfig(episodes=20, max_steps=200))
    assert result["return_mean"] > 90
