"""Double DQN's figures: the printed numbers, exact expectations, and predicted beside realised values."""

from __future__ import annotations

import doctest
import importlib
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from classic_rl.environments import EnvironmentConfig
from classic_rl.evaluation import EvaluationConfig
from classic_rl.experiments.grid import Grid, grid_cells
from classic_rl.experiments.off_policy import OffPolicyTraining, values_of_greedy_play
from classic_rl.experiments.overestimation import (
    CASES,
    expected_maximum,
    expected_maximum_of_uniforms,
    fit_errors,
    simulate_maxima,
)
from classic_rl.experiments.overestimation_report import number_of_actions
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[3] / "recipes/configs"


@pytest.mark.parametrize(
    ("case", "single", "double"),
    [
        ("sin(s), degree 6", 0.61, -0.02),
        ("2 exp(-s^2), degree 6", 0.47, 0.02),
        ("2 exp(-s^2), degree 9", 3.35, -0.02),
    ],
)
def test_figure_2_gives_the_six_printed_numbers(case, single, double):
    errors = fit_errors(*CASES[case])
    assert round(float(errors.single.mean()), 2) == single
    assert round(float(errors.double.mean()), 2) == double


def test_the_maximum_is_nowhere_below_the_truth_by_more_than_the_best_fit():
    """max_a Q >= Q of every action, at every state."""
    errors = fit_errors(*CASES["sin(s), degree 6"])
    assert (errors.single + errors.truth >= errors.estimates - 1e-12).all()


@pytest.mark.parametrize(
    ("count", "value"),
    [(2, 0.5641895835), (4, 1.0293753730), (16, 1.7659913931), (64, 2.3437334651), (1024, 3.2482396014)],
)
def test_expected_maxima_of_normals(count, value):
    """1 / sqrt pi for two; the others by quadrature elsewhere."""
    assert expected_maximum(count) == pytest.approx(value, abs=1e-6)


def test_draws_agree_with_the_expectation():
    """10,000 draws: standard errors below .01; the double estimate has no bias."""
    single, double = simulate_maxima(8, draws=10_000)
    assert single == pytest.approx(1.4236, abs=0.04)
    assert double == pytest.approx(0.0, abs=0.05)
    assert expected_maximum_of_uniforms(3) == 0.5
    assert [row["actions"] for row in number_of_actions(draws=2)] == [2**k for k in range(1, 11)]


class Corridor(gymnasium.Env):
    """Four steps of reward 1, then the end: V = 1 + g + g^2 + g^3 at the first."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, *, terminates: bool = True) -> None:
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.made = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.made += 1
        over = self.made >= 4
        return np.full(1, self.made, np.float32), 1.0, over and self.terminates, over and not self.terminates, {}


if "Corridor-v0" not in gymnasium.registry:
    gymnasium.register("Corridor-v0", Corridor, max_episode_steps=50)


class Sure:
    """Predicts 10 - observation for its best action."""

    class policy:
        @staticmethod
        def action_values(observations):
            return np.stack([10 - observations[:, 0], np.zeros(len(observations))], axis=1)

    class config:
        clip_rewards = False

    def greedy(self, observations, *, action_masks=None):
        return np.zeros(len(observations), np.int64)

    def to_environment(self, actions):
        return actions


def test_values_of_greedy_play_by_hand():
    """g = .5: returns 1.875, 1.75, 1.5, 1; predictions 10, 9, 8, 7."""
    environment = EnvironmentConfig(id="Corridor-v0", vectorization="sync")
    predicted, realised = values_of_greedy_play(Sure(), environment, EvaluationConfig(episodes=3), discount=0.5)
    assert predicted == 8.5
    assert realised == pytest.approx((1.875 + 1.75 + 1.5 + 1) / 4)


def test_returns_of_cut_episodes_count_only_where_the_rest_is_negligible():
    """g = .1: .1^2 is not below 1 % of a step's weight before 2 steps, so of 4 steps the first 2 count."""
    environment = EnvironmentConfig(id="Corridor-v0", kwargs={"terminates": False}, vectorization="sync")
    config = EvaluationConfig(episodes=2)
    predicted, realised = values_of_greedy_play(Sure(), environment, config, discount=0.1)
    assert predicted == 9.5
    assert realised == pytest.approx((1.111 + 1.11) / 2)
    assert np.isnan(values_of_greedy_play(Sure(), environment, config, discount=0.9)[0])


def test_a_grid_merges_base_task_and_variant():
    grid = Grid(
        base={"agent": {"type": "dqn", "batch_size": 8}, "schedule": {"total_steps": 10}},
        tasks={"T": {"environment": {"id": "CartPole-v1"}}},
        variants={"plain": {}, "double": {"agent": {"double": True}}},
        seeds=[4],
    )
    plain, double = grid_cells(grid, training=OffPolicyTraining)
    assert (plain.name, double.name) == ("plain-T-seed_4", "double-T-seed_4")
    assert double.settings["agent"] == {"type": "dqn", "batch_size": 8, "double": True}
    assert plain.settings["seed"] == 4
    broken = grid.model_copy(update={"variants": {"bad": {"agent": {"doubel": True}}}})
    with pytest.raises(ConfigError, match=r"bad-T-seed_4.*double"):
        grid_cells(broken, training=OffPolicyTraining)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["overestimation", "rainbow"])
def test_the_recipes_write_table_figure_and_results(recipe, tmp_path):
    short = "{total_steps: 60, start_steps: 20, train_every: 4, updates_per_train: 1, steps_per_iteration: 30}"
    module = import_recipe(find_recipe(recipe))
    overrides = [
        f"run.directory={tmp_path}",
        "jobs=1",
        "grid.seeds=[0]",
        "grid.base.evaluation.episodes=1",
        f"grid.base.schedule={short}",
        "grid.tasks={CartPole-v1: {environment: {id: CartPole-v1, num_envs: 1, vectorization: sync}}}",
    ]
    module.main(load_config(module.CONFIG, CONFIGS / recipe / "default.yaml", overrides))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results
    assert "CartPole-v1" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "figure.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "name",
    [
        "distributional",
        "dqn_config",
        "experiments.normalized_scores",
        "experiments.overestimation",
        "noisy",
        "q_networks",
        "replay",
    ],
)
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"classic_rl.{name}")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
