"""What must hold for every preset, on a small categorical policy, from rollout to gradient."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.core.algorithm import AlgorithmConfig, Imitation, KlInLoss, LeaveOneOut, MaskedWeights, TruncatedWeights
from rlhf.core.estimate import estimate, standardize_advantages
from rlhf.core.objective import Objective
from rlhf.core.presets import ALGORITHMS
from rlhf.core.types import PolicyOutput

NAN = float("nan")
LENGTH = 8
PRESETS = {name: algorithm.with_length(LENGTH) for name, algorithm in ALGORITHMS.items()}
PRESETS["grpo, entropy bonus, engine weights"] = PRESETS["grpo"].model_copy(
    update={"entropy_coef": 0.01, "rollout_correction": TruncatedWeights()}
)
PRESETS["gspo, masked rows"] = PRESETS["gspo"].model_copy(
    update={"rollout_correction": MaskedWeights(level="sequence")}
)
for _estimator in ("k2", "k3", "k3_straight_through", "k3_weighted"):
    PRESETS[f"grpo, {_estimator}"] = PRESETS["grpo"].model_copy(update={"kl": KlInLoss(estimator=_estimator)})
for _estimator in ("k1", "k2", "k3"):
    PRESETS[f"ppo_kl, {_estimator}"] = PRESETS["ppo_kl"].model_copy(
        update={"kl": KlInLoss(estimator=_estimator, against="old_policy")}
    )
PRESETS["exact row weight"] = AlgorithmConfig(
    advantages=LeaveOneOut(), ratio="sequence_product", aggregation={"type": "sequence_mean"}
)
PRESETS["grpo, stale rows left out, advantages clipped"] = PRESETS["grpo"].model_copy(
    update={"off_policy_threshold": 0.01, "advantage_clip": 0.5}
)
PRESETS["ppo_rlhf, rewards whitened, discount^t"] = PRESETS["ppo_rlhf"].model_copy(
    update={"whiten_rewards": True, "discounted_state_weight": True}
)
PRESETS["vapo, imitation"] = PRESETS["vapo"].model_copy(update={"imitation": Imitation(above=0.1)})
KL_COEF = 0.3
every_preset = pytest.mark.parametrize("name", list(PRESETS))


def credited(rollout, algorithm):
    experience = estimate(rollout, algorithm, kl_coef=KL_COEF)
    if getattr(algorithm.advantages, "standardize", "none") == "minibatch":
        experience = standardize_advantages(experience)
    return experience


def loss_and_gradients(batch, algorithm, *, rollout=None, widen=None):
    """Loss, experience, sums, and gradients of logits and values; `widen` pads the policy's output like the rollout.

    Masked entries of the output must have a gradient of exactly 0 (and not NaN).
    """
    rollout = batch.rollout if rollout is None else rollout
    experience = credited(rollout, algorithm)
    logits, values = batch.parameters()
    output = batch.output(logits, values)
    if widen is not None:
        output = PolicyOutput(*(widen(tensor) for tensor in output))
    objective = Objective(algorithm)
    sums = objective(output, experience, kl_coef=KL_COEF)
    loss = objective.loss(sums, objective.denominators(experience.action_mask))
    wanted = (logits, values, *output)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    masked = ~experience.action_mask
    assert all(gradient is None or (gradient[masked] == 0).all() for gradient in gradients[2:])
    return loss, experience, sums, [torch.zeros(()) if g is None else g for g in gradients[:2]]


@every_preset
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    left=st.integers(0, 3),
    right=st.integers(0, 3),
    garbage=st.sampled_from([NAN, float("inf"), -float("inf"), 1e30, 0.0]),
)
def test_padding_changes_nothing(name, seed, left, right, garbage, make_batch, pad_rollout, pad):
    """Neither the side nor the amount of padding, nor what stands in it; the policy's own output there is finite."""
    algorithm = PRESETS[name]
    batch = make_batch(seed, steps=5)
    loss, experience, sums, gradients = loss_and_gradients(batch, algorithm)
    padded_rollout = pad_rollout(batch.rollout, left, right, garbage)
    widen = lambda tensor: pad(tensor, left, right, -1000.0)  # noqa: E731
    padded_loss, padded, padded_sums, padded_gradients = loss_and_gradients(
        batch, algorithm, rollout=padded_rollout, widen=widen
    )
    assert torch.allclose(padded_loss, loss, rtol=1e-10)
    assert torch.allclose(padded_sums.metrics, sums.metrics, rtol=1e-10)
    for first, second in zip(gradients, padded_gradients, strict=True):
        assert torch.allclose(first, second, rtol=1e-9, atol=1e-12)
    inner = slice(left, left + experience.advantages.shape[1])
    assert torch.allclose(padded.advantages[:, inner], experience.advantages, rtol=1e-10)
    assert (padded.advantages[~padded.action_mask] == 0).all()
    if experience.returns is not None:
        assert torch.allclose(padded.returns[:, inner], experience.returns, rtol=1e-10)


