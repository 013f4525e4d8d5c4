"""Everything PPO offers, from a config through the loop: coefficients, estimators, all actors, resuming, ending."""

import json

import pytest
import torch
from safetensors.torch import load_file

from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import ConfigError, load_config, validate
from rlhf.lm.fine_tuning import FineTuningConfig
from tests.recipes.test_language_recipes import MODEL, run, settings

ADAPTIVE = {
    "fixed": ("{type: fixed, value: 0.3}", 0.3),
    "proportional": ("{type: proportional, initial: 0.2, target: 0.05, horizon: 100}", 0.2),
    "adaptive": ("{type: adaptive, initial: 0.2, target: 0.01, unit: sequence}", 0.2),
    "dual": ("{type: dual, initial: 0.2, target: 0.01, learning_rate: 3.0}", 0.2),
}


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def next_coefficient(kind, value, line):
    """The rules by hand, from what the run logged: 16 completions an iteration."""
    token, sequence = line["kl_to_ref"], line["kl_to_ref_per_sequence"]
    match kind:
        case "proportional":  # Ziegler et al. 2019: nats per sequence, error clipped to +-0.2, episodes / horizon
            return value * (1 + max(-0.2, min(0.2, sequence / 0.05 - 1)) * 16 / 100)
        case "adaptive":  # halved below target / 1.5, doubled above target x 1.5
            return value / 2 if sequence < 0.01 / 1.5 else value * 2 if sequence > 0.01 * 1.5 else value
        case "dual":
            return max(0.0, value + 3.0 * (token - 0.01))
        case _:
            return value


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in_reward", "in_loss"])
@pytest.mark.parametrize("kind", ADAPTIVE)
def test_every_coefficient_is_reachable_and_moves_as_its_paper_says(kind, where, tmp_path):
    written, expected = ADAPTIVE[kind]
    text = f"algorithm: {{preset: ppo_rlhf, epochs: 1, kl: {{type: {where}, coefficient: {written}}}}}\n"
    text += json.dumps(settings(tmp_path / "run", iterations=4, update={"learning_rate": 3e-2}))[1:-1].replace('"', "'")
    file = tmp_path / "config.yaml"
    file.write_text("{" + text.replace("\n", ", ", 1) + "}")
    module = import_recipe(find_recipe("ppo_rlhf"))
    module.main(load_config(module.CONFIG, file))
    lines = lines_of(tmp_path / "run")
    assert lines[0]["kl_to_ref"] == 0.0
    assert lines[-1]["kl_to_ref"] != 0.0
    for line in lines:
        assert line["kl_coef"] == pytest.approx(expected, rel=1e-6)
        expected = next_coefficient(kind, expected, line)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "estimator"),
    [
        *(("in_reward", name) for name in ("k1", "k2", "k3")),
        *(("in_loss", name) for name in ("k2", "k3", "k3_straight_through", "k3_weighted")),
    ],
)
def test_every_estimator_holds_the_policy_back(where, estimator, tmp_path):
    """With a heavy coefficient and nothing else to gain, the KL stays below that of a run without it."""
    kls = []
    for coefficient in (0.0, 5.0):
        kl = {"type": where, "estimator": estimator, "coefficient": {"type": "fixed", "value": coefficient}}
        algorithm = {"preset": "ppo_rlhf", "epochs": 2, "kl": kl}
        folder = tmp_path / f"coefficient_{coefficient}"
        changes = {"iterations": 8, "algorithm": algorithm, "update": {"learning_rate": 1e-2}}
        run("ppo_rlhf", settings(folder, evaluation={"greedy": False, "samples_per_prompt": 1}, **changes))
        kls.append(lines_of(folder)[-1]["kl_to_ref_per_sequence"])
    assert kls[1] < kls[0]


def test_k1_in_the_loss_is_refused_with_the_reason(tmp_path):
    kl = {"type": "in_loss", "estimator": "k1"}
    with pytest.raises(ConfigError, match="expected gradient of 0"):
        validate(FineTuningConfig, settings(tmp_path, algorithm={"preset": "ppo_rlhf", "kl": kl}))


