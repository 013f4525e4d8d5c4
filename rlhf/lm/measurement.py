"""Forwards over a whole rollout: what the policy, its critic and the reference think of given completions.

Without gradients, unless the next update is to use one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from rlhf.core.algorithm import AlgorithmConfig
from rlhf.core.types import PolicyOutput
from rlhf.lm.sampling import SamplingConfig

CPU_TOKENS = 4096
"""On a CPU, tokens of a microbatch at most: more outgrow its caches and save nothing."""

RECHECK_EVERY = 20
"""Iterations after which the generator is compared with the trainer's forward again."""

Scorer = Callable[[Mapping[str, Tensor], Tensor], PolicyOutput]


def step_gives_old_log_probs(
    algorithm: AlgorithmConfig | None, *, sampling: SamplingConfig, has_reference: bool
) -> bool:
    """Whether no forward before an update has to: one step is made of a rollout, and nothing is needed before it.

    Under top-p or top-k the generator's log-probs do not tell the distance to a reference.
    """
    tells_kl = sampling.full_support or not has_reference
    return tells_kl and algorithm is not None and not algorithm.needs_old_log_probs


def measure(
    policy: Scorer, inputs: Mapping[str, Tensor], actions: Tensor, *, tokens: int, differentiable: bool = False
) -> PolicyOutput:
    """Run a policy over R rows in length-sorted microbatches.

    Rows of similar length go together and the policy trims each microbatch to its own longest row, so little
    is spent on padding. The order of the result is that of the rows.

    Args:
        policy: A `LanguageModelPolicy` or a frozen reference.
        inputs: prompt_ids, prompt_mask [R, P] and completion_mask [R, T].
        actions: [R, T] completion ids.
        tokens: Budget of a microbatch: rows x (longest prompt + longest completion) stays below it. A row
            longer than the budget runs alone. On a CPU the budget is `CPU_TOKENS` at most.
        differentiable: Keep what all microbatches need for a backward.

    Returns:
        PolicyOutput with [R, T] tensors, 0 where not attended.
    """
    lengths = inputs["prompt_mask"].sum(dim=1) + inputs["completion_mask"].sum(dim=1)
    pieces: list[tuple[Tensor, PolicyOutput]] = []
    if actions.device.type == "cpu":
        tokens = min(tokens, CPU_TOKENS)
    with torch.set_grad_enabled(differentiable):
        for rows in length_sorted_batches(lengths.cpu(), tokens=tokens):
            rows = rows.to(actions.device)
            pieces.append((rows, policy({name: tensor[rows] for name, tensor in inputs.items()}, actions[rows])))
        order = torch.cat([rows for rows, _ in pieces]).argsort()
        with_values = pieces[0][1].values is not None
        return PolicyOutput(
            log_probs=torch.cat([piece.log_probs for _, piece in pieces])[order],
            entropy=torch.cat([piece.entropy for _, piece in pieces])[order],
            values=torch.cat([piece.values for _, piece in pieces])[order] if with_values else None,
        )


def length_sorted_batches(lengths: Tensor, *, tokens: int) -> Iterator[Tensor]:
    """Cut rows, longest first, into batches whose padded size stays within a token budget.

    Longest first, so that running out of memory shows at once and not at the end.

    Args:
        lengths: [R] tokens a row, on the CPU.
        tokens: Budget of rows x longest row.

    Yields:
        [n] row indices, n >= 1.

    >>> [batch.tolist() for batch in length_sorted_batches(torch.tensor([2, 5, 1, 4]), tokens=8)]
    [[1], [3, 0], [2]]
    """
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        count = max(1, tokens // longest)
        yield order[start : start + count]
        start += count


def measure_alone(
    function: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    inputs: Mapping[str, Tensor],
    actions: Tensor,
    *,
    tokens: int,
    differentiable: bool = False,
) -> Tensor:
    """As `measure`, for a function that returns one tensor [R, T]: a reference's log-probs, a critic's values."""

    def as_output(inputs: Mapping[str, Tensor], actions: Tensor) -> PolicyOutput:
        measured = function(inputs, actions)
        return PolicyOutput(log_probs=measured, entropy=measured, values=None)

    return measure(as_output, inputs, actions, tokens=tokens, differentiable=differentiable).log_probs
