"""The jaxtyping signatures of the core, checked at run time by beartype in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

PROGRAM = textwrap.dedent(
    """
    from jaxtyping import TypeCheckError, install_import_hook

    names = "advantages aggregation corrections groups kl masking ratios surrogates values".split()
    with install_import_hook([f"rlhf.core.{name}" for name in names], "beartype.beartype"):
        from rlhf.core import advantages, aggregation, corrections, groups, kl, masking, ratios, surrogates, values
    from rlhf.core.algorithm import MaskedWeights, SequenceMean, TruncatedWeights
    from rlhf.core.estimate import estimate
    from rlhf.core.objective import Objective
    from rlhf.core.presets import ALGORITHMS
    from rlhf.core.types import PolicyOutput, Rollout
    import torch

    B, T, A = 4, 3, 5
    x, y, z = torch.randn(3, B, T)
    short, mask, ends = torch.randn(B, T - 1), torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.bool)
    scores, ids = torch.randn(B), torch.tensor([0, 0, 1, 1])
    segment = dict(episode_ends=ends, mask=mask, discount=0.9)

    right = {
        "masked_sum": lambda: masking.masked_sum(x, mask, dim=1),
        "masked_mean": lambda: masking.masked_mean(x, mask),
        "masked_var": lambda: masking.masked_var(x, mask),
        "standardize": lambda: masking.standardize(x, mask),
        "discounted_scan": lambda: advantages.discounted_scan(x, y),
        "gae": lambda: advantages.gae(x, y, next_values=z, gae_lambda=0.9, **segment),
        "next_own_step": lambda: advantages.next_own_step(mask),
        "carry_values": lambda: advantages.carry_values(x, mask, episode_ends=ends, bootstrap=scores),
        "rewards_to_go": lambda: advantages.rewards_to_go(x, next_values=z, **segment),
        "n_step_returns": lambda: advantages.n_step_returns(x, next_values=z, n=2, **segment),
        "group_relative": lambda: advantages.group_relative(scores, ids),
        "leave_one_out": lambda: advantages.leave_one_out(scores, ids),
        "group_statistics": lambda: advantages.group_statistics(scores, ids),
        "length_adaptive_lambda": lambda: advantages.gae(
            x, y, next_values=z, gae_lambda=advantages.length_adaptive_lambda(mask, alpha=0.5), **segment
        ),
        "length_weighted": lambda: groups.length_weighted(scores, ids, mask=mask),
        "best_of_group": lambda: groups.best_of_group(scores, ids),
        "group_relative_parts": lambda: groups.group_relative_parts(x, ids, weights=[1.0] * T),
        "importance_ratio": lambda: ratios.importance_ratio(x, y, mask, level="sequence_geometric_mean"),
        "policy_gradient": lambda: surrogates.policy_gradient(x, y),
        "unclipped": lambda: surrogates.unclipped(x, y),
        "clipped": lambda: surrogates.clipped(x, y, clip_low=0.2, clip_high=0.2),
        "dual_clipped": lambda: surrogates.dual_clipped(x, y, clip_low=0.2, clip_high=0.2, bound=3.0),
        "clipped_weight": lambda: surrogates.clipped_weight(x, y, z, clip_high=4.0),
        "geometric_mean": lambda: surrogates.geometric_mean(x.exp(), y, mask, clip_low=0.4, clip_high=0.4),
        "probability_masked": lambda: surrogates.probability_masked(x.exp(), x, y, z, limit=0.2),
        "soft_gate": lambda: surrogates.soft_gate(x, y, temperature_positive=1.0, temperature_negative=1.05),
        "kl_estimate": lambda: kl.kl_estimate(x, y, estimator="k3_weighted", old_log_probs=z),
        "exact_categorical_kl": lambda: kl.exact_categorical_kl(
            torch.randn(B, T, A).log_softmax(-1), torch.randn(B, T, A).log_softmax(-1)
        ),
        "squared_value_loss": lambda: values.squared_value_loss(x, y),
        "clipped_value_loss": lambda: values.clipped_value_loss(x, y, old_values=z, clip_range=0.2),
        "aggregate": lambda: aggregation.aggregate(x, mask, SequenceMean()),
        "denominator": lambda: aggregation.denominator(mask, SequenceMean()),
        "truncated": lambda: corrections.correction_weights(x, y, mask, correction=TruncatedWeights()),
        "masked": lambda: corrections.correction_weights(x, y, mask, correction=MaskedWeights()),
        "off_policy_rows": lambda: corrections.off_policy_rows(x, y, mask, threshold=0.1),
        "state_weights": lambda: corrections.state_weights(mask, episode_ends=ends, discount=0.9),
    }
    for name, call in right.items():
        call()

    wrong = {
        "masked_sum": lambda: masking.masked_sum(x, mask[:, :1]),
        "standardize": lambda: masking.standardize(x, mask.float()),
        "discounted_scan": lambda: advantages.discounted_scan(x, short),
        "gae": lambda: advantages.gae(x, y, next_values=short, gae_lambda=0.9, **segment),
        "gae with a mask of numbers": lambda: advantages.gae(
            x, y, next_values=z, gae_lambda=0.9, **(segment | {"mask": mask.float()})
        ),
        "gae on a flat row": lambda: advantages.gae(
            x[0], y[0], next_values=z[0], gae_lambda=0.9, episode_ends=ends[0], mask=mask[0], discount=0.9
        ),
        "carry_values": lambda: advantages.carry_values(x, mask, episode_ends=ends, bootstrap=torch.zeros(B + 1)),
        "rewards_to_go": lambda: advantages.rewards_to_go(x, next_values=short, **segment),
        "n_step_returns": lambda: advantages.n_step_returns(short, next_values=z, n=2, **segment),
        "group_relative": lambda: advantages.group_relative(scores, ids[:3]),
        "group_relative on [B, T]": lambda: advantages.group_relative(x, ids),
        "group_relative with float ids": lambda: advantages.group_relative(scores, ids.float()),
        "group_relative with another scale": lambda: advantages.group_relative(scores, ids, scale="group"),
        "leave_one_out": lambda: advantages.leave_one_out(x[:, 0], ids[:1]),
        "importance_ratio": lambda: ratios.importance_ratio(x, scores.unsqueeze(1), mask),
        "importance_ratio at another level": lambda: ratios.importance_ratio(x, y, mask, level="sequence"),
        "policy_gradient": lambda: surrogates.policy_gradient(x, scores.unsqueeze(1)),
        "clipped": lambda: surrogates.clipped(x, short, clip_low=0.2, clip_high=0.2),
        "clipped_weight": lambda: surrogates.clipped_weight(x, y, short, clip_high=4.0),
        "kl_estimate": lambda: kl.kl_estimate(x, short, estimator="k3"),
        "kl_estimate of another kind": lambda: kl.kl_estimate(x, y, estimator="k4"),
        "squared_value_loss": lambda: values.squared_value_loss(x.unsqueeze(-1), y),
        "clipped_value_loss": lambda: values.clipped_value_loss(x, y, old_values=short, clip_range=0.2),
        "aggregate": lambda: aggregation.aggregate(x, mask[:1], SequenceMean()),
        "length_weighted": lambda: groups.length_weighted(scores, ids, mask=mask[:1]),
        "best_of_group": lambda: groups.best_of_group(x, ids),
        "geometric_mean": lambda: surrogates.geometric_mean(x, y, short > 0, clip_low=0.4, clip_high=0.4),
        "correction_weights": lambda: corrections.correction_weights(x, short, mask, correction=TruncatedWeights()),
    }
    for name, call in wrong.items():
        try:
            call()
        except TypeCheckError:
            continue
        raise SystemExit(f"{name} took a wrong shape or type")

    # The whole path of every preset, under the same checks.
    for algorithm in ALGORITHMS.values():
        algorithm = algorithm.with_length(T)
        rollout = Rollout(
            inputs={}, actions=torch.zeros(B, T, dtype=torch.int64), action_mask=mask, rewards=x.abs(), old_log_probs=y,
            episode_ends=ends, values=z, ref_log_probs=y + 0.1, sampling_log_probs=y, group_ids=ids,
            baselines=scores, reward_parts=x[:, :2], part_weights=(1.0, 2.0),
        )
        experience = estimate(rollout, algorithm, kl_coef=0.1)
        objective = Objective(algorithm)
        objective.loss(objective(PolicyOutput(y, z, x), experience, kl_coef=0.1), objective.denominators(mask))
    print(len(right), len(wrong), "checked")
    """
)


def test_formulas_take_right_shapes_and_refuse_wrong_ones():
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout
    assert result.stdout.strip() == "36 28 checked"
