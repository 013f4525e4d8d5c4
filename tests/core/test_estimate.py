from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf.core.algorithm import (
    AlgorithmConfig,
    Gae,
    GroupRelative,
    KlInReward,
    LeaveOneOut,
    NStep,
    RewardsToGo,
    SquaredValueLoss,
    TruncatedWeights,
)
from rlhf.core.estimate import estimate, standardize_advantages
from rlhf.core.presets import ALGORITHMS
from rlhf.core.types import Rollout
from rlhf.errors import ConfigError

NAN = float("nan")
CRITIC = SquaredValueLoss()


def completions() -> Rollout:
    """Two completions of one prompt: 3 and 2 tokens, scores 1 and 3 on their last tokens, garbage in the padding."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    old = torch.tensor([[-1.0, -2.0, -1.5], [-0.5, -1.0, NAN]], dtype=torch.float64)
    difference = torch.tensor([[0.1, -0.2, 0.3], [0.5, 0.0, NAN]], dtype=torch.float64)
    return Rollout(
        inputs={},
        actions=torch.zeros(2, 3, dtype=torch.int64),
        action_mask=mask,
        rewards=torch.tensor([[0.0, 0.0, 1.0], [0.0, 3.0, NAN]], dtype=torch.float64),
        old_log_probs=old,
        ref_log_probs=old - difference,
        sampling_log_probs=old - 0.5 * difference,
        values=torch.tensor([[0.5, 0.6, 0.7], [1.0, 2.0, NAN]], dtype=torch.float64),
        episode_ends=torch.tensor([[False, False, True], [False, True, False]]),
        group_ids=torch.tensor([4, 4]),
    )


def close(tensor, expected) -> bool:
    return torch.allclose(tensor, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_group_scores_are_broadcast_over_the_own_actions():
    # Scores 1 and 3, mean 2, sample std sqrt 2, plus epsilon 0: -+1 / sqrt 2.
    algorithm = AlgorithmConfig(advantages=GroupRelative(epsilon=0.0))
    experience = estimate(completions(), algorithm)
    half = 0.5**0.5
    assert close(experience.advantages, [[-half] * 3, [half, half, 0.0]])
    assert experience.returns is None
    assert experience.old_values is None
    assert experience.weights is None


def test_leave_one_out_takes_the_kl_inside_the_score():
    # k1 sums: .1 - .2 + .3 = .2 and .5. Scores 1 - .1 * .2 = .98 and 3 - .1 * .5 = 2.95; each minus the other: -+1.97.
    algorithm = AlgorithmConfig(advantages=LeaveOneOut(), kl=KlInReward(estimator="k1"))
    experience = estimate(completions(), algorithm, kl_coef=0.1)
    assert close(experience.advantages, [[-1.97] * 3, [1.97, 1.97, 0.0]])


def test_rewards_to_go_with_a_kl_penalty_per_token():
    # Rewards: -.1 k_t, plus the score on the last token: [-.01, .02, .97], [-.05, 3]; sums from the right.
    algorithm = AlgorithmConfig(advantages=RewardsToGo(discount=1.0), kl=KlInReward(estimator="k1"))
    experience = estimate(completions(), algorithm, kl_coef=0.1)
    assert close(experience.advantages, [[0.98, 0.99, 0.97], [2.95, 3.0, 0.0]])


@pytest.mark.parametrize(
    ("estimator", "penalty"),
    # d = .1, -.2, .3: k2 = d^2 / 2; k3 = e^-d - 1 + d = .0048374180, .0214027582, .0408182207.
    [("k2", [0.005, 0.02, 0.045]), ("k3", [0.0048374180, 0.0214027582, 0.0408182207])],
)
def test_other_estimators_of_the_penalty(estimator, penalty):
    algorithm = AlgorithmConfig(advantages=RewardsToGo(discount=0.0), kl=KlInReward(estimator=estimator))
    experience = estimate(completions(), algorithm, kl_coef=1.0)
    expected = torch.tensor([-penalty[0], -penalty[1], 1.0 - penalty[2]], dtype=torch.float64)
    assert torch.allclose(experience.advantages[0], expected, atol=1e-9)


def test_gae_of_completions_ends_with_value_zero():
    # Discount 1, lambda .5, V' = next value, 0 after the last token.
    # Row 0: deltas .6 - .5 = .1, .7 - .6 = .1, 1 - .7 = .3; A = .3, .1 + .15 = .25, .1 + .125 = .225.
    # Row 1: deltas 2 - 1 = 1, 3 - 2 = 1; A = 1, 1.5. Returns A + V.
    algorithm = AlgorithmConfig(advantages=Gae(discount=1.0, gae_lambda=0.5), value_loss=CRITIC)
    experience = estimate(completions(), algorithm)
    assert close(experience.advantages, [[0.225, 0.25, 0.3], [1.5, 1.0, 0.0]])
    assert close(experience.returns, [[0.725, 0.85, 1.0], [2.5, 3.0, 0.0]])
    assert close(experience.old_values, [[0.5, 0.6, 0.7], [1.0, 2.0, 0.0]])


def test_n_step_and_baseline_subtract_the_value():
    # n = 1, discount 1: r + V' - V = the deltas above; rewards to go minus V: 1 - V and 3 - V.
    n_step = estimate(completions(), AlgorithmConfig(advantages=NStep(n=1, discount=1.0), value_loss=CRITIC))
    assert close(n_step.advantages, [[0.1, 0.1, 0.3], [1.0, 1.0, 0.0]])
    assert close(n_step.returns, [[0.6, 0.7, 1.0], [2.0, 3.0, 0.0]])
    to_go = estimate(
        completions(), AlgorithmConfig(advantages=RewardsToGo(discount=1.0, baseline="value"), value_loss=CRITIC)
    )
    assert close(to_go.advantages, [[0.5, 0.4, 0.3], [2.0, 1.0, 0.0]])
    assert close(to_go.returns, [[1.0, 1.0, 1.0], [3.0, 3.0, 0.0]])


def test_given_next_values_are_used():
    # A truncated last step: 1 + .9 * 10 - .7 = 9.3.
    rollout = replace(completions(), next_values=torch.full((2, 3), 10.0, dtype=torch.float64))
    algorithm = AlgorithmConfig(advantages=Gae(discount=0.9, gae_lambda=0.95), value_loss=CRITIC)
    assert estimate(rollout, algorithm).advantages[0, 2].item() == pytest.approx(9.3)


def test_batch_standardization_touches_advantages_but_not_returns():
    # Advantages of the GAE test: mean (.225 + .25 + .3 + 1.5 + 1) / 5 = .655, biased variance .2622 (see below).
    algorithm = AlgorithmConfig(advantages=Gae(discount=1.0, gae_lambda=0.5, standardize="batch"), value_loss=CRITIC)
    experience = estimate(completions(), algorithm)
    raw = [0.225, 0.25, 0.3, 1.5, 1.0]
    variance = sum((number - 0.655) ** 2 for number in raw) / 5
    expected = [(number - 0.655) / variance**0.5 for number in raw]
    assert experience.advantages[completions().action_mask].tolist() == pytest.approx(expected, rel=1e-6)
    assert experience.advantages[1, 2] == 0
    assert close(experience.returns, [[0.725, 0.85, 1.0], [2.5, 3.0, 0.0]])


def test_minibatch_standardization_is_left_to_the_learner():
    settings = {"discount": 1.0, "gae_lambda": 0.5}
    plain = estimate(completions(), AlgorithmConfig(advantages=Gae(**settings), value_loss=CRITIC))
    later = estimate(
        completions(), AlgorithmConfig(advantages=Gae(**settings, standardize="minibatch"), value_loss=CRITIC)
    )
    assert torch.equal(plain.advantages, later.advantages)
    batch = estimate(completions(), AlgorithmConfig(advantages=Gae(**settings, standardize="batch"), value_loss=CRITIC))
    assert torch.equal(standardize_advantages(later).advantages, batch.advantages)


def test_rollout_correction_weighs_by_old_policy_over_engine():
    # w = exp(.5 d): e^.05, e^-.1, e^.15 and e^.25, 1, capped at 1.2.
    algorithm = AlgorithmConfig(advantages=GroupRelative(), rollout_correction=TruncatedWeights(cap=1.2))
    weights = estimate(completions(), algorithm).weights
    own = weights[completions().action_mask].tolist()
    assert own == pytest.approx([1.0512711, 0.9048374, 1.1618342, 1.2, 1.0], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("ppo", "values"),
        ("rloo", "ref_log_probs"),
        ("grpo", "ref_log_probs"),
        ("dapo", "group_ids"),
    ],
)
def test_what_a_rollout_lacks_is_named(name, missing):
    with pytest.raises(ConfigError, match=rf"estimate: the algorithm needs {missing}, which the rollout lacks\. \w+"):
        estimate(replace(completions(), **{missing: None}), ALGORITHMS[name])


def test_missing_engine_log_probs_are_named():
    algorithm = AlgorithmConfig(advantages=GroupRelative(), rollout_correction=TruncatedWeights())
    with pytest.raises(ConfigError, match="needs sampling_log_probs"):
        estimate(replace(completions(), sampling_log_probs=None), algorithm)


@pytest.mark.parametrize(
    "algorithm",
    [
        AlgorithmConfig(advantages=GroupRelative(), rollout_correction=TruncatedWeights()),
        AlgorithmConfig(advantages=GroupRelative(), epochs=2),
        AlgorithmConfig(advantages=GroupRelative(), minibatches=2),
        ALGORITHMS["rloo"],  # KL in the reward
    ],
)
def test_old_log_probs_that_the_step_itself_would_give_come_too_late_for_these(algorithm):
    rollout = replace(completions(), on_policy=True)
    with pytest.raises(ConfigError, match=r"needs old_log_probs, .*recompute"):
        estimate(rollout, algorithm)
    assert estimate(rollout, AlgorithmConfig(advantages=GroupRelative())).on_policy


def test_a_group_of_one_row_is_refused():
    with pytest.raises(ConfigError, match="a group of one completion"):
        estimate(replace(completions(), group_ids=torch.tensor([0, 1])), ALGORITHMS["dapo"])


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_the_rollout_is_left_as_it_was(name, make_batch):
    rollout = make_batch(0).rollout
    before = {key: value.clone() for key, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
    experience = estimate(rollout, ALGORITHMS[name], kl_coef=0.1)
    for key, value in before.items():
        assert torch.equal(getattr(rollout, key), value), key
    assert not experience.advantages.requires_grad


@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_two_processes_get_what_one_would(name, make_batch, on_two_processes):
    rollout = make_batch(3, rows=6).rollout
    algorithm = ALGORITHMS[name]

    def rows(part: slice) -> Rollout:
        cut = {key: value[part] for key, value in vars(rollout).items() if isinstance(value, torch.Tensor)}
        return replace(rollout, inputs={"row": rollout.inputs["row"][part]}, **cut)

    whole = estimate(rollout, algorithm, kl_coef=0.1).advantages
    parts = on_two_processes(
        lambda part, reduce: estimate(rows(part), algorithm, kl_coef=0.1, reduce=reduce).advantages,
        slice(0, 2),
        slice(2, 6),
    )
    assert torch.allclose(torch.cat(parts), whole, atol=1e-12)
