"""Defects seen in other libraries: where the test stands that each is not here, and the tests that stood nowhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.core.advantages import gae, group_relative
from rlhf.core.algorithm import AlgorithmConfig, ClippedWeight, Gae, GroupRelative
from rlhf.core.estimate import estimate
from rlhf.core.kl import kl_estimate
from rlhf.core.objective import Objective
from rlhf.core.presets import ALGORITHMS
from rlhf.core.ratios import importance_ratio
from rlhf.core.surrogates import clipped_weight
from rlhf.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
DEFECTS = [
    # what was seen where, file, test
    (
        "OpenRLHF: `seq-mask-tis` multiplies the token's ratio under a sequence's mask",
        "tests/core/test_corrections.py",
        "test_weights_by_hand",
    ),
    (
        "OpenRLHF: reward head with standard deviation 1/(h+1) in place of 1/sqrt(h+1)",
        "tests/reward_models/test_model.py",
        "test_head_starts_from_the_stated_distribution",
    ),
    (
        "verl: a group of one gets its raw score as advantage",
        "tests/core/test_defects_of_others.py",
        "test_a_group_of_one_is_refused",
    ),
    (
        "verl: k3 clamped to +-10 has no gradient beyond",
        "tests/core/test_defects_of_others.py",
        "test_a_large_drift_keeps_its_gradient",
    ),
    (
        "NeMo-RL: leave-one-out std of a group of two is 0/0, silently unscaled",
        "tests/core/test_defects_of_others.py",
        "test_a_pair_is_scaled_by_its_own_std",
    ),
    (
        "NeMo-RL: another std for each completion of a group of more than two",
        "tests/core/test_defects_of_others.py",
        "test_a_group_has_one_std",
    ),
    (
        "OpenRLHF: gspo's ratio meets the mask before the clamp",
        "tests/core/test_defects_of_others.py",
        "test_a_masked_ratio_is_no_ratio",
    ),
    (
        "TRL: cispo's `epsilon_high` is an absolute cap, and unset clamps every ratio to .2",
        "tests/core/test_defects_of_others.py",
        "test_cispo_caps_above_one",
    ),
    (
        "slime, verl, NeMo: cispo with a lower bound",
        "tests/core/test_defects_of_others.py",
        "test_cispo_has_no_lower_bound",
    ),
    (
        "prime-rl, open-instruct: tables in the docs that the code does not follow",
        "tests/test_readme.py",
        "test_the_table_of_algorithms_is_the_codes",
    ),
    (
        "the same: defaults that differ from the papers'",
        "tests/core/test_presets.py",
        "test_a_preset_is_its_row_of_the_table",
    ),
    (
        "DeepSpeed-Chat: no advantage whitening; constants in the code",
        "tests/core/test_defects_of_others.py",
        "test_ppo_for_language_models_whitens_over_the_batch",
    ),
    (
        "DeepSpeed-Chat: rollouts without sampling",
        "tests/lm/test_collector.py",
        "test_greedy_rollouts_are_refused",
    ),
    (
        "KL in the loss by k1, whose gradient is 0",
        "tests/core/test_defects_of_others.py",
        "test_k1_in_the_loss_is_refused",
    ),
    (
        "reward on padding (trl#3750)",
        "tests/lm/test_collector.py",
        "test_the_score_sits_on_the_end_token_and_never_on_padding",
    ),
    (
        "group ids from equal text or shuffled rows (Search-R1#88)",
        "tests/core/test_defects_of_others.py",
        "test_groups_follow_ids_not_rows",
    ),
    (
        "gradient divided by accumulation steps again (ms-swift#10117)",
        "tests/core/test_properties.py",
        "test_any_split_into_microbatches_gives_the_same_gradient",
    ),
    ("whitened rewards without their mean", "tests/core/test_groups.py", "test_whitened_rewards_keep_their_mean"),
    (
        "returns from whitened advantages",
        "tests/core/test_defects_of_others.py",
        "test_returns_are_made_before_whitening",
    ),
    (
        "bootstrap with replacement for pass@k is biased low (.414 for .5)",
        "tests/lm/test_answer_statistics.py",
        "test_pass_at_k",
    ),
    (
        "math-verify off the main thread: silent zeros (verl#5635)",
        "tests/rewards/test_boxed_math.py",
        "test_it_works_off_the_main_thread",
    ),
    (
        "math-verify that hangs (Math-Verify#65)",
        "tests/rewards/test_boxed_math.py",
        "test_a_hostile_expression_is_killed_and_the_next_one_judged",
    ),
    (
        "TRL, trap 1: after SFT a deep-copied reference follows the live weights",
        "tests/recipes/test_language_recipes.py",
        "test_reference_kl_is_not_zero_after_an_update",
    ),
    (
        "trap 2: the reward model is trained with an end token and scores without",
        "tests/reward_models/test_scorer.py",
        "test_score_is_transformers_own_logit_of_prompt_completion_end",
    ),
    (
        "trap 3: `LoraConfig()` without a task type freezes and forgets the reward head",
        "tests/reward_models/test_model.py",
        "test_lora_trains_and_saves_the_head",
    ),
    (
        "trap 4: a reference that is loaded again by the model's name",
        "tests/lm/test_reference.py",
        "test_adapters_off_is_the_reference_of_a_lora_policy",
    ),
    (
        "trap 5: resume exact only in special cases",
        "tests/recipes/test_language_recipes.py",
        "test_resume_goes_on_exactly",
    ),
    (
        "trap 8: the head runs over every position",
        "tests/lm/test_log_probs.py",
        "test_only_a_chunk_of_positions_ever_meets_the_head",
    ),
    ("trap 9: as TRL's cispo above", "tests/core/test_defects_of_others.py", "test_cispo_caps_above_one"),
    (
        "trap 10: the last token found by the pad id",
        "tests/reward_models/test_model.py",
        "test_pad_token_equal_to_the_end_token_reads_the_end_token",
    ),
    (
        "trap 11: transformers' Trainer divides RL losses",
        "tests/core/test_properties.py",
        "test_any_split_into_microbatches_gives_the_same_gradient",
    ),
    (
        "trap 12: a set's order pairs different keys on different ranks",
        "tests/core/test_defects_of_others.py",
        "test_metric_names_have_one_order",
    ),
    (
        "trap 13: NEXT_STEP autoreset",
        "tests/classic_rl/test_collector.py",
        "test_reset_steps_of_next_step_autoreset_are_masked",
    ),
]


@pytest.mark.parametrize(("defect", "path", "name"), DEFECTS, ids=[row[0][:50] for row in DEFECTS])
def test_every_defect_has_its_test(defect, path, name):
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")


def test_a_group_of_one_is_refused():
    with pytest.raises(ConfigError, match="a group of one completion has nothing to be compared with"):
        group_relative(torch.tensor([0.7, 1.0, 0.0]), torch.tensor([0, 1, 1]))


def test_a_large_drift_keeps_its_gradient():
    """d k3 / d log pi = 1 - exp(-d): at d = -12 it is 1 - e^12, and verl's clamp at 10 would make it 0."""
    log_probs = torch.tensor([[-12.0]], dtype=torch.float64, requires_grad=True)
    kl_estimate(log_probs, torch.zeros(1, 1, dtype=torch.float64), estimator="k3").sum().backward()
    assert log_probs.grad.item() == pytest.approx(1 - 2.718281828459045**12)


