"""The on-policy experiments: their grids, scores and reports, on numbers known beforehand and on tiny runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from classic_rl.experiments import implementation_details, ppo_surrogates, trust_region
from classic_rl.experiments.grid import Grid, curves, grid_cells, matrix, run_grid
from classic_rl.experiments.on_policy import Training, play_randomly, train
from classic_rl.experiments.ppo_surrogates import PUBLISHED, scores
from classic_rl.experiments.sanity import TASK, generic, report, variants
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config, validate
from rlhf.core.algorithm import AdaptiveKl, Clipped, FixedKl, KlInLoss, NoKl, Unclipped
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError, TrainingError

CONFIGS = Path(__file__).resolve().parents[3] / "recipes/configs"
TINY = {
    "environment": {"id": "CartPole-v1", "num_envs": 2},
    "algorithm": {"preset": "ppo", "minibatches": 2},
    "collect": {"type": "steps", "steps": 64},
    "iterations": 3,
    "evaluation": {"episodes": 2},
}


def grid_of(recipe, name="default"):
    return load_config(import_recipe(find_recipe(recipe)).CONFIG, CONFIGS / recipe / f"{name}.yaml").grid


def run_of(last_100, **more):
    return {"last_100": last_100, "greedy": last_100, "env_steps": [10, 20], "returns": [1.0, last_100], **more}


# --- one training -----------------------------------------------------------------------------------------------------


def test_a_training_repeats_itself_and_differs_between_seeds():
    first, again, other = (train(TINY | {"seed": seed}) for seed in (0, 0, 1))
    assert first["env_steps"][-1] <= 3 * 128  # reset steps do not count
    assert len(first["returns"]) == 3
    assert first["reached_at"] is None
    assert {**first, "seconds": 0} == {**again, "seconds": 0}
    assert first["returns"] != other["returns"]
    json.dumps(first)


def test_a_training_ends_where_it_is_told():
    # CartPole's returns are at least 8, so 100 episodes with a mean of 5 are there as soon as there are 100 episodes.
    settings = TINY | {"iterations": 60, "ends_at_return": 5.0, "environment": {"id": "CartPole-v1", "num_envs": 8}}
    result = train(settings)
    assert result["reached_at"] == result["env_steps"][-1]
    assert len(result["env_steps"]) < 60


def test_distances_are_measured():
    result = train(
        TINY
        | {"measure_distance": True, "record": ["distance/kl", "distance/ratio_max", "distance/ratio_outside", "none"]}
    )
    recorded = result["recorded"]
    assert all(value > 0 for value in recorded["distance/kl"])
    assert all(value > 1 for value in recorded["distance/ratio_max"])
    assert all(0 <= value <= 1 for value in recorded["distance/ratio_outside"])
    assert recorded["none"] == [None] * 3


def test_clipping_does_not_keep_ratios_inside_its_range():
    """Flag of the lectures: 'no constraint is needed, because it stops at the clip' is false (2005.12729, figure 2)."""
    algorithm = {"preset": "ppo", "epochs": 20, "minibatches": 4, "value_loss": {"type": "squared"}}
    settings = TINY | {"algorithm": algorithm, "update": {"learning_rate": 3e-3, "shuffle": "actions"}}
    result = train(
        settings | {"measure_distance": True, "record": ["distance/ratio_max", "clip_fraction", "approx_kl"]}
    )
    assert max(result["recorded"]["distance/ratio_max"]) > 1.25
    assert max(result["recorded"]["clip_fraction"]) > 0
    # target_kl, which ends an update early, is what holds the policy.
    held = train(
        settings
        | {
            "update": settings["update"] | {"target_kl": 0.005},
            "measure_distance": True,
            "record": ["distance/kl", "epochs_run"],
        }
    )
    assert min(held["recorded"]["epochs_run"]) < 20


def test_a_trust_region_trains_and_two_algorithms_are_refused():
    settings = {key: value for key, value in TINY.items() if key != "algorithm"}
    trust_region = {"type": "trpo", "max_kl": 0.02, "critic": {"epochs": 2, "minibatches": 2}}
    result = train(
        settings | {"trust_region": trust_region, "measure_distance": True, "record": ["distance/kl", "step_accepted"]}
    )
    assert max(result["recorded"]["distance/kl"]) <= 0.02 * 1.001
    assert result["recorded"]["step_accepted"] == [1, 1, 1]
    for wrong in (settings, TINY | {"trust_region": trust_region}):
        with pytest.raises(ConfigError, match="either algorithm or trust_region"):
            train(wrong)


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_a_run_that_diverges_says_so():
    result = train(TINY | {"update": {"learning_rate": 1e30, "max_grad_norm": None, "optimizer": "adam"}})
    assert "not finite" in result["diverged"]


def test_a_policy_is_tried_in_other_worlds():
    settings = {**TINY, "environment": {**TINY["environment"], "vectorization": "sync"}}
    result = train(settings | {"worlds": {"same": {}, "thirty_steps_late": {"action_delay": [30, 30]}}})
    assert result["worlds"]["same"] == result["greedy"]
    # Until an action arrives the cart is pushed to the left, and the pole falls within 8 to 10 steps.
    assert 8 <= result["worlds"]["thirty_steps_late"] <= 10


def test_random_play_is_known():
    # CartPole's uniformly random policy returns 22.2 on average (10,000 episodes of gymnasium's; 22.9 in other counts).
    result = play_randomly({"environment": "CartPole-v1", "episodes": 300, "seed": 0})
    assert result["mean"] == pytest.approx(22.3, abs=4 * result["standard_error"])
    assert 0.3 < result["standard_error"] < 1.2


# --- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_merges_base_task_and_variant(tmp_path):
    grid = Grid(
        base=TINY,
        tasks={"one": {}, "two": {"environment": {"num_envs": 4}}},
        variants={"a": {}, "b": {"algorithm": {"surrogate": {"type": "unclipped"}}}},
        seeds=[3, 5],
    )
    cells = grid_cells(grid)
    assert [cell.name for cell in cells][:5] == [
        "a-one-seed_3", "b-one-seed_3", "a-two-seed_3", "b-two-seed_3", "a-one-seed_5",
    ]  # fmt: skip
    last = validate(Training, cells[-1].settings)
    assert last.environment.num_envs == 4
    assert last.environment.id == "CartPole-v1"
    assert isinstance(last.algorithm.surrogate, Unclipped)
    assert last.algorithm.minibatches == 2
    assert last.seed == 5
    with pytest.raises(ConfigError, match="cell a-one-seed_0"):
        grid_cells(Grid(base=TINY | {"iteration": 3}, tasks={"one": {}}, variants={"a": {}}))
    one = Grid(base=TINY | {"iterations": 1}, tasks={"one": {}}, variants={"a": {}, "b": {}}, seeds=[0, 1])
    results = run_grid(one, directory=tmp_path, jobs=1, name="test")
    assert set(results) == {("a", "one"), ("b", "one")}
    assert len(results["a", "one"]) == 2
    assert len(list((tmp_path / "cells").glob("*.json"))) == 4
    assert curves(results, "a", "one")[0][0] == results["a", "one"][0]["env_steps"]


def test_a_run_without_an_episode_has_no_score():
    with pytest.raises(TrainingError, match="no episode ended"):
        matrix({("a", "t"): [run_of(None)]}, "a", ["t"])


# --- PPO's surrogates -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "paper"])
def test_the_eleven_rows_are_configs_of_the_core(name):
    """Every row of Table 1 is a setting of `algorithm`, and nothing else differs between the rows."""
    grid = grid_of("ppo_surrogates", name)
    assert list(grid.variants) == list(PUBLISHED)
    rows = {
        cell.name.split("-")[0]: validate(Training, cell.settings)
        for cell in grid_cells(grid)
        if cell.name.endswith("InvertedPendulum-v5-seed_0")
    }
    for row, training in rows.items():
        algorithm, number = training.algorithm, float(row.rsplit("_", 1)[-1]) if row != "none" else None
        kl = algorithm.kl
        if row.startswith("clip"):
            assert algorithm.surrogate == Clipped(clip_low=number, clip_high=number)
        else:
            assert algorithm.surrogate == Unclipped()
        if "kl" in row:
            assert isinstance(kl, KlInLoss)
            assert kl.against == "old_policy"
            adaptive = AdaptiveKl(initial=1.0, target=number)
            assert kl.coefficient == (adaptive if row.startswith("adaptive") else FixedKl(value=number))
        else:
            assert kl == NoKl()
        assert (algorithm.epochs, algorithm.minibatches, training.collect.steps) == (10, 32, 2048)
        assert (algorithm.advantages.discount, algorithm.advantages.gae_lambda) == (0.99, 0.95)
        assert (training.update.learning_rate, algorithm.entropy_coef) == (3e-4, 0.0)
    if name == "paper":
        assert len(grid.tasks) * len(grid.seeds) == 21
        assert grid.base["iterations"] * 2048 >= 1_000_000


def test_scores_are_0_for_random_and_1_for_the_best_run():
    grid = Grid(base=TINY, tasks={"t": {}, "u": {}}, variants={"none": {}, "clip_0.2": {}}, seeds=[0, 1])
    results = {
        ("none", "t"): [run_of(0.0), run_of(10.0)],
        ("clip_0.2", "t"): [run_of(20.0), run_of(30.0)],
        ("none", "u"): [run_of(-100.0), run_of(-200.0)],
        ("clip_0.2", "u"): [run_of(-60.0), run_of(-50.0)],
    }
    # t: (x - 10) / (30 - 10); u: (x + 150) / (-50 + 150).
    found = scores(grid, results, {"t": 10.0, "u": -150.0})
    np.testing.assert_allclose(found["none"], [[-0.5, 0.5], [0.0, -0.5]])
    np.testing.assert_allclose(found["clip_0.2"], [[0.5, 0.9], [1.0, 1.0]])


def test_the_surrogate_report_compares_with_the_paper(tmp_path):
    names = list(PUBLISHED)
    grid = Grid(base=TINY, tasks={"t": {}}, variants={name: {} for name in names}, seeds=[0, 1])
    # Returns in exactly the published order give a rank correlation of 1.
    results = {(name, "t"): [run_of(100 * PUBLISHED[name]), run_of(100 * PUBLISHED[name])] for name in names}
    table, numbers = ppo_surrogates.report(grid, results, {"t": 0.0}, directory=tmp_path)
    assert numbers["published_order"] == pytest.approx(1.0)
    assert (numbers["best"], numbers["worst"]) == ("clip_0.2", "none")
    assert numbers["score/clip_0.2"] == pytest.approx(1.0)
    assert numbers["score/none"] == pytest.approx(-0.39 / 0.82)
    assert "| clip_0.2 | 0.82 | 1.00 [1.00, 1.00]" in table
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    results["none", "t"][1]["diverged"] = "the gradient is not finite"
    assert "none on t, run 1: the gradient" in ppo_surrogates.report(grid, results, {"t": 0.0}, directory=tmp_path)[0]


# --- details, trust regions -------------------------------------------------------------------------------------------


def test_each_detail_is_one_difference():
    grid = grid_of("implementation_details")
    cells = {cell.name.split("-")[0]: cell.settings for cell in grid_cells(grid) if "Hopper-v5-seed_0" in cell.name}
    full = validate(Training, cells["all"]).model_dump()
    assert len(cells) == 11

    def differences(a, b, path=""):
        if isinstance(a, dict) and isinstance(b, dict):
            keys = dict.fromkeys([*a, *b])
            return [d for key in keys for d in differences(a.get(key), b.get(key), f"{path}.{key}")]
        return [] if a == b else [path]

    for name, settings in cells.items():
        found = differences(full, validate(Training, settings).model_dump())
        if name.startswith("no_value_clip"):
            assert found == [".algorithm.value_loss.type", ".algorithm.value_loss.clip_range"]
        elif name.startswith("no_"):
            assert len(found) == 1, (name, found)
    assert len(grid_of("implementation_details", "factorial").variants) == 16


def test_the_details_report_takes_the_full_variant_as_1(tmp_path):
    grid = Grid(base=TINY, tasks={"t": {}}, variants={"all": {}, "no_tanh": {}}, seeds=[0, 1])
    results = {("all", "t"): [run_of(20.0), run_of(40.0)], ("no_tanh", "t"): [run_of(10.0), run_of(30.0)]}
    table, numbers = implementation_details.report(grid, results, {"t": 10.0}, directory=tmp_path)
    # (15 - 10) / (30 - 10) = .5 on average; all better in 3.0 of 4 pairs: 20 > 10, 20 < 30, 40 > 10, 40 > 30.
    assert numbers == {"score/all": pytest.approx(1.0), "score/no_tanh": pytest.approx(0.5)}
    assert "| no_tanh | 0.50 [0.00, 1.00] | 0.75 | 20 [10, 30] |" in table


def test_the_trust_region_report(tmp_path):
    grid = grid_of("trust_region")
    assert list(grid.variants) == ["natural_gradient", "trpo", "trpo_dual", "ppo"]
    recorded = {"distance/kl": [0.005, 0.02], "distance/ratio_max": [1.1, 1.7], "distance/ratio_outside": [0.0, 0.5]}
    results = {
        (name, task): [run_of(5.0, recorded=recorded), run_of(7.0, recorded=recorded)]
        for name in grid.variants
        for task in grid.tasks
    }
    table, numbers = trust_region.report(grid, results, directory=tmp_path)
    # Half of the updates lie beyond 0.01; the median of .005, .02, .005, .02 is .0125.
    assert "| CartPole-v1 | ppo | 6.0 [5.0, 7.0] | 6.0 [5.0, 7.0] | 0.0125 | 0.0200 | 50.0% | 1.70 | 25.0% |" in table
    assert numbers["CartPole-v1/ppo/return"] == 6
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# --- sanity -----------------------------------------------------------------------------------------------------------


def test_sanity_has_every_preset_an_environment_can_feed():
    methods = variants(CONFIGS)
    language_only = {name for name, algorithm in ALGORITHMS.items() if algorithm.language_only is not None}
    assert set(methods) == (set(ALGORITHMS) - language_only) | {"natural_gradient", "trpo", "trpo_dual"}
    cells = grid_cells(Grid(base={}, tasks={TASK: {}}, variants=methods, seeds=[0]))
    for cell in cells:
        training = validate(Training, cell.settings)
        assert training.environment.id == TASK
        file = CONFIGS / "on_policy" / f"cartpole_{cell.name.split('-')[0].replace('+', '_plus')}.yaml"
        if file.is_file():
            assert training.iterations == yaml.safe_load(file.read_text())["iterations"]


@pytest.mark.parametrize("preset", ["ppo", "grpo", "reinforce"])
def test_a_preset_without_a_file_gets_generic_settings(preset):
    result = train(generic(preset) | {"iterations": 2, "evaluation": {"episodes": 2}})
    assert len(result["returns"]) == 2


def test_the_sanity_report_counts_solved_seeds(tmp_path):
    results = {
        ("ppo", TASK): [run_of(500.0, reached_at=1000, seconds=1.0), run_of(500.0, reached_at=3000, seconds=3.0)],
        ("grpo", TASK): [run_of(500.0, reached_at=1000, seconds=1.0), run_of(400.0, reached_at=None, seconds=1.0)],
    }
    table, numbers = report(results, directory=tmp_path)
    assert "| ppo | 2 of 2 | 500 [500, 500] | 500, 500 | 2,000 (2 runs) | 2.0 |" in table
    assert "| grpo | 1 of 2 | 450 [400, 500] | 500, 400 | 1,000 (1 runs) | 1.0 |" in table
    assert numbers == {"solved/ppo": 1.0, "solved/grpo": 0.5, "presets": 2.0, "presets_solved": 1.0}


def test_the_sanity_recipe_runs_and_resumes(tmp_path):
    recipe = import_recipe(find_recipe("sanity"))
    overrides = [f"run.directory={tmp_path}", "presets=[reinforce]", "seeds=[0]", "jobs=1"]
    tiny = {"iterations": 1, "evaluation": {"episodes": 2}}
    original, recipe.variants = recipe.variants, lambda folder: {"reinforce": original(folder)["reinforce"] | tiny}
    recipe.main(load_config(recipe.CONFIG, CONFIGS / "sanity/default.yaml", overrides))
    file = tmp_path / "cells/reinforce-CartPole-v1-seed_0.json"
    written = file.stat().st_mtime_ns
    metrics = recipe.main(load_config(recipe.CONFIG, CONFIGS / "sanity/default.yaml", [*overrides, "run.resume=true"]))
    assert file.stat().st_mtime_ns == written
    assert metrics["presets"] == 1
    assert {"table.md", "figure.png", "results.json", "summary.json"} <= {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="no such preset"):
        recipe.main(load_config(recipe.CONFIG, None, [f"run.directory={tmp_path / 'x'}", "presets=[grop]"]))
