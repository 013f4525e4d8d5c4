"""Every algorithm through its recipe: a run that breaks off and is resumed equals the uninterrupted one, bit by bit.

Weights, optimizers, replays, normalizers, generators, schedules, counters, the environments' own states: all that the
last checkpoint holds is compared, and the metrics of the run besides. Other tests do the same part by part.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import yaml

from classic_rl.dqn_config import DQNConfig
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.core.presets import ALGORITHMS
from rlhf.training.run import Run

CONFIGS = Path(__file__).resolve().parents[2] / "recipes/configs"

EPISODES = ["environment.num_envs=4", "collect.max_steps=12", "iterations=4"]
STEPS = ["environment.num_envs=4", "collect.steps=12", "iterations=4", "algorithm.minibatches=2", "algorithm.epochs=2"]
NORMALIZED = ["environment.normalize_observations=true", "environment.normalize_rewards=true"]
GSDE = "network.state_dependent={sample_every: 5}"
OFF_POLICY = ["schedule={total_steps: 160, start_steps: 50, train_every: 4, steps_per_iteration: 40}"]
SMALL = [*OFF_POLICY, "agent.network.hidden_sizes=[16]", "agent.batch_size=16", "environment.num_envs=2"]
TRPO = ["environment.num_envs=2", "collect.steps=16", "iterations=4", "algorithm.critic={epochs: 2, minibatches: 2}"]
PLAIN = ["environment.num_envs=4", "collect.max_steps=12", "iterations=4"]
TABULAR = ["total_steps=600", "iterations=4"]
DQN = {
    "naive": "agent={type: dqn, replay: {type: none}, target: {type: none}}",
    "replay_hard_target": "agent.target={type: hard, every_steps: 30}",
    "soft_target_clipped_rewards": "agent={type: dqn, target: {type: soft, rate: .1}, clip_rewards: true}",
    "double_dueling_max": "agent={type: dqn, double: true, network: {dueling: {aggregation: max}}}",
    "dueling_naive": "agent={type: dqn, network: {dueling: {aggregation: naive}}}",
    "proportional": "agent.replay={type: proportional, capacity: 200}",
    "rank_based": "agent.replay={type: rank_based, capacity: 200}",
    "three_steps": "agent.n_step=3",
    "c51": "agent={type: dqn, values: {type: categorical, low: 0, high: 50}}",
    "quantile": "agent={type: dqn, values: {type: quantile, quantiles: 10}}",
    "noisy": "agent={type: dqn, network: {noisy: true}, exploration: {initial: 0, final: 0}}",
    "rainbow": "agent={type: dqn, double: true, n_step: 3, replay: {type: proportional, capacity: 200}, "
    "network: {dueling: {}, noisy: true}, values: {type: categorical, low: 0, high: 50}}",
}


def cases():
    """(recipe, config, overrides) by name."""
    found = {}
    for name, row in ALGORITHMS.items():
        if row.language_only is None:
            config = f"cartpole_{name.replace('++', '_plus_plus')}"
            settings = yaml.safe_load((CONFIGS / f"on_policy/{config}.yaml").read_text())
            groups = settings["collect"]["type"] == "episodes"
            size = [*EPISODES, *(["collect.group_size=2"] if row.needs_groups else [])] if groups else STEPS
            found[f"preset_{name}"] = "on_policy", config, size
    found |= {
        "ppo_normalizers": ("on_policy", "pendulum_ppo", [*STEPS, *NORMALIZED]),
        "ppo_lstm": ("on_policy", "cartpolenovelocity_ppo_lstm", STEPS),
        "ppo_gru": ("on_policy", "cartpolenovelocity_ppo_lstm", [*STEPS, "network.memory={cell: gru, size: 8}"]),
        "a2c_gru": ("on_policy", "cartpolenovelocity_a2c_gru", STEPS[:3]),
        "ppo_gsde": ("on_policy", "pendulum_ppo_gsde", [*STEPS, GSDE]),
        "a2c_gsde": ("on_policy", "pendulum_a2c_gsde", [*STEPS[:3], GSDE]),
        "ppo_masks": ("on_policy", "cartpole_ppo", [*STEPS, "environment.id=InvalidActions-v0"]),
        "ppo_randomized": (
            "on_policy", "cartpole_ppo", [*STEPS, "environment.vectorization=sync",
            "environment.randomization={observation_noise: {low: 0, high: .1}, action_delay: [0, 2]}"],
        ),
        "trpo": ("trpo", "cartpole", TRPO),
        "trpo_normalizers": ("trpo", "pendulum", [*TRPO, *NORMALIZED]),
        "trpo_gsde": ("trpo", "pendulum_gsde", [*TRPO, GSDE]),
        "trpo_dual": ("trpo", "cartpole_dual", TRPO),
        "natural_gradient": ("trpo", "cartpole_natural_gradient", TRPO),
    }  # fmt: skip
    for file in sorted((CONFIGS / "policy_gradient").glob("*.yaml")):
        qac = "qac" in file.stem
        found[f"policy_gradient_{file.stem}"] = "policy_gradient", file.stem, STEPS[:3] if qac else PLAIN
    found["qac_sampled"] = "policy_gradient", "cartpole_qac", [*STEPS[:3], "algorithm.next_action=sampled"]
    for name, override in DQN.items():
        found[f"dqn_{name}"] = "off_policy", "dqn_cartpole", [override, *SMALL]
    for name in ("ddpg", "td3", "sac"):
        found[name] = "off_policy", f"{name}_pendulum", SMALL
    found["ddpg_ornstein_uhlenbeck"] = (
        "off_policy", "ddpg_pendulum", [*SMALL, "agent.noise={type: ornstein_uhlenbeck, std: .3}"],
    )  # fmt: skip
    found["sac_gsde"] = "off_policy", "sac_pendulum", [*SMALL, "agent.state_dependent={sample_every: 5}"]
    found["discrete_sac"] = "off_policy", "discrete_sac_cartpole", SMALL
    search = "self_play={games: 6, moves_per_iteration: 9, search: {simulations: 4}}"
    for name in ("tictactoe", "connect_four"):
        found[f"alphazero_{name}"] = "alphazero", name, [
            search, "iterations=4", "learning={updates_per_iteration: 3, batch_size: 16, window: 100}",
            "evaluation.opponents=[{type: random}]", "evaluation.openings=2", "network={channels: 4, layers: 2}",
        ]  # fmt: skip
    for file in sorted((CONFIGS / "tabular").glob("*.yaml")):
        found[f"tabular_{file.stem}"] = "tabular", file.stem, TABULAR
    return found


CASES = cases()


class Stopped(Exception):
    """Raised where a run is to break off."""


def run(case, folder, *more):
    name, config, overrides = CASES[case]
    recipe = import_recipe(find_recipe(name))
    settings = [f"run.directory={folder}", "run.checkpoint_every=1", "run.evaluate_every=0", "run.progress_bar=false"]
    if name not in ("tabular", "alphazero"):
        settings += ["evaluation.episodes=1", "evaluation.max_steps=15"]
    return recipe.main(load_config(recipe.CONFIG, CONFIGS / name / f"{config}.yaml", [*overrides, *settings, *more]))


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one(case, tmp_path, monkeypatch):
    straight = run(case, tmp_path / "straight")
    finish = Run.finish_iteration

    def stop(self, iteration, rollout, metrics, **named):
        finish(self, iteration, rollout, metrics, **named)
        if iteration == 2:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish_iteration", stop)
        if len(list((tmp_path / "straight/checkpoints").glob("iteration_*"))) > 1:
            with pytest.raises(Stopped):
                run(case, tmp_path / "halves")
        else:  # value and policy iteration are one iteration: nothing to break off
            run(case, tmp_path / "halves")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*starts new episodes")
        resumed = run(case, tmp_path / "halves", "run.resume=true")
    assert timeless(resumed) == timeless(straight)
    one, other = (last_checkpoint(tmp_path / folder) for folder in ("straight", "halves"))
    assert one
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def timeless(metrics):
    return {name: value for name, value in metrics.items() if "seconds" not in name and "per_second" not in name}


def last_checkpoint(folder):
    """Every leaf of every file, by its path."""
    last = max((folder / "checkpoints").glob("iteration_*"))
    leaves = {}
    for file in sorted(last.glob("*.pt")):
        leaves |= flattened(torch.load(file, weights_only=True), file.stem)
    return {name: value for name, value in leaves.items() if "seconds" not in name}


def flattened(state, prefix):
    """Leaves of nested containers, tensors as bytes: bitwise equality."""
    if isinstance(state, dict):
        parts = [flattened(value, f"{prefix}.{name}") for name, value in state.items()]
    elif isinstance(state, list | tuple):
        parts = [flattened(value, f"{prefix}.{index}") for index, value in enumerate(state)]
    else:
        return {prefix: state.numpy().tobytes() if isinstance(state, torch.Tensor) else state}
    return {name: leaf for part in parts for name, leaf in part.items()}


def test_no_kind_of_algorithm_is_left_out():
    """Each type or preset that a shipped config names has a case here."""
    covered = {kind_of(*CASES[name][:2]) for name in CASES}
    shipped = {
        kind_of(recipe, file.stem)
        for recipe in ("on_policy", "off_policy", "trpo", "policy_gradient", "tabular", "alphazero")
        for file in (CONFIGS / recipe).glob("*.yaml")
    }
    assert shipped <= covered
    pieces = {field for override in DQN.values() for field in DQNConfig.model_fields if f"{field}:" in override}
    assert {"values", "network", "replay", "target", "double", "n_step", "clip_rewards"} <= pieces


def kind_of(recipe, config):
    settings = yaml.safe_load((CONFIGS / recipe / f"{config}.yaml").read_text())
    part = settings.get("algorithm") or settings.get("agent") or {"type": settings.get("game", "trpo")}
    return recipe, part.get("preset") or part.get("type")
