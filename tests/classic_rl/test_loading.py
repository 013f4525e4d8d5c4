"""`classic_rl.load(folder).predict(observation)` for each kind of agent, and the numbers of a run in TensorBoard."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

import classic_rl
from classic_rl.agents import make_agent
from classic_rl.alphazero.games import TicTacToe
from classic_rl.alphazero.network import BoardNetwork, BoardNetworkConfig
from classic_rl.alphazero.search import SearchConfig
from classic_rl.discrete_sac import DiscreteSACConfig
from classic_rl.dqn_config import DQNConfig
from classic_rl.environments import EnvironmentConfig
from classic_rl.off_policy import OffPolicySchedule
from classic_rl.sac import SACConfig
from classic_rl.saving import save_agent
from rlhf.config import load_config
from rlhf.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[2] / "recipes/configs"
SCHEDULE = OffPolicySchedule(total_steps=100, start_steps=0)


def run(recipe, config, folder, *overrides):
    module = importlib.import_module(f"recipes.{recipe}")
    settings = [f"run.directory={folder}", "run.progress_bar=false", *overrides]
    return module.main(load_config(module.CONFIG, CONFIGS / recipe / f"{config}.yaml", settings))


# --- tables, features, games ------------------------------------------------------------------------------------------


def test_a_solved_lake_is_walked_from_its_folder(tmp_path):
    # Without slipping the shortest way over FrozenLake's 4 x 4 has six steps (the optimum is gamma^5, section 3a).
    run("tabular", "frozenlake_value_iteration", tmp_path, "environment.kwargs={is_slippery: false}")
    policy = classic_rl.load(tmp_path / "policy")
    environment = gymnasium.make("FrozenLake-v1", is_slippery=False)
    observation, steps, over = environment.reset(seed=0)[0], 0, False
    while not over:
        action = policy.predict(observation)
        assert environment.action_space.contains(action)
        observation, reward, terminated, truncated, _ = environment.step(action)
        steps, over = steps + 1, terminated or truncated
    assert (steps, reward) == (6, 1.0)
    assert policy.predict(0, deterministic=False) in range(4)


def test_learned_values_act_from_their_folders(tmp_path):
    run("tabular", "frozenlake_q_learning", tmp_path / "table", "total_steps=3000")
    values = np.load(tmp_path / "table/values.npz")
    table = classic_rl.load(tmp_path / "table/policy")
    assert [table.predict(state) for state in range(16)] == values["policy"].argmax(axis=1).tolist()
    np.testing.assert_array_equal(table.action_values, values["action_values"])
    run("tabular", "mountaincar_linear", tmp_path / "linear", "total_steps=500")
    weights = np.load(tmp_path / "linear/values.npz")["weights"]
    linear = classic_rl.load(tmp_path / "linear/policy")
    # cos(pi c . x) for c in {0..5}^2, positions -1.2 to .6 and speeds -.07 to .07 scaled to [0, 1].
    scaled = (np.array([-0.5, 0.01]) - [-1.2, -0.07]) / [1.8, 0.14]
    features = np.cos(np.pi * np.array([[i, j] for i in range(6) for j in range(6)]) @ scaled)
    assert linear.predict(np.array([-0.5, 0.01])) == (weights @ features).argmax()
    with pytest.raises(ConfigError, match="greedily only"):
        linear.predict(np.zeros(2), deterministic=False)


def test_a_game_is_played_from_its_folder(tmp_path):
    game = TicTacToe()
    BoardNetwork(game, BoardNetworkConfig(channels=4)).save(
        tmp_path, name="tictactoe", search=SearchConfig(simulations=150)
    )
    player = classic_rl.load(tmp_path)
    assert player.search.simulations == 150
    board = np.array([[1, 1, 0], [-1, -1, 0], [0, 0, 0]])
    assert player.predict(board) == 2, "complete the row"
    assert player.predict(board.ravel(), simulations=200) == 2
    drawn = {player.predict(np.zeros(9), deterministic=False, simulations=30) for _ in range(60)}
    assert len(drawn) > 1


# --- what is observed -------------------------------------------------------------------------------------------------


class Anything(gymnasium.Env):
    """Random observations of a space of parts, or images."""

    def __init__(self, *, images: bool = False, box: bool = False) -> None:
        parts = {
            "number": spaces.Discrete(3, start=1),
            "vector": spaces.Box(-1, 1, (2,)),
            "bits": spaces.MultiBinary(2),
        }
        self.observation_space = spaces.Box(0, 1, (10, 10, 2), np.uint8) if images else spaces.Dict(parts)
        self.action_space = spaces.Box(-2, 1, (2,)) if box else spaces.Discrete(3, start=1)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


if "Anything-v0" not in gymnasium.registry:
    gymnasium.register("Anything-v0", entry_point=Anything, max_episode_steps=20)


@pytest.mark.parametrize(
    ("config", "kwargs"),
    [
        (DQNConfig(), {}),
        (DiscreteSACConfig(), {}),
        (SACConfig(), {"box": True}),
        (DQNConfig.model_validate({"network": {"convolutions": "minatar", "hidden_sizes": [8]}}), {"images": True}),
    ],
    ids=["dqn_dict", "discrete_sac_dict", "sac_dict", "dqn_image"],
)
def test_off_policy_agents_read_dicts_and_images(config, kwargs, tmp_path):
    environment = EnvironmentConfig(id="Anything-v0", vectorization="sync", num_envs=1, kwargs=kwargs)
    agent = make_agent(config, environment=environment, schedule=SCHEDULE, seed=0)
    save_agent(tmp_path, agent)
    policy, single = classic_rl.load(tmp_path), gymnasium.make("Anything-v0", **kwargs)
    observation, _ = single.reset(seed=0)
    for _ in range(10):
        action = policy.predict(observation, deterministic=True)
        assert single.action_space.contains(action)
        images = isinstance(single.observation_space, spaces.Box)
        row = observation if images else spaces.utils.flatten(single.observation_space, observation).astype(np.float32)
        np.testing.assert_array_equal(action, agent.to_environment(agent.greedy(row[None]))[0])
        observation, *_ = single.step(action)


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_gets_what_the_metrics_file_gets(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run("on_policy", "cartpole_ppo", tmp_path, "iterations=3", "run.trackers=[tensorboard]", "run.log_every=1",
        "collect.steps=16", "evaluation.episodes=1", "run.evaluate_every=3")  # fmt: skip
    boards = []
    for events in tmp_path.rglob("events.out.tfevents.*"):
        boards.append(accumulators.EventAccumulator(str(events)).Reload())
    (board,) = (board for board in boards if "policy_loss" in board.Tags()["scalars"])  # hyperparameters have their own
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("policy_loss", "value_loss", "entropy"):
        written = {event.step: event.value for event in board.Scalars(name)}
        expected = {line["iteration"]: line[name] for line in lines if name in line}
        assert written.keys() == expected.keys() == {1, 2, 3}
        torch.testing.assert_close(list(written.values()), list(expected.values()), rtol=1e-6, atol=0)
