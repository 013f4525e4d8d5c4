from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from rlhf.core.types import Experience, PolicyOutput

NAN = float("nan")


def experience(rows: int = 2, steps: int = 3) -> Experience:
    grid = torch.arange(rows * steps, dtype=torch.float32).reshape(rows, steps)
    return Experience(
        inputs={"state": grid.unsqueeze(-1).repeat(1, 1, 4)},
        actions=grid.long(),
        action_mask=grid % 2 == 0,
        old_log_probs=-grid,
        advantages=10 * grid,
        returns=20 * grid,
    )


def test_a_rollout_scores_its_own_actions_only(make_batch):
    rollout = make_batch(0, rows=2, steps=3).rollout
    mask = torch.tensor([[True, True, False], [False, True, True]])
    rewards = torch.tensor([[1.0, 2.0, NAN], [NAN, 3.0, 4.0]])
    assert replace(rollout, action_mask=mask, rewards=rewards).scores.tolist() == [3.0, 7.0]


def test_facts_and_credit_are_frozen(make_batch):
    with pytest.raises(FrozenInstanceError):
        make_batch(0).rollout.rewards = None
    with pytest.raises(FrozenInstanceError):
        experience().advantages = None


@pytest.mark.parametrize("name", ["rewards", "old_log_probs", "values", "ref_log_probs", "episode_ends", "actions"])
def test_a_shape_that_would_broadcast_is_refused(name, make_batch):
    rollout = make_batch(0, rows=4, steps=6).rollout
    with pytest.raises(AssertionError, match=name):
        replace(rollout, **{name: getattr(rollout, name)[:1]})


def test_group_ids_inputs_and_mask_are_checked_too(make_batch):
    rollout = make_batch(0, rows=4, steps=6).rollout
    with pytest.raises(AssertionError, match="group_ids"):
        replace(rollout, group_ids=torch.zeros(4, 6, dtype=torch.int64))
    with pytest.raises(AssertionError, match="row"):
        replace(rollout, inputs={"row": torch.zeros(3)})
    with pytest.raises(AssertionError, match="bool"):
        replace(rollout, action_mask=rollout.action_mask.long())


def test_select_takes_rows_in_the_given_order():
    chosen = experience(3).select(torch.tensor([2, 0]))
    assert len(chosen) == 2
    assert chosen.advantages.tolist() == [[60.0, 70.0, 80.0], [0.0, 10.0, 20.0]]
    assert chosen.inputs["state"][:, 0, 0].tolist() == [6.0, 0.0]
    assert chosen.ref_log_probs is None


def test_flatten_actions_keeps_each_unmasked_action_with_its_input():
    # Entries 0..5, of which 0, 2, 4 are unmasked.
    flat = experience().flatten_actions()
    assert flat.actions.tolist() == [[0], [2], [4]]
    assert flat.advantages.tolist() == [[0.0], [20.0], [40.0]]
    assert flat.returns.tolist() == [[0.0], [40.0], [80.0]]
    assert flat.action_mask.tolist() == [[True]] * 3
    assert flat.inputs["state"].shape == (3, 1, 4)
    assert flat.inputs["state"][:, 0, 0].tolist() == [0.0, 2.0, 4.0]


def test_policy_output_is_a_tuple_so_that_mixed_precision_can_convert_it():
    # accelerate's convert_outputs_to_fp32 walks tuples, lists and mappings, and leaves other objects in half precision.
    from accelerate.utils.operations import convert_to_fp32

    half = torch.zeros(1, 1, dtype=torch.bfloat16)
    converted = convert_to_fp32(PolicyOutput(half, half, None))
    assert isinstance(converted, PolicyOutput)
    assert converted.log_probs.dtype == torch.float32