def test_a_pair_is_scaled_by_its_own_std():
    # Scores 0 and 4: deviations +-2, sample std 2.8284: +-.7071. Unscaled it would be +-2, NaN where 0/0 leaks.
    advantages = group_relative(torch.tensor([4.0, 0.0]), torch.tensor([0, 0]), epsilon=0.0)
    assert advantages.tolist() == pytest.approx([0.70710678, -0.70710678])


def test_a_group_has_one_std():
    """Scores 0, 1, 5: mean 2, sample std sqrt((4 + 1 + 9) / 2) = sqrt 7 for every member.

    Leave-one-out stds would be 2.83, 3.54 and .71, so that the worst of the three would count for less.
    """
    advantages = group_relative(torch.tensor([0.0, 1.0, 5.0]), torch.tensor([3, 3, 3]), epsilon=0.0)
    assert advantages.tolist() == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5])


def test_a_masked_ratio_is_no_ratio():
    """exp(mean log ratio) over the two actions that count, .5 and -.1; what is masked would be e^30, or e^-30."""
    log_probs = torch.tensor([[0.5, 30.0, -0.1, -30.0]], requires_grad=True)
    mask = torch.tensor([[True, False, True, False]])
    ratio = importance_ratio(log_probs, torch.zeros(1, 4), mask, level="sequence_geometric_mean")
    assert ratio[mask].tolist() == pytest.approx([2.718281828459045**0.2] * 2)
    ratio[mask].sum().backward()
    assert log_probs.grad[~mask].tolist() == [0.0, 0.0]


