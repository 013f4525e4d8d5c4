"""A small reward model really learns to rank, and the shipped default recipe does."""

import json

import pytest
import torch

from rlhf.commands.running import Request, run_here

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("loss", ["all_pairs", "plackett_luce", "best_of"])
def test_default_recipe_learns_to_rank(tmp_path, loss, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    overrides = [f"training.loss.type={loss}", f"run.directory={tmp_path}/run"]
    assert run_here(Request.make("reward_model", config="default", overrides=overrides)) == 0
    metrics = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
    # All words have six letters, so length tells nothing; the gold scorer counts vowels.
    assert metrics["evaluation/length_accuracy"] == 0.5
    assert metrics["evaluation/accuracy"] > 0.9
    assert metrics["evaluation/kendall_tau"] > 0.8