def everything(folder, **changes):
    """LoRA policy, adapter critic with warm-up, reference by adapters off, ptx, average, adaptive coefficient."""
    kl = {"coefficient": {"type": "proportional", "initial": 0.2, "horizon": 1000}}
    return settings(
        folder,
        **{
            "model": {"config": MODEL, "lora": {"rank": 2}},
            "critic": {"start": "adapter", "warmup_iterations": 1},
            "ptx": {"coefficient": 0.5, "batch_size": 4},
            "ema": {"decay": 0.5, "evaluate": True},
            "algorithm": {"preset": "ppo_rlhf", "epochs": 2, "kl": kl},
            "update": {"learning_rate": 1e-2},
            "iterations": 4,
            **changes,
        },
    )


def test_everything_together_resumes_exactly(tmp_path):
    whole = run("ppo_rlhf", everything(tmp_path / "whole"))
    run("ppo_rlhf", everything(tmp_path / "parts", iterations=2))
    resumed = everything(tmp_path / "parts")
    resumed["run"]["resume"] = True
    parts = run("ppo_rlhf", resumed)
    timeless = {name for name in whole if not name.startswith("time/")}
    assert {name: parts[name] for name in timeless} == {name: whole[name] for name in timeless}
    for folder in ("model", "model_ema"):
        files = [tmp_path / name / folder / "adapter_model.safetensors" for name in ("whole", "parts")]
        first, second = map(load_file, files)
        assert first
        assert all(torch.equal(first[name], second[name]) for name in first)
    lines = lines_of(tmp_path / "whole")
    assert [line["critic_warmup"] for line in lines] == [1.0, 0.0, 0.0, 0.0]
    # The policy does not move in the warm-up: the second rollout is still the reference's, but for the rounding of the
    # generator, whose log-probs it takes; and the coefficient rests.
    assert lines[0]["kl_to_ref"] == 0.0
    assert [abs(line["kl_to_ref"]) < 1e-6 for line in lines] == [True, True, False, False]
    assert [line["kl_coef"] == 0.2 for line in lines] == [True, True, False, False]
    assert ["ptx_loss" in line for line in lines] == [False, True, True, True]
    assert "evaluation/ema_greedy_score_mean" in lines[-1]
    assert {"watch/warnings", "explained_variance"} <= set(lines[-1])


def test_the_kl_budget_ends_the_run_in_order(tmp_path):
    values = settings(
        tmp_path,
        algorithm="dapo",  # which keeps no reference of its own
        iterations=30,
        update={"learning_rate": 3e-2},
        watch={"kl_budget": 0.05},
    )
    metrics = run("grpo", values)
    lines = lines_of(tmp_path)
    spent = [line["rollout/kl_to_ref_per_sequence"] for line in lines]
    assert len(lines) < 30
    assert spent[-1] > 0.05
    assert all(kl <= 0.05 for kl in spent[:-1])
    assert "policy_loss" not in lines[-1]  # nothing was learned from the last rollout
    assert "evaluation/greedy_score_mean" in metrics
    assert "exceeds the budget" in json.loads((tmp_path / "summary.json").read_text())["ended_because"]
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert (tmp_path / "checkpoints" / "latest").is_file()


def test_the_doctor_writes_its_record_and_can_be_sent_away(tmp_path):
    run("ppo_rlhf", settings(tmp_path / "with", iterations=1))
    checks = {
        check["name"]: check["verdict"] for check in json.loads((tmp_path / "with/doctor.json").read_text())["checks"]
    }
    assert (checks["ratio"], checks["kl"], checks["generator"]) == ("ok", "ok", "ok")
    run("ppo_rlhf", settings(tmp_path / "without", iterations=1, doctor={"enabled": False}))
    assert not (tmp_path / "without/doctor.json").exists()


@pytest.mark.parametrize(
    ("given", "start", "warmup"),
    [
        ("copy", "copy", 0),
        ({"start": "copy"}, "copy", 0),
        ({"warmup_iterations": 3}, "head", 3),
        ({"preset": "copy", "warmup_iterations": 2}, "copy", 2),  # what an override below a word makes
    ],
)
def test_a_critic_is_a_word_or_settings(given, start, warmup, tmp_path):
    config = validate(FineTuningConfig, settings(tmp_path, critic=given, algorithm="ppo_rlhf"))
    assert (config.critic.start, config.critic.warmup_iterations) == (start, warmup)
