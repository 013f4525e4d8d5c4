"""OPO, pass@k, MaxRL, GDPO, ReMax, VAPO's lambdas: from arithmetic, enumeration and numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.core.advantages import gae, group_relative, length_adaptive_lambda
from rlhf.core.algorithm import AlgorithmConfig, Gae, KlInReward, PolicyGradient, RewardsToGo, SquaredValueLoss
from rlhf.core.estimate import estimate
from rlhf.core.groups import best_of_group, group_relative_parts, length_weighted
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError

NAN = float("nan")
IDS = torch.tensor([0, 0, 1, 1])


def mask_of(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def test_the_length_weighted_baseline_by_hand():
    # Group 0: (1 x 0 + 3 x 1) / 4 = .75. Group 1: equal lengths, the plain mean 3.
    advantages = length_weighted(torch.tensor([0.0, 1.0, 2.0, 4.0]), IDS, mask=mask_of(1, 3, 2, 2))
    assert advantages.tolist() == [-0.75, 0.25, -1.0, 1.0]


@given(
    scores=st.lists(st.integers(-5, 5), min_size=4, max_size=4),
    lengths=st.lists(st.integers(1, 9), min_size=4, max_size=4),
)
def test_the_length_weighted_baseline_has_the_least_weighted_variance(scores, lengths):
    """sum l_i (r_i - b)^2 is least at OPO's b, hence no larger than at any b of a grid."""
    rewards, weights = np.array(scores, dtype=float), np.array(lengths, dtype=float)
    advantages = length_weighted(torch.tensor(rewards), torch.zeros(4, dtype=torch.int64), mask=mask_of(*lengths))
    least = min((weights * (rewards - b) ** 2).sum() for b in np.linspace(-5, 5, 201))
    assert (weights * advantages.numpy() ** 2).sum() <= least + 1e-9


def test_equal_scores_have_no_length_weighted_advantage_at_all():
    scores = torch.tensor([0.1, 0.1, 0.1, 0.7])
    assert length_weighted(scores, IDS, mask=mask_of(1, 7, 3, 5))[:2].tolist() == [0.0, 0.0]
    empty = torch.zeros(4, 3, dtype=torch.bool)
    assert length_weighted(scores, IDS, mask=empty).isfinite().all()


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_the_best_of_a_group_gets_what_it_adds_to_the_maximum(scores):
    """max over all minus max over the others, for every row, by enumeration; groups interleaved."""
    ids = torch.tensor([0, 1, 0, 1, 0, 1])
    expected = []
    for row, score in enumerate(scores):
        others = [scores[j] for j in range(6) if j % 2 == row % 2 and j != row]
        expected.append(float(max([*others, score]) - max(others)))
    assert best_of_group(torch.tensor(scores, dtype=torch.float32), ids).tolist() == expected


def test_maxrl_weighs_a_prompt_by_one_over_its_success_rate():
    # Success 1/4: (1 - .25) / .25 = 3 and -1. Success 3/4: 1/3 and -1. No success: exactly 0.
    scores = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    ids = torch.arange(12) // 4
    advantages = group_relative(scores, ids, scale="mean", epsilon=0.0)
    assert advantages.tolist() == pytest.approx([3, -1, -1, -1, 1 / 3, 1 / 3, 1 / 3, -1, 0, 0, 0, 0])
    with pytest.raises(ConfigError, match=r"not negative.*got 'a score of -1'.*sample_std"):
        group_relative(scores - 1, ids, scale="mean")


def test_parts_are_scaled_by_themselves_then_over_the_batch():
    parts = np.array([[1.0, 10.0], [0.0, 30.0], [0.0, 0.0], [0.0, 5.0]])
    summed = np.zeros(4)
    for column, weight in zip(parts.T, (2.0, 0.5), strict=True):
        for group in (slice(0, 2), slice(2, 4)):
            deviation = column[group] - column[group].mean()
            summed[group] += weight * deviation / (column[group].std(ddof=1) + 1e-4)
    expected = (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4)
    advantages = group_relative_parts(torch.tensor(parts), IDS, weights=[2.0, 0.5])
    assert advantages.numpy() == pytest.approx(expected)


def test_parts_keep_apart_what_a_sum_makes_equal():
    """The paper's motivation: (1, 0) and (0, 1) sum to the same score, but the second part has two right answers."""
    parts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    one = torch.zeros(4, dtype=torch.int64)
    assert group_relative(parts.sum(1), one)[0] == group_relative(parts.sum(1), one)[1]
    apart = group_relative_parts(parts, one, weights=[1.0, 1.0])
    assert apart[0] > apart[1] + 0.1
    assert apart[1] == apart[2]


def test_a_part_that_does_not_apply_counts_as_average():
    parts = torch.tensor([[1.0, NAN], [0.0, NAN], [1.0, 3.0], [0.0, 1.0]])
    advantages = group_relative_parts(parts, IDS, weights=[1.0, 1.0], epsilon=0.0)
    # Sums: +-.7071 in group 0, +-1.4142 in group 1; mean 0, sample variance (2 x .5 + 2 x 2) / 3 = 5/3.
    expected = np.array([0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)]) / (5 / 3) ** 0.5
    assert advantages.numpy() == pytest.approx(expected)
    alone = torch.tensor([[NAN], [2.0], [1.0], [0.0]])  # one row of group 0 has nobody to be compared with
    assert group_relative_parts(alone, IDS, weights=[1.0])[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("length", "expected"), [(100, 0.8), (40, 0.5), (20, 0.0), (5, 0.0)])
