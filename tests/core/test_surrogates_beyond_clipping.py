"""GMPO, DPPO, SAPO, GSPO-token, OPSM, discount^t, clipped advantages: values and gradients by arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf.core import surrogates
from rlhf.core.algorithm import AdaptiveEntropy, AlgorithmConfig, GroupRelative, PolicyGradient, RewardsToGo
from rlhf.core.corrections import off_policy_rows, state_weights
from rlhf.core.estimate import estimate
from rlhf.core.objective import Objective
from rlhf.core.presets import ALGORITHMS
from rlhf.core.ratios import importance_ratio
from rlhf.core.types import Experience, PolicyOutput, Rollout

ROW = torch.tensor([[True, True, True, False]])


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


# --- GMPO -------------------------------------------------------------------------------------------------------------


def test_the_geometric_mean_clips_on_the_gaining_side_only():
    """Log-ratios 1, -1, .1: for A > 0, (.4 - 1 + .1) / 3 = -1/6; for A < 0, (1 - .4 + .1) / 3 = .7/3."""
    ratio = tensor(1.0, -1.0, 0.1, 50.0).exp()
    gain = surrogates.geometric_mean(ratio, tensor(2, 2, 2, 2), ROW, clip_low=0.4, clip_high=0.4)
    assert gain[0, :3].tolist() == pytest.approx([2 * 2.718281828 ** (-0.5 / 3)] * 3)
    loss = surrogates.geometric_mean(ratio, tensor(-2, -2, -2, -2), ROW, clip_low=0.4, clip_high=0.4)
    assert loss[0, :3].tolist() == pytest.approx([-2 * 2.718281828 ** (0.7 / 3)] * 3)


def test_the_geometric_mean_is_the_products_root():
    """Unclipped it is prod(rho)^(1/l) x A, the formula of the paper."""
    ratio = tensor(1.2, 0.9, 1.1, 1.0)
    gain = surrogates.geometric_mean(ratio, tensor(1, 1, 1, 1), ROW, clip_low=9.0, clip_high=9.0)
    assert gain[0, 0].item() == pytest.approx((1.2 * 0.9 * 1.1) ** (1 / 3))


# --- DPPO, SAPO -------------------------------------------------------------------------------------------------------


def test_probability_masks_follow_the_difference_of_probabilities():
    # pi_old .5, .5, .5, .01; pi .8, .65, .2, .1: moved by .3, .15, -.3, .09.
    old, new = tensor(0.5, 0.5, 0.5, 0.01), tensor(0.8, 0.65, 0.2, 0.1)
    for sign, expected in [(1.0, [0.0, 1.3, 0.4, 10.0]), (-1.0, [-1.6, -1.3, 0.0, -10.0])]:
        gain = surrogates.probability_masked(new / old, new.log(), old.log(), torch.full_like(old, sign), limit=0.2)
        assert gain[0].tolist() == pytest.approx(expected)


def test_soft_gates_have_slope_one_at_the_old_policy_and_fade():
    """d/d rho of 4/tau sigmoid(tau (rho - 1)) = 4 s (1 - s): 1 at rho = 1; at rho = 3, tau = 1, .41997."""
    ratio = tensor(1.0, 3.0).requires_grad_()
    surrogates.soft_gate(ratio, tensor(1, 1), temperature_positive=1.0, temperature_negative=1.05).sum().backward()
    assert ratio.grad[0].tolist() == pytest.approx([1.0, 0.41997434])
    down = tensor(3.0).requires_grad_()
    surrogates.soft_gate(down, tensor(-1), temperature_positive=1.0, temperature_negative=2.0).sum().backward()
    assert down.grad.item() == pytest.approx(-0.07065082)  # -4 s (1 - s) with s = sigmoid(4)


# --- GSPO-token -------------------------------------------------------------------------------------------------------


def test_gspo_token_has_the_rows_ratio_and_each_actions_own_gradient():
    log_probs, old = tensor(-1.0, -2.0, -0.5, 9.0).requires_grad_(), tensor(-1.2, -1.9, -0.3, 0.0)
    row = importance_ratio(log_probs, old, ROW, level="sequence_geometric_mean")
    ratio = importance_ratio(log_probs, old, ROW, level="sequence_geometric_mean_token")
    value = 2.718281828 ** ((0.2 - 0.1 - 0.2) / 3)
    assert ratio[0, :3].tolist() == pytest.approx([value] * 3)
    assert torch.allclose(ratio[:, :3], row[:, :3])
    # d ratio_t / d log pi_u is the ratio where t = u, else 0.
    gradient = torch.autograd.grad(ratio[0, 1], log_probs)[0]
    assert gradient[0].tolist() == pytest.approx([0.0, value, 0.0, 0.0])


def test_gspo_token_is_gspo_where_a_row_has_one_advantage(make_batch):
    gradients = []
    for name in ("gspo", "gspo_token"):
        batch = make_batch(0, drift=1e-4)
        experience, objective = estimate(batch.rollout, ALGORITHMS[name]), Objective(ALGORITHMS[name])
        logits, values = batch.parameters()
        sums = objective(batch.output(logits, values), experience)
        objective.loss(sums, objective.denominators(experience.action_mask)).backward()
        gradients.append(logits.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(*gradients)


# --- what goes around the surrogate -----------------------------------------------------------------------------------


def test_stale_rows_are_those_of_trl():
    """TRL 1.16's own mask (it keeps where A >= 0 or KL <= threshold) on random rows."""
    trainer = pytest.importorskip("trl").GRPOTrainer
    generator = torch.Generator().manual_seed(0)
    log_probs, behaviour = torch.randn(2, 64, 5, generator=generator)
    mask = torch.rand(64, 5, generator=generator) < 0.7
    advantages = torch.randn(64, 1, generator=generator)
    kept = trainer.get_off_policy_mask(advantages, log_probs, behaviour, mask.int(), 0.3)
    stale = off_policy_rows(log_probs, behaviour, mask, threshold=0.3) & (advantages < 0)
    assert torch.equal(stale, kept == 0)
    assert 0 < stale.sum() < 64


