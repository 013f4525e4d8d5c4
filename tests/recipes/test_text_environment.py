"""The recipe for text environments: it runs, resumes exactly, and learns the guessing game."""

import json

import pytest

from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import validate
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError

MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


def settings(folder, **changes) -> dict:
    return {
        "model": {"config": MODEL},
        "environment": {
            "function": "rlhf.lm.guessing:GuessingGame",
            "arguments": {"highest": 3, "guesses": 2},
            "demonstrations": 40,
        },
        "collector": {
            "starts_per_iteration": 8,
            "group_size": 2,
            "sampling": {"max_completion_length": 2},
            "max_episode_length": 32,
        },
        "update": {"learning_rate": 1e-3},
        "iterations": 2,
        "evaluation": {"episodes": 8},
        "run": {"directory": str(folder), "progress_bar": False},
        **changes,
    }


def run(values: dict) -> dict[str, float]:
    module = import_recipe(find_recipe("text_environment"))
    return module.main(validate(module.CONFIG, values))


@pytest.mark.parametrize("preset", ["ppo_rlhf", "grpo"])
def test_critics_and_groups_both_learn_from_episodes(preset, tmp_path):
    assert ALGORITHMS[preset].needs_critic == (preset == "ppo_rlhf")
    run(settings(tmp_path, algorithm=preset))
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    # Before the first update policy, sampler and reference are one and the same, over the policy's own tokens.
    assert first["rollout/kl_to_ref"] == 0.0
    assert first["rollout/sampling_mismatch_max"] < 1e-4
    assert first["rollout/environment_tokens_mean"] > 0
    sample = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])
    assert sample["messages"][0]["content"] == "guess 1 to 3"


def test_resume_goes_on_exactly(tmp_path):
    whole = run(settings(tmp_path / "whole", iterations=3))
    run(settings(tmp_path / "parts", iterations=1))
    resumed = settings(tmp_path / "parts", iterations=3)
    resumed["run"]["resume"] = True
    parts = run(resumed)
    timeless = {name for name in whole if not name.startswith("time/")}
    assert {name: parts[name] for name in timeless} == {name: whole[name] for name in timeless}


MUTE = """
class Mute:
    alphabet = "ab>\\n"

    def reset(self, *, seed=None):
        return [{"role": "user", "content": "a"}]

    def step(self, completion):
        return [], 0.0, True, False
"""


def test_fine_tuning_needs_an_environment_that_demonstrates(tmp_path, monkeypatch):
    (tmp_path / "mute_environment.py").write_text(MUTE)
    monkeypatch.chdir(tmp_path)
    environment = {"function": "mute_environment:Mute"}  # found in the working directory
    with pytest.raises(ConfigError, match=r"no demonstrate\(\)"):
        run(settings(tmp_path / "run", environment=environment, sft={"max_steps": 1}))


def test_an_environment_of_gymnasium_plays_in_words(tmp_path):
    arguments = {"map_name": "4x4", "max_turns": 3}
    environment = {"function": "classic_rl.frozen_lake_words:FrozenLakeInWords", "arguments": arguments}
    values = settings(tmp_path, environment=environment, iterations=1)
    values["collector"] |= {"starts_per_iteration": 2, "max_episode_length": 96}
    values["model"] = {"config": {**MODEL, "max_position_embeddings": 256}}  # the map alone takes 35 tokens
    run(values)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    # An untrained model says no words: three turns of -0.1, then the limit that it was not told of.
    assert first["rollout/truncated_fraction"] == 1.0
    assert first["rollout/score_mean"] == pytest.approx(-0.3)
    assert first["rollout/sampling_mismatch_max"] < 1e-4