@every_preset
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_leaving_the_mask_out_where_every_action_counts_changes_nothing(name, seed, make_batch):
    algorithm = PRESETS[name]
    batch = make_batch(seed, steps=5)
    rollout = replace(batch.rollout, action_mask=torch.ones_like(batch.rollout.action_mask))
    experience = credited(rollout, algorithm)
    objective, results = Objective(algorithm), []
    for one in (experience, replace(experience, complete=True)):
        logits, values = batch.parameters()
        sums = objective(batch.output(logits, values), one, kl_coef=KL_COEF)
        loss = objective.loss(sums, objective.denominators(one.action_mask))
        gradients = torch.autograd.grad(loss, (logits, values), allow_unused=True)
        results.append([loss, sums.metrics, *(g for g in gradients if g is not None)])
    for masked, unmasked in zip(*results, strict=True):
        assert torch.equal(masked, unmasked)


@every_preset
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_garbage_between_the_actions_leaks_nowhere(name, seed, make_batch):
    """NaN in rewards, values and every kind of log-probs at masked steps, such as tool tokens, reaches no gradient."""
    algorithm = PRESETS[name]
    batch = make_batch(seed, rows=4, steps=7)
    holes = torch.rand(4, 7, generator=torch.Generator().manual_seed(seed)) < 0.3
    holes[:, 0] = False
    mask = batch.rollout.action_mask & ~holes
    clean = replace(batch.rollout, action_mask=mask, episode_ends=batch.rollout.episode_ends & mask)
    floats = ["rewards", "old_log_probs", "values", "ref_log_probs", "sampling_log_probs"]
    dirty = replace(clean, **{key: torch.where(mask, getattr(clean, key), NAN) for key in floats})
    loss, _, sums, gradients = loss_and_gradients(batch, algorithm, rollout=clean)
    dirty_loss, experience, dirty_sums, dirty_gradients = loss_and_gradients(batch, algorithm, rollout=dirty)
    assert loss.isfinite()
    assert torch.equal(dirty_loss, loss)
    assert torch.equal(dirty_sums.metrics, sums.metrics)
    for first, second in zip(gradients, dirty_gradients, strict=True):
        assert torch.equal(first, second)
    for item in fields(experience):
        value = getattr(experience, item.name)
        if isinstance(value, torch.Tensor) and item.name not in ("actions", "action_mask"):
            assert value.isfinite().all(), item.name


@every_preset
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), assignment=st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_any_split_into_microbatches_gives_the_same_gradient(name, seed, assignment, make_batch):
    """Sums add up over microbatches, denominators are those of the whole step; row order is of no matter either."""
    algorithm = PRESETS[name]
    batch = make_batch(seed, rows=6)
    loss, experience, sums, gradients = loss_and_gradients(batch, algorithm)
    objective = Objective(algorithm)
    logits, values = batch.parameters()
    denominators = objective.denominators(experience.action_mask)
    parts = [torch.tensor([i for i in range(6) if assignment[i] == part], dtype=torch.int64) for part in (2, 0, 1)]
    shares = sum(objective.denominators(experience.action_mask[part]) for part in parts)
    assert torch.equal(shares, denominators)
    total, metrics = 0.0, 0.0
    for part in parts:
        output = PolicyOutput(*(tensor[part] for tensor in batch.output(logits, values)))
        piece = objective(output, experience.select(part), kl_coef=KL_COEF)
        objective.loss(piece, denominators).backward()
        total = total + objective.loss(piece, denominators).item()
        metrics = metrics + piece.metrics
    assert total == pytest.approx(loss.item(), rel=1e-10)
    assert torch.allclose(metrics, sums.metrics, rtol=1e-10)
    for first, second in zip(gradients, (logits.grad, values.grad), strict=True):
        assert torch.allclose(first, torch.zeros(()) if second is None else second, rtol=1e-9, atol=1e-12)