def test_stale_rows_of_negative_advantage_lose_their_gradient_and_are_counted(make_batch):
    algorithm = AlgorithmConfig(advantages=GroupRelative(), off_policy_threshold=0.1)
    batch = make_batch(0)
    rollout = replace(batch.rollout, sampling_log_probs=batch.rollout.old_log_probs + 9.0)  # every row is stale
    experience, objective = estimate(rollout, algorithm), Objective(algorithm)
    logits, values = batch.parameters()
    sums = objective(batch.output(logits, values), experience)
    sums.policy.backward()
    negative = experience.advantages[:, 0] < 0
    assert (logits.grad[negative] == 0).all()
    assert (logits.grad[~negative] != 0).any()
    share = sums.metrics[objective.metric_names.index("off_policy_dropped")]
    assert share.item() == experience.action_mask[negative].sum().item()


def test_weights_of_the_state_count_own_actions_from_the_episodes_start():
    mask = torch.tensor([[True, False, True, True, True]])
    ends = torch.tensor([[False, False, True, False, False]])
    assert state_weights(mask, episode_ends=ends, discount=0.5).tolist() == [[1.0, 0.0, 0.5, 1.0, 0.5]]


def test_the_state_weight_multiplies_the_surrogate_only(make_batch):
    axis = RewardsToGo(discount=0.5)
    weighted = AlgorithmConfig(advantages=axis, surrogate=PolicyGradient(), discounted_state_weight=True)
    rollout = make_batch(0).rollout
    experience = estimate(rollout, weighted)
    plain = estimate(rollout, weighted.model_copy(update={"discounted_state_weight": False}))
    assert torch.equal(experience.advantages, plain.advantages)
    assert plain.weights is None
    assert experience.weights[0].tolist() == [0.5**t for t in range(6)]


def test_advantages_are_clipped_in_the_loss():
    algorithm = AlgorithmConfig(advantages=GroupRelative(), surrogate=PolicyGradient(), advantage_clip=0.5)
    zeros = torch.zeros(1, 3)
    experience = Experience(
        inputs={},
        actions=torch.zeros(1, 3, dtype=torch.int64),
        action_mask=torch.ones(1, 3, dtype=torch.bool),
        old_log_probs=zeros,
        advantages=torch.tensor([[2.0, -0.25, -2.0]]),
    )
    log_probs = zeros.clone().requires_grad_()
    Objective(algorithm)(PolicyOutput(log_probs, zeros, None), experience).policy.backward()
    assert log_probs.grad.tolist() == [[-0.5, 0.25, 0.5]]


def test_the_learner_steers_the_entropy_bonus():
    """Target far above what a policy of five actions can have: the coefficient rises by a step per update."""
    from rlhf.training import Learner, UpdateConfig

    class Bandit(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.zeros(5))

        def forward(self, inputs, actions):
            log_p = self.logits.log_softmax(-1).expand(*actions.shape, -1)
            own = log_p.gather(-1, actions[..., None]).squeeze(-1)
            return PolicyOutput(own, -(log_p.exp() * log_p).sum(-1), None)

    algorithm = ALGORITHMS["dr_grpo"].with_length(1)
    algorithm = algorithm.model_copy(update={"adaptive_entropy": AdaptiveEntropy(target=9.0, step=0.125)})
    policy = Bandit()
    learner = Learner(policy, algorithm, UpdateConfig(learning_rate=0.1))
    actions = torch.arange(8).unsqueeze(1) % 5
    rollout = Rollout(
        inputs={},
        actions=actions,
        action_mask=torch.ones(8, 1, dtype=torch.bool),
        rewards=(actions == 1).float(),
        old_log_probs=policy({}, actions).log_probs.detach(),
        episode_ends=torch.ones(8, 1, dtype=torch.bool),
        group_ids=torch.zeros(8, dtype=torch.int64),
    )
    coefficients = [learner.update(estimate(rollout, algorithm))["entropy_coef"] for _ in range(3)]
    assert coefficients == [0.0, 0.125, 0.25]
    other = Learner(Bandit(), algorithm, UpdateConfig(learning_rate=0.1))
    other.load_state_dict(learner.state_dict())
    assert other.entropy_coef.value == 0.375