def test_length_adaptive_lambda(length, expected):
    """VAPO, alpha .05: 1 - 1 / (.05 x 100) = .8; rows shorter than 1 / alpha have 0 and not less."""
    assert length_adaptive_lambda(mask_of(length), alpha=0.05).item() == pytest.approx(expected)


def test_a_lambda_per_row_is_each_rows_own(make_batch):
    rollout = make_batch(1).rollout
    rows = {"next_values": rollout.values, "episode_ends": rollout.episode_ends, "mask": rollout.action_mask}
    rows["discount"] = 0.9
    lambdas = torch.tensor([[0.0], [0.3], [0.7], [1.0]], dtype=torch.float64)
    together = gae(rollout.rewards, rollout.values, gae_lambda=lambdas, **rows)[0]
    for row, value in enumerate(lambdas.flatten().tolist()):
        alone = gae(rollout.rewards, rollout.values, gae_lambda=value, **rows)[0]
        assert torch.equal(together[row], alone[row])


def test_a_critic_lambda_of_one_learns_from_plain_returns(make_batch):
    rollout = make_batch(2).rollout
    axis = Gae(discount=1.0, gae_lambda=0.3, critic_lambda=1.0)
    algorithm = AlgorithmConfig(advantages=axis, value_loss=SquaredValueLoss())
    experience = estimate(rollout, algorithm)
    totals = rollout.rewards.sum(dim=1, keepdim=True).expand_as(rollout.rewards)  # the one reward is the last
    assert torch.allclose(experience.returns, torch.where(rollout.action_mask, totals, 0.0))
    plain = estimate(rollout, algorithm.model_copy(update={"advantages": Gae(discount=1.0, gae_lambda=0.3)}))
    assert torch.equal(experience.advantages, plain.advantages)
    assert not torch.allclose(plain.returns, experience.returns)


def test_remax_takes_the_greedy_score_away(make_batch):
    rollout = make_batch(3).rollout
    algorithm = ALGORITHMS["remax"].model_copy(update={"kl": KlInReward()})
    advantages = estimate(rollout, algorithm, kl_coef=0.0).advantages
    expected = (rollout.scores - rollout.baselines).unsqueeze(1).expand_as(advantages)
    assert torch.allclose(advantages, torch.where(rollout.action_mask, expected, 0.0))
    # A KL in the reward counts from each action on.
    with_kl = estimate(rollout, algorithm, kl_coef=0.5).advantages
    penalty = torch.where(rollout.action_mask, rollout.old_log_probs - rollout.ref_log_probs, 0.0)
    ahead = penalty.flip(1).cumsum(1).flip(1)
    assert torch.allclose(with_kl, torch.where(rollout.action_mask, advantages - 0.5 * ahead, 0.0))


@pytest.mark.parametrize(("name", "missing"), [("remax", "baselines"), ("gdpo", "reward_parts")])
def test_what_only_a_prompt_collector_has_is_named(name, missing, make_batch):
    with pytest.raises(ConfigError, match=f"the algorithm needs {missing}, which the rollout lacks"):
        estimate(replace(make_batch(0).rollout, **{missing: None}), ALGORITHMS[name])


def test_whitened_rewards_keep_their_mean(make_batch):
    # Rewards 0 and 4 of a row of two actions: mean 2, std 2, so (0 - 2) / 2 + 2 = 1 and 3; to go: 4 and 3.
    rollout = make_batch(0, rows=1, steps=2).rollout
    rollout = replace(rollout, rewards=torch.tensor([[0.0, 4.0]], dtype=torch.float64))
    algorithm = AlgorithmConfig(advantages=RewardsToGo(discount=1.0), surrogate=PolicyGradient(), whiten_rewards=True)
    assert estimate(rollout, algorithm).advantages.flatten().tolist() == pytest.approx([4.0, 3.0])


def test_reinforce_plus_plus_baseline_is_centred_by_group_then_whitened_over_actions(make_batch):
    rollout = make_batch(4, rows=6).rollout
    advantages = estimate(rollout, ALGORITHMS["reinforce++_baseline"]).advantages
    scores = rollout.scores.numpy()
    centred = scores - scores.reshape(3, 2).mean(axis=1).repeat(2)
    by_action = np.repeat(centred, rollout.action_mask.sum(1).numpy())
    expected = (by_action - by_action.mean()) / np.sqrt(by_action.var() + 1e-8)
    assert advantages[rollout.action_mask].numpy() == pytest.approx(expected)


def test_lite_ppo_divides_by_the_standard_deviation_of_all_scores(make_batch):
    rollout = make_batch(5, rows=6).rollout
    scores = rollout.scores.numpy()
    centred = scores - scores.reshape(3, 2).mean(axis=1).repeat(2)
    expected = centred / (scores.std(ddof=1) + 1e-4)
    assert estimate(rollout, ALGORITHMS["lite_ppo"]).advantages[:, 0].numpy() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantages": {"type": "group_relative", "baseline": "length_weighted"}}, "set scale: none"),
        ({"advantages": {"type": "leave_one_out"}, "whiten_rewards": True}, "remove whiten_rewards"),
        ({"advantages": {"type": "leave_one_out"}, "discounted_state_weight": True}, "have no discount"),
        ({"advantages": {"type": "group_relative_parts"}, "kl": {"type": "in_reward"}}, "would not be seen"),
        (
            {"advantages": {"type": "leave_one_out"}, "surrogate": {"type": "geometric_mean"}},
            "use aggregation: sequence_mean",
        ),
        (
            {
                "advantages": {"type": "leave_one_out"},
                "surrogate": {"type": "soft_gate"},
                "ratio": "sequence_geometric_mean",
            },
            "use ratio: token",
        ),
    ],
)
def test_combinations_without_meaning_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AlgorithmConfig.model_validate(settings)
