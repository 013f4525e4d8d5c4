"""The recipe: every shipped config says what it shows and runs two iterations; mistakes get one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
import torch
import yaml
from safetensors.torch import load_file

from classic_rl.saving import load
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
CONFIGS = sorted((RECIPES / "configs/on_policy").glob("*.yaml"))


@pytest.fixture(scope="module")
def recipe():
    return import_recipe(find_recipe("on_policy"))


def test_every_preset_has_a_cartpole_config():
    presets = {
        yaml.safe_load(path.read_text())["algorithm"]["preset"] for path in CONFIGS if path.stem.startswith("cartpole")
    }
    assert presets == {name for name, row in ALGORITHMS.items() if row.language_only is None}


def smaller(path):
    """Overrides that make a large rollout, and many updates on it, small."""
    settings = yaml.safe_load(path.read_text())
    steps, envs = settings["collect"].get("steps", 1), settings["environment"]["num_envs"]
    updates = settings["algorithm"].get("epochs", 1) * settings["algorithm"].get("minibatches", 1)
    large = settings.get("network", {}).get("convolutions") == "nature"
    if steps * envs <= 2048 and updates <= 64 and not large:
        return []
    return ["environment.num_envs=2", "collect.steps=32", "algorithm.minibatches=4", "algorithm.epochs=2"]


def in_order(path):
    """CartPole's configs are fast; environments that need extras, or one loop per environment, are not."""
    return pytest.param(path, id=path.stem, marks=() if path.stem.startswith("cartpole") else pytest.mark.slow)


@pytest.mark.parametrize("path", [in_order(path) for path in CONFIGS])
def test_a_config_says_what_it_shows_and_runs(recipe, tmp_path, path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")
    overrides = [
        f"run.directory={tmp_path / 'run'}",
        "iterations=2",
        "evaluation.episodes=2",
        "evaluation.max_steps=50",
        "run.log_every=1",
        *smaller(path),
    ]
    try:
        gymnasium.make(yaml.safe_load(path.read_text())["environment"]["id"]).close()
    except gymnasium.error.DependencyNotInstalled as missing:
        pytest.skip(str(missing))
    metrics = recipe.main(load_config(recipe.CONFIG, path, overrides))
    assert metrics["evaluation/return_min"] <= metrics["evaluation/return_mean"] <= metrics["evaluation/return_max"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("rollout/total_env_steps" in line for line in lines)
    config = load_config(recipe.CONFIG, path)
    if "ALE/" in config.environment.id:
        return  # one game made by gymnasium.make shows raw frames; only ALE's vector form stacks and shrinks them
    environment = gymnasium.make(config.environment.id)
    observation, _ = environment.reset(seed=0)
    assert environment.action_space.contains(load(tmp_path / "run/policy").predict(observation))


def test_a_resumed_run_equals_an_uninterrupted_one(recipe, tmp_path):
    path = RECIPES / "configs/on_policy/cartpole_ppo.yaml"

    def run(folder, iterations, **more):
        settings = {"directory": tmp_path / folder, **more}
        overrides = [f"run.{key}={value}" for key, value in settings.items()]
        # A constant schedule, so that the first half of a long run is a short run.
        constant = ["update.learning_rate_schedule=constant", "update.clip_schedule=constant", "evaluation.episodes=2"]
        return recipe.main(load_config(recipe.CONFIG, path, [f"iterations={iterations}", *overrides, *constant]))

    straight = run("straight", 6)
    run("halves", 3)
    resumed = run("halves", 6, resume="true")
    same = [name for name in straight if not name.startswith("time/")]
    assert {name: resumed[name] for name in same} == {name: straight[name] for name in same}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["environment.id=CartPol-v1"], "Did you mean CartPole-v1"),
        (["algorithm=dapo"], "collect.type.*expected episodes"),
        (["algorithm=grp"], "did you mean 'grpo'"),
        (["environment.num_env=3"], "did you mean '?(environment.)?num_envs'"),
        (["collect={type: episodes, group_size: 1}", "algorithm=dapo"], "collect.group_size.*at least 2"),
    ],
)
def test_mistakes_are_told_in_one_sentence(recipe, tmp_path, overrides, message):
    directory = [f"run.directory={tmp_path}"]
    with pytest.raises(ConfigError, match=message):
        recipe.main(load_config(recipe.CONFIG, RECIPES / "configs/on_policy/cartpole_ppo.yaml", directory + overrides))


@pytest.mark.slow
def test_two_processes_give_the_policy_of_one(tmp_path):
    """Environments, normalization, minibatches and updates are shared out; only the order of sums differs."""
    policies = []
    for processes in ("1", "2"):
        folder = tmp_path / processes
        overrides = [
            "iterations=3",
            "environment.vectorization=sync",
            "environment.normalize_observations=true",
            "evaluation.episodes=2",
            f"run.directory={folder}",
        ]
        command = [sys.executable, "-m", "rlhf.cli", "run", "on_policy", "--config", "cartpole_ppo"]
        done = subprocess.run(
            [*command, "--processes", processes, *overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        policies.append(load_file(folder / "policy" / "policy.safetensors"))
    one, two = policies
    assert one.keys() == two.keys()
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=1e-5, atol=1e-6, msg=name)
