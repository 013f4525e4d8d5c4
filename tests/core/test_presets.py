"""The table of algorithms, row by row, as literals."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from rlhf.config import load_config
from rlhf.core.algorithm import AlgorithmConfig
from rlhf.core.presets import ALGORITHMS, AlgorithmChoice, resolve_algorithm
from rlhf.errors import ConfigError

CLIP_20 = {"type": "clipped", "clip_low": 0.2, "clip_high": 0.2}
PLAIN = {"type": "policy_gradient"}
GROUP_STD = {
    "type": "group_relative",
    "baseline": "mean",
    "scale": "sample_std",
    "epsilon": 1e-4,
    "standardize": "none",
}
NO_KL = {"type": "none"}


def gae(discount, gae_lambda, standardize, *, length_adaptive=None, critic_lambda=None):
    lambdas = {"gae_lambda": gae_lambda, "length_adaptive": length_adaptive, "critic_lambda": critic_lambda}
    return {"type": "gae", "discount": discount, "standardize": standardize, **lambdas}


def to_go(discount, standardize):
    return {"type": "rewards_to_go", "discount": discount, "baseline": "none", "standardize": standardize}


def k1_in_reward(value):
    return {"type": "in_reward", "estimator": "k1", "coefficient": {"type": "fixed", "value": value}}


TABLE = {
    # preset: advantages, ratio, surrogate, kl, aggregation, value loss, epochs, minibatches
    "reinforce": (to_go(0.99, "none"), "token", PLAIN, NO_KL, "token_mean", None, 1, 1),
    "a2c": (gae(0.99, 1.0, "none"), "token", PLAIN, NO_KL, "token_mean", "squared", 1, 1),
    "ppo": (gae(0.99, 0.95, "minibatch"), "token", CLIP_20, NO_KL, "token_mean", "clipped", 4, 4),
    "ppo_kl": (
        gae(0.99, 0.95, "minibatch"),
        "token",
        {"type": "unclipped"},
        # PPO paper, section 4 and table 1: KL(old || policy), beta 1, target .01.
        {
            "type": "in_loss",
            "estimator": "k3",
            "against": "old_policy",
            "coefficient": {"type": "adaptive", "initial": 1.0, "target": 0.01, "unit": "token"},
        },
        "token_mean",
        "squared",
        4,
        4,
    ),
    "ppo_rlhf": (gae(1.0, 0.95, "batch"), "token", CLIP_20, k1_in_reward(0.05), "token_mean", "clipped", 4, 1),
    "rloo": ({"type": "leave_one_out"}, "token", PLAIN, k1_in_reward(0.05), "sequence_sum", None, 1, 1),
    "reinforce++": (to_go(1.0, "batch"), "token", CLIP_20, k1_in_reward(0.01), "token_mean", None, 1, 1),
    "grpo": (
        GROUP_STD,
        "token",
        CLIP_20,
        {
            "type": "in_loss",
            "estimator": "k3",
            "against": "reference",
            "coefficient": {"type": "fixed", "value": 0.04},
        },
        "sequence_mean",
        None,
        1,
        1,
    ),
    "dr_grpo": (GROUP_STD | {"scale": "none"}, "token", CLIP_20, NO_KL, "fixed_length", None, 1, 1),
    "dapo": (GROUP_STD, "token", CLIP_20 | {"clip_high": 0.28}, NO_KL, "token_mean", None, 1, 16),
    "gspo": (
        GROUP_STD,
        "sequence_geometric_mean",
        {"type": "clipped", "clip_low": 3e-4, "clip_high": 4e-4},
        NO_KL,
        "sequence_mean",
        None,
        1,
        4,
    ),
    # ScaleRL's cap: a weight of at most 5 = 1 + 4.
    "cispo": (GROUP_STD, "token", {"type": "clipped_weight", "clip_high": 4.0}, NO_KL, "token_mean", None, 1, 1),
    "gspo_token": (
        GROUP_STD,
        "sequence_geometric_mean_token",
        {"type": "clipped", "clip_low": 3e-4, "clip_high": 4e-4},
        NO_KL,
        "sequence_mean",
        None,
        1,
        4,
    ),
    "gmpo": (
        GROUP_STD,
        "token",
        {"type": "geometric_mean", "clip_low": 0.4, "clip_high": 0.4},
        NO_KL,
        "sequence_mean",
        None,
        1,
        4,
    ),
    "dppo": (GROUP_STD, "token", {"type": "probability_mask", "limit": 0.2}, NO_KL, "token_mean", None, 1, 4),
    "sapo": (
        GROUP_STD,
        "token",
        {"type": "soft_gate", "temperature_positive": 1.0, "temperature_negative": 1.05},
        NO_KL,
        "sequence_mean",
        None,
        1,
        4,
    ),
    "opo": (
        GROUP_STD | {"baseline": "length_weighted", "scale": "none"},
        "token",
        PLAIN,
        NO_KL,
        "sequence_sum",
        None,
        1,
        1,
    ),
    "maxrl": (GROUP_STD | {"scale": "mean", "epsilon": 1e-6}, "token", PLAIN, NO_KL, "sequence_sum", None, 1, 1),
    "lite_ppo": (GROUP_STD | {"scale": "batch_std"}, "token", CLIP_20, NO_KL, "token_mean", None, 1, 1),
    "grpo_pass_at_k": ({"type": "best_of_group"}, "token", CLIP_20, NO_KL, "sequence_mean", None, 1, 1),
    "reinforce++_baseline": (
        GROUP_STD | {"scale": "none", "standardize": "batch"},
        "token",
        CLIP_20,
        {
            "type": "in_loss",
            "estimator": "k2",
            "against": "reference",
            "coefficient": {"type": "fixed", "value": 0.01},
        },
        "token_mean",
        None,
        1,
        1,
    ),
    "vapo": (
        gae(1.0, 0.95, "batch", length_adaptive=0.05, critic_lambda=1.0),
        "token",
        CLIP_20 | {"clip_high": 0.28},
        NO_KL,
        "token_mean",
        "clipped",
        1,
        16,
    ),
    "remax": ({"type": "greedy_baseline"}, "token", PLAIN, k1_in_reward(0.05), "sequence_sum", None, 1, 1),
    "gdpo": (
        {"type": "group_relative_parts", "epsilon": 1e-4},
        "token",
        CLIP_20,
        NO_KL,
        "sequence_mean",
        None,
        1,
        1,
    ),
    "decoupled_ppo": (gae(1.0, 1.0, "batch"), "token", CLIP_20, NO_KL, "token_mean", "clipped", 1, 4),
}


def test_the_table_names_every_preset():
    assert list(ALGORITHMS) == list(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_its_row_of_the_table(name):
    advantages, ratio, surrogate, kl, aggregation, value_loss, epochs, minibatches = TABLE[name]
    row = ALGORITHMS[name].model_dump()
    assert row["advantages"] == advantages
    assert row["ratio"] == ratio
    assert row["surrogate"] == surrogate
    assert row["kl"] == kl
    assert row["aggregation"]["type"] == aggregation
    assert (row["value_loss"] or {}).get("type") == value_loss
    assert (row["epochs"], row["minibatches"]) == (epochs, minibatches)
    assert row["entropy_coef"] == 0.0
    correction = {"type": "truncated", "cap": 5.0, "level": "token"} if name == "decoupled_ppo" else None
    assert row["rollout_correction"] == correction
    assert (row["off_policy_threshold"], row["advantage_clip"], row["adaptive_entropy"]) == (None, None, None)
    assert not row["whiten_rewards"]
    assert not row["discounted_state_weight"]


def test_the_rows_that_only_language_models_can_run_say_why():
    reasons = {name: row.language_only for name, row in ALGORITHMS.items() if row.language_only}
    assert set(reasons) == {"remax", "gdpo", "decoupled_ppo"}
    assert "greedy" in reasons["remax"]
    assert "parts" in reasons["gdpo"]
    assert "engine" in reasons["decoupled_ppo"]


def test_value_loss_coefficients():
    # .5 beside a shared or small network; .1 in RLHF (SPEC section 1).
    coefficients = {name: row.value_loss.coefficient for name, row in ALGORITHMS.items() if row.value_loss}
    assert coefficients == {"a2c": 0.5, "ppo": 0.5, "ppo_kl": 0.5, "ppo_rlhf": 0.1, "vapo": 0.5, "decoupled_ppo": 0.5}
    assert ALGORITHMS["ppo"].value_loss.clip_range == ALGORITHMS["ppo_rlhf"].value_loss.clip_range == 0.2


class Settings(BaseModel):
    algorithm: AlgorithmChoice


def choose(value) -> AlgorithmConfig:
    return Settings.model_validate({"algorithm": value}).algorithm


def test_a_name_stands_for_its_row():
    assert choose("gspo") == ALGORITHMS["gspo"]
    assert choose(ALGORITHMS["gspo"]) == ALGORITHMS["gspo"]
    assert choose(ALGORITHMS["gspo"].model_dump()) == ALGORITHMS["gspo"]


def test_changes_replace_single_keys_however_deep():
    changed = choose({"preset": "grpo", "epochs": 2, "kl": {"coefficient": {"value": 0.1}}}).model_dump()
    expected = ALGORITHMS["grpo"].model_dump()
    expected["epochs"] = 2
    expected["kl"]["coefficient"]["value"] = 0.1
    assert changed == expected


def test_another_type_replaces_the_whole_group():
    changed = choose({"preset": "ppo", "surrogate": {"type": "dual_clipped", "bound": 5}, "kl": {"type": "in_reward"}})
    assert changed.surrogate.model_dump() == {"type": "dual_clipped", "clip_low": 0.2, "clip_high": 0.2, "bound": 5.0}
    assert changed.kl.type == "in_reward"
    same_type = choose({"preset": "dapo", "surrogate": {"type": "clipped", "clip_low": 0.1}})
    assert (same_type.surrogate.clip_low, same_type.surrogate.clip_high) == (0.1, 0.28)


def test_a_part_can_be_taken_away_and_added():
    without = choose({"preset": "a2c", "advantages": {"type": "rewards_to_go"}, "value_loss": None})
    assert without.value_loss is None
    with_critic = choose(
        {"preset": "reinforce", "advantages": {"baseline": "value"}, "value_loss": {"type": "squared"}}
    )
    assert with_critic.value_loss.type == "squared"


def test_the_table_itself_stays_untouched():
    before = {name: row.model_dump() for name, row in ALGORITHMS.items()}
    choose({"preset": "grpo", "kl": {"coefficient": {"value": 9.0}}})
    assert {name: row.model_dump() for name, row in ALGORITHMS.items()} == before


def test_an_unknown_preset_names_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"no algorithm named 'grop'; did you mean 'grpo'\?.*reinforce, a2c"):
        resolve_algorithm("grop")
    with pytest.raises(ValueError, match="no algorithm named 'xyzzy'; there are"):
        resolve_algorithm({"preset": "xyzzy"})


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"epochs": {"count": 2}}, "epochs"),
        ({"surrogate": "dual_clipped"}, "surrogate"),
        ({"ratio": {"type": "token"}}, "ratio"),
        ({"value_loss": {"coefficient": 0.1}}, "value_loss"),
        ({"epoch": 2}, "epoch"),
        ({"surrogate": {"clip_hi": 0.3}}, "clip_hi"),
    ],
)
def test_changes_of_the_wrong_shape_are_user_errors(changes, where, tmp_path):
    from rlhf.config import Config

    class Recipe(Config):
        algorithm: AlgorithmChoice

    path = tmp_path / "run.yaml"
    lines = ["algorithm:", "  preset: grpo", *(f"  {key}: {change!r}" for key, change in changes.items())]
    path.write_text("\n".join(lines).replace("'", '"'))
    with pytest.raises(ConfigError, match=where):
        load_config(Recipe, path)
