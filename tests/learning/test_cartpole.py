"""CartPole-v1 is solved: gymnasium registers 475 as its threshold."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cartpole_ppo", "cartpole_a2c"])
def test_cartpole_is_solved(tmp_path, name):
    recipe = import_recipe(find_recipe("on_policy"))
    config = load_config(
        recipe.CONFIG, RECIPES / "configs/on_policy" / f"{name}.yaml", [f"run.directory={tmp_path / name}"]
    )
    metrics = recipe.main(config)
    assert metrics["evaluation/return_mean"] >= 475
    assert (tmp_path / name / "policy" / "policy.safetensors").is_file()