@every_preset
@settings(max_examples=12, deadline=None)
@given(
    log_ratios=st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=6),
    to_reference=st.lists(st.floats(-50, 50, width=32), min_size=6, max_size=6),
    advantage=st.floats(-10, 10, width=32),
)
def test_no_nan_or_inf_for_log_ratios_up_to_50(name, log_ratios, to_reference, advantage, make_batch):
    """In float32, for losses, metrics and gradients: pi / pi_old, pi_old / ref and pi_old / mu from e^-50 to e^50."""
    algorithm = PRESETS[name]
    batch = make_batch(0, rows=2, steps=3, dtype=torch.float32)
    drift, distance = torch.tensor(log_ratios).reshape(2, 3), torch.tensor(to_reference).reshape(2, 3)
    old = torch.full((2, 3), -60.0)
    rollout = replace(
        batch.rollout,
        old_log_probs=old,
        ref_log_probs=(old + drift - distance),
        sampling_log_probs=old - distance,
        rewards=torch.where(batch.rollout.action_mask, abs(advantage) if "maxrl" in name else advantage, 0.0),
    )
    experience = credited(rollout, algorithm)
    log_probs, values = (old + drift).requires_grad_(), batch.values.clone().requires_grad_()
    objective = Objective(algorithm)
    sums = objective(PolicyOutput(log_probs, torch.ones(2, 3), values), experience, kl_coef=KL_COEF)
    loss = objective.loss(sums, objective.denominators(experience.action_mask))
    loss.backward()
    assert experience.advantages.isfinite().all()
    assert loss.isfinite()
    assert sums.metrics.isfinite().all()
    assert log_probs.grad.isfinite().all()
    assert values.grad is None or values.grad.isfinite().all()


@pytest.mark.parametrize("name", [name for name, algorithm in PRESETS.items() if algorithm.needs_groups])
def test_equal_scores_leave_the_policy_where_it_is(name, make_batch):
    """For group presets without a KL term: no score is better than another, so there is nothing to learn."""
    algorithm = PRESETS[name].model_copy(update={"kl": ALGORITHMS["dapo"].kl, "entropy_coef": 0.0})
    batch = make_batch(0)
    rewards = torch.where(batch.rollout.episode_ends, 0.1, 0.0).double()
    rollout = replace(batch.rollout, rewards=rewards, reward_parts=torch.tensor([[0.1, 7.0]] * 4).double())
    _, experience, _, gradients = loss_and_gradients(batch, algorithm, rollout=rollout)
    assert (experience.advantages == 0).all()
    assert (gradients[0] == 0).all()


def test_each_preset_learns_a_bandit(make_batch):
    """Sanity of every sign at once: ten gradient steps raise the probability of the rewarded action."""
    generator = torch.Generator().manual_seed(0)
    for name, algorithm in PRESETS.items():
        logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([logits], lr=1.0)
        batch = make_batch(0, rows=64, steps=1)
        for _ in range(10):
            log_probs = logits.detach().log_softmax(0)
            actions = torch.multinomial(log_probs.exp(), 64, replacement=True, generator=generator).unsqueeze(1)
            old = log_probs[actions]
            rollout = replace(
                batch.rollout,
                actions=actions,
                rewards=(actions == 1).double(),
                old_log_probs=old,
                ref_log_probs=old,
                sampling_log_probs=old,
                values=torch.zeros(64, 1, dtype=torch.float64),
                group_ids=torch.arange(64) // (2 if name == "grpo_pass_at_k" else 8),
                baselines=log_probs.exp()[1].expand(64),
                reward_parts=torch.cat([(actions == 1).double(), (actions != 0).double()], dim=1),
            )
            experience = credited(rollout, algorithm)
            objective = Objective(algorithm)
            output = PolicyOutput(logits.log_softmax(0)[actions], torch.zeros_like(old), torch.zeros_like(old))
            optimizer.zero_grad()
            objective.loss(
                objective(output, experience, kl_coef=0.01), objective.denominators(experience.action_mask)
            ).backward()
            optimizer.step()
        # dr_grpo divides by the length 8 although rows have one action: its steps are 8 times smaller.
        assert logits.softmax(0)[1] > (0.40 if name == "dr_grpo" else 0.6), name


def test_group_presets_see_scores_only():
    """A constant added to every score of a group changes nothing."""
    from rlhf.core.advantages import group_relative

    scores, ids = torch.tensor([0.0, 1.0, 4.0, 0.0, 2.0, 2.0]), torch.tensor([0, 0, 0, 1, 1, 1])
    shifted = scores + torch.tensor([8.0, 8.0, 8.0, -4.0, -4.0, -4.0])
    for scale in ("sample_std", "population_std", "none"):
        assert torch.allclose(
            group_relative(scores, ids, scale=scale), group_relative(shifted, ids, scale=scale), atol=1e-6
        )