def test_cispo_caps_above_one():
    """A ratio of 1 must pass: the cap is 1 + clip_high for every setting that can be written."""
    one = torch.ones(1, 1)
    for clip_high in (0.0, 0.2, ClippedWeight().clip_high):
        assert clipped_weight(one, one, one, clip_high=clip_high).item() == 1.0
    assert 1 + ALGORITHMS["cispo"].surrogate.clip_high == 5.0  # ScaleRL's absolute 5


def test_cispo_has_no_lower_bound():
    small = torch.full((1, 1), 0.01)
    assert clipped_weight(small, torch.ones(1, 1), torch.ones(1, 1), clip_high=0.2).item() == pytest.approx(0.01)


def test_ppo_for_language_models_whitens_over_the_batch(make_batch):
    assert ALGORITHMS["ppo_rlhf"].advantages.standardize == "batch"
    rollout = make_batch(0).rollout
    experience = estimate(rollout, ALGORITHMS["ppo_rlhf"], kl_coef=0.1)
    own = experience.advantages[experience.action_mask]
    assert own.mean().item() == pytest.approx(0.0, abs=1e-9)
    assert own.std(correction=0).item() == pytest.approx(1.0, abs=1e-6)


def test_k1_in_the_loss_is_refused():
    with pytest.raises(ValueError, match="expected gradient of 0"):
        AlgorithmConfig.model_validate(
            {"advantages": {"type": "leave_one_out"}, "kl": {"type": "in_loss", "estimator": "k1"}}
        )


def test_groups_follow_ids_not_rows(make_batch):
    """Rows of a group may lie anywhere: shuffled rows get the shuffled advantages."""
    rollout = make_batch(1, rows=6).rollout
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    columns = {key: value[order] for key, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
    shuffled = replace(rollout, inputs={"row": rollout.inputs["row"][order]}, **columns)
    for name in ("grpo", "rloo", "opo", "grpo_pass_at_k", "gdpo"):
        straight = estimate(rollout, ALGORITHMS[name], kl_coef=0.1).advantages
        assert torch.allclose(estimate(shuffled, ALGORITHMS[name], kl_coef=0.1).advantages, straight[order]), name


def test_returns_are_made_before_whitening(make_batch):
    """A return is the plain GAE plus the value; from whitened advantages the critic would learn something else."""
    rollout = make_batch(2).rollout
    algorithm = ALGORITHMS["ppo_rlhf"].model_copy(update={"kl": ALGORITHMS["dapo"].kl})
    axis = algorithm.advantages
    assert isinstance(axis, Gae)
    experience = estimate(rollout, algorithm)
    following = torch.cat([rollout.values[:, 1:], torch.zeros(4, 1, dtype=torch.float64)], dim=1)
    plain, _ = gae(
        rollout.rewards,
        rollout.values,
        next_values=torch.where(rollout.episode_ends, 0.0, following),
        episode_ends=rollout.episode_ends,
        mask=rollout.action_mask,
        discount=axis.discount,
        gae_lambda=axis.gae_lambda,
    )
    expected = torch.where(rollout.action_mask, plain + rollout.values, 0.0)
    assert torch.allclose(experience.returns, expected)


def test_the_pad_token_is_not_looked_at(make_batch):
    """Masks come from lengths: a row's own last token repeated behind its end is no matter."""
    rollout = make_batch(3).rollout
    last = rollout.actions.gather(1, (rollout.action_mask.sum(1, keepdim=True) - 1).clamp(min=0))
    padded = replace(rollout, actions=torch.where(rollout.action_mask, rollout.actions, last))
    for name in ("grpo", "ppo_rlhf"):
        ours, theirs = (estimate(r, ALGORITHMS[name], kl_coef=0.1).advantages for r in (rollout, padded))
        assert torch.equal(ours, theirs)


def test_metric_names_have_one_order():
    """Metric sums cross processes as one tensor: their names are a tuple, equal wherever it is made."""
    algorithm = AlgorithmConfig(advantages=GroupRelative(), off_policy_threshold=0.1)
    names = Objective(algorithm).metric_names
    assert isinstance(names, tuple)
    assert names == Objective(algorithm).metric_names
    assert names[:4] == ("policy_loss", "entropy", "ratio", "approx_kl")
