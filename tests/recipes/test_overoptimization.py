"""The over-optimization lab, end to end with a tiny model: cells, files, resuming, what it refuses."""

import json
from pathlib import Path

import pytest

from reward_models.overoptimization.settings import BestOfNConfig, OptimizationConfig
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config, validate
from rlhf.core.algorithm import FixedKl
from rlhf.errors import ConfigError

RECIPE = find_recipe("overoptimization")
MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def share_of_a(completions, **columns) -> list[float]:
    """A gold score that an untrained model gets some of."""
    return [text.count("a") / (len(text) + 1) for text in completions]


def settings(folder: Path, **changes) -> dict:
    return {
        "start": {
            "model": {"config": MODEL},
            "source": {"task": {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 40, "held_out": 6}},
            "sft": {"max_steps": 2, "batch_size": 8, "learning_rate": 1e-3},
            "gold": {"function": f"{__file__}:share_of_a"},
            "sampling": {"max_completion_length": 5},
            "ranked_prompts": 24,
            "members": 2,
            "reward_model": {"learning_rate": 1e-3, "batch_prompts": 8},
            "best_of_n": {"samples": 8, "largest": 4},
        },
        "optimization": {
            "prompts_per_iteration": 8,
            "iterations": 3,
            "evaluate_every": 1,
            "samples_per_prompt": 2,
            "update": {"learning_rate": 3e-3},
        },
        "variants": {
            "free": {},
            "leashed": {"kl_coefficient": 0.5},
            "worst": {"combine": "worst_case"},
            "budget": {"kl_budget": 1e-6},
        },
        "seeds": [0],
        "jobs": 1,
        "run": {"directory": str(folder), "progress_bar": False},
        **changes,
    }


def run(values: dict) -> dict[str, float]:
    module = import_recipe(RECIPE)
    return module.main(validate(module.CONFIG, values))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lab")
    return folder, run(settings(folder))


def cell(folder: Path, name: str) -> dict:
    return json.loads((folder / "cells" / f"{name}.json").read_text())["result"]


def test_it_leaves_tables_a_figure_and_every_number(finished):
    folder, metrics = finished
    table = (folder / "table.md").read_text()
    for name in ("free", "leashed", "worst", "budget", "best of n"):
        assert f"| {name} |" in table
    assert (folder / "figure.png").stat().st_size > 10_000
    numbers = json.loads((folder / "results.json").read_text())
    assert numbers["curves"]["free"][0]["gold"] == cell(folder, "free-seed_0")["gold"]
    assert metrics["free/gold_start"] == pytest.approx(metrics["leashed/gold_start"])


def test_a_curve_starts_at_the_start(finished):
    folder, _ = finished
    for name in ("free", "leashed", "worst"):
        result = cell(folder, f"{name}-seed_0")
        assert result["iteration"] == [0, 1, 2, 3]
        assert result["kl"][0] == pytest.approx(0.0, abs=1e-5)
        assert result["kl"][-1] > 1e-4
        assert result["ended_because"] is None
        assert len(result["answers"]) == 4
        assert set(result["answers"][0][0]) == {"prompt", "completion", "gold", "proxy"}


def test_the_budget_ends_its_run_at_the_first_rollout_beyond_it(finished):
    folder, _ = finished
    result = cell(folder, "budget-seed_0")
    # The first rollout is the start's own, at KL 0; the second one is beyond any budget.
    assert result["iteration"] == [0, 1, 2]
    assert result["kl"][2] == pytest.approx(result["kl"][1])  # the last iteration had no update
    assert "KL budget of 1e-06" in result["ended_because"]
    assert result["gold"][1] == cell(folder, "free-seed_0")["gold"][1]  # until then it is the free run
    assert "budget, seed 0: KL budget" in (folder / "table.md").read_text()


def test_best_of_n_by_all_answers_beats_one_by_the_proxy(finished):
    folder, _ = finished
    best = cell(folder, "start-seed_0")["best_of_n"]
    assert best["n"] == [1, 2, 4]
    for way in ("single", "mean", "worst_case", "mean_minus_variance"):
        assert best[way]["proxy"] == sorted(best[way]["proxy"])
        assert best[way]["gold"][0] == pytest.approx(best["single"]["gold"][0])  # n = 1 chooses nothing
    assert best["single"]["gold"][0] == pytest.approx(cell(folder, "start-seed_0")["gold"])


def test_the_proxy_of_the_worst_case_is_not_above_the_mean(finished):
    folder, _ = finished
    best = cell(folder, "start-seed_0")["best_of_n"]
    assert all(w <= m for w, m in zip(best["worst_case"]["proxy"], best["mean"]["proxy"], strict=True))


def test_it_goes_on_where_it_was(finished):
    folder, _ = finished
    kept = {file.name: file.stat().st_mtime_ns for file in (folder / "cells").glob("*.json")}
    values = settings(folder)
    values["variants"]["another"] = {"kl_coefficient": 0.1}
    values["run"]["resume"] = True
    run(values)
    now = {file.name: file.stat().st_mtime_ns for file in (folder / "cells").glob("*.json")}
    assert {name: now[name] for name in kept} == kept
    assert set(now) - set(kept) == {"another-seed_0.json"}


def test_the_coefficient_goes_into_the_algorithm():
    algorithm = OptimizationConfig().with_coefficient(0.25)
    assert algorithm.kl.coefficient == FixedKl(value=0.25)
    assert algorithm.kl.type == "in_reward"


def test_settings_without_meaning_are_refused():
    with pytest.raises(ConfigError, match="this algorithm has none"):
        validate(OptimizationConfig, {"algorithm": "dapo"})
    with pytest.raises(ConfigError, match="best of 16 needs as many samples"):
        validate(BestOfNConfig, {"samples": 8, "largest": 16})
    assert BestOfNConfig(samples=100, largest=64).ns == [1, 2, 4, 8, 16, 32, 64]


def test_the_default_measures_what_it_says():
    config = load_config(import_recipe(RECIPE).CONFIG, RECIPE.configs["default"])
    leashes = [variant.kl_coefficient for variant in config.variants.values() if not variant.is_remedy]
    assert len(set(leashes)) >= 4
    assert 0.0 in leashes
    assert config.start.best_of_n.largest >= 64
    assert config.start.members >= 3
    assert {variant.combine for variant in config.variants.values()} >= {"mean", "worst_case", "mean_minus_variance"}
    assert any(variant.kl_budget is not None for variant in config.variants.values())
    assert len(config.seeds) >= 3
