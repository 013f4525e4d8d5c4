"""Recorded losses against autograd's, for every preset whose loss is made of single actions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from rlhf.core.algorithm import AlgorithmConfig, TokenMean
from rlhf.core.objective import Objective
from rlhf.core.presets import ALGORITHMS
from rlhf.core.types import Experience, PolicyOutput
from rlhf.training.recording import MIN_ROWS, RecordedLoss

SETTINGS = {"kl_coef": 0.3, "clip_scale": 1.0, "entropy_coef": 0.05}
SINGLE = {
    name: algorithm
    for name, algorithm in ALGORITHMS.items()
    if algorithm.ratio == "token" and isinstance(algorithm.aggregation, TokenMean) and not algorithm.language_only
}


def experience(rows: int, seed: int) -> tuple[Experience, PolicyOutput]:
    generator = torch.Generator().manual_seed(seed)

    def normals(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(rows, 1, generator=generator)

    old = -normals().abs()
    facts = Experience(
        inputs={"observations": torch.zeros(rows, 1, 1)},
        actions=torch.zeros(rows, 1, dtype=torch.long),
        action_mask=torch.ones(rows, 1, dtype=torch.bool),
        old_log_probs=old,
        advantages=normals(),
        returns=normals(),
        old_values=normals(),
        ref_log_probs=old + normals(0.1),
        behaviour_log_probs=old + normals(0.1),
        complete=True,
    )
    # The first ratio is 1 and the second advantage 0: ties, where torch shares a minimum's gradient.
    moved = normals(0.4)
    moved[0] = 0
    facts.advantages[1] = 0
    return facts, PolicyOutput(old + moved, normals().abs(), normals())


def by_autograd(objective: Objective, output: PolicyOutput, facts: Experience, denominators: torch.Tensor):
    leaves = PolicyOutput(*(x.clone().requires_grad_() for x in output))
    sums = objective(leaves, facts, **SETTINGS)
    gradients = torch.autograd.grad(objective.loss(sums, denominators), list(leaves), allow_unused=True)
    return sums, gradients


@pytest.mark.parametrize("name", list(SINGLE))
def test_sums_and_gradients_are_autograd_s_at_every_size(name):
    objective = Objective(SINGLE[name])
    recorded = RecordedLoss(objective, SETTINGS)
    for seed, rows in enumerate((64, 63, 17, 64)):
        facts, output = experience(rows, seed)
        denominators = torch.tensor([float(rows), rows - 1.0])
        found = recorded(output, facts, denominators)
        assert found is not None, "an operation without an entry"
        sums, gradients = by_autograd(objective, output, facts, denominators)
        for own, theirs in zip(found[0], sums, strict=True):
            assert_close(own, theirs.detach(), rtol=2e-5, atol=1e-5)
        for own, theirs in zip(found[1], gradients, strict=True):
            assert (own is None) == (theirs is None)
            if theirs is not None:
                assert own.shape == theirs.shape
                assert_close(own, theirs, rtol=1e-5, atol=1e-7)


def test_what_decides_by_the_data_is_left_to_autograd():
    def surrogate(ratio, log_probs, advantages):
        return ratio * advantages if ratio.max() > 2 else log_probs * advantages

    facts, output = experience(32, 0)
    recorded = RecordedLoss(Objective(ALGORITHMS["ppo"], surrogate=surrogate), SETTINGS)
    assert recorded(output, facts, torch.tensor([32.0, 32.0])) is None
    assert not recorded.possible


def test_few_rows_are_left_to_autograd():
    facts, output = experience(MIN_ROWS - 1, 0)
    recorded = RecordedLoss(Objective(ALGORITHMS["ppo"]), SETTINGS)
    assert recorded(output, facts, torch.tensor([15.0, 15.0])) is None
    assert recorded.possible


def test_what_was_recorded_reads_the_minibatch_of_the_moment():
    facts, output = experience(32, 0)
    recorded = RecordedLoss(Objective(AlgorithmConfig.model_validate(ALGORITHMS["ppo"].model_dump())), SETTINGS)
    denominators = torch.tensor([32.0, 32.0])
    assert facts.returns is not None
    first = recorded(output, facts, denominators)
    second = recorded(output, replace(facts, returns=facts.returns + 10), denominators)
    assert first is not None
    assert second is not None
    assert_close(first[0].policy, second[0].policy)
    assert second[0].value > first[0].value + 100
