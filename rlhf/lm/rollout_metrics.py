"""What a rollout of completions looked like: scalars for the log and a few readable records."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.lm.samples import Samples
from rlhf.rewards.protocol import text_of
from rlhf.training.distributed import gather_stack

Statistics = dict[str, tuple[str, Tensor, Tensor]]
"""Name -> (kind, tensor, mask): kind `mean`, `std` or `max` over the tensor's elements where mask is True."""


def score_statistics(samples: Samples, scores: Tensor, *, group_size: int) -> Statistics:
    """What was answered and how it was judged.

    Args:
        samples: R completions, every one that was generated, also those that the rollout does not keep.
        scores: [R] raw scores of the reward function, before shaping.
        group_size: Rows of a group, which lie side by side.
    """
    lengths = samples.lengths.float()
    scores = scores.to(lengths.device).float()
    every_row = torch.ones_like(samples.ended)
    statistics: Statistics = {
        "score_mean": ("mean", scores, every_row),
        "score_std": ("std", scores, every_row),
        "length_mean": ("mean", lengths, every_row),
        "length_max": ("max", lengths, every_row),
        "ended_fraction": ("mean", samples.ended.float(), every_row),
        "truncated_fraction": ("mean", (~samples.ended).float(), every_row),
    }
    if group_size > 1:
        uniform = uniform_groups(scores, group_size)
        statistics["uniform_groups_fraction"] = ("mean", uniform.float(), torch.ones_like(uniform))
    return statistics


def measured_statistics(
    mask: Tensor,
    *,
    old_log_probs: Tensor,
    sampling_log_probs: Tensor,
    entropy: Tensor | None,
    ref_log_probs: Tensor | None,
) -> Statistics:
    """What the trainer's forwards say about the rows that the rollout keeps.

    `sampling_mismatch` is |log mu - log pi_old|: 0 up to rounding when generator and trainer compute the same thing
    (a mean above 1e-3 is a bug or a filter such as top-p). `kl_to_ref` is the k1 estimate: exactly 0 before the first
    update, and a clearly negative mean is a bug as well.

    Args:
        mask: [R, T] True on completion tokens.
        old_log_probs: [R, T].
        sampling_log_probs: [R, T].
        entropy: [R, T], or None where no forward was made: nothing is compared then.
        ref_log_probs: [R, T], or None without a reference.
    """
    statistics: Statistics = {}
    if entropy is not None:
        mismatch = (sampling_log_probs - old_log_probs).abs()
        statistics["sampling_mismatch_mean"] = ("mean", mismatch, mask)
        statistics["sampling_mismatch_max"] = ("max", mismatch, mask)
        statistics["entropy"] = ("mean", entropy, mask)
    if ref_log_probs is not None:
        log_ratio = torch.where(mask, old_log_probs - ref_log_probs, 0.0)
        statistics["kl_to_ref"] = ("mean", log_ratio, mask)
        statistics["kl_to_ref_per_sequence"] = ("mean", log_ratio.sum(dim=1), mask.any(dim=1))
    return statistics


def uniform_groups(scores: Tensor, group_size: int) -> Tensor:
    """[N] bool, True where all scores of a group are equal, so that every advantage in it is 0.

    >>> uniform_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), 2)
    tensor([ True, False])
    """
    grouped = scores.view(-1, group_size)
    return grouped.amax(dim=1) == grouped.amin(dim=1)


def gather_metrics(statistics: Statistics, *, accelerator: Accelerator | None) -> dict[str, float]:
    """Reduce over elements and processes in one collective.

    Returns:
        `rollout/<name>` -> value; a standard deviation is the population's.
    """
    local = torch.stack([_moments(tensor, mask) for _, tensor, mask in statistics.values()])  # [M, 4]
    gathered = local.cpu().unsqueeze(0) if accelerator is None else gather_stack(accelerator, local)
    count, total, squares = gathered[..., 0].sum(0), gathered[..., 1].sum(0), gathered[..., 2].sum(0)
    largest = gathered[..., 3].amax(0)
    metrics = {}
    for index, (name, (kind, _, _)) in enumerate(statistics.items()):
        n = max(1.0, count[index].item())
        mean = total[index].item() / n
        match kind:
            case "mean":
                value = mean
            case "std":
                value = math.sqrt(max(0.0, squares[index].item() / n - mean * mean))
            case _:
                value = largest[index].item()
        metrics[f"rollout/{name}"] = value
    return metrics


def _moments(tensor: Tensor, mask: Tensor) -> Tensor:
    """[4] float64: count, sum, sum of squares, maximum of the unmasked elements."""
    kept = tensor[mask].double()
    largest = kept.amax() if len(kept) else kept.new_tensor(-math.inf)
    return torch.stack([kept.new_tensor(float(len(kept))), kept.sum(), (kept * kept).sum(), largest])


def readable_samples(samples: Samples, *, scores: Tensor, rewards: Tensor, count: int) -> list[dict[str, Any]]:
    """The first `count` completions as records for people.

    Args:
        samples: R completions.
        scores: [R] of the reward function.
        rewards: [R] after shaping.
        count: How many, spread evenly over the rows so that they come from different prompts.
    """
    rows = [round(index * len(samples.prompts) / max(1, count)) for index in range(min(count, len(samples.prompts)))]
    lengths, ended = samples.lengths.tolist(), samples.ended.tolist()
    return [
        {
            "prompt": samples.prompts[row].prompt,
            "completion": text_of(samples.completions[row]),
            "score": round(float(scores[row]), 6),
            "reward": round(float(rewards[row]), 6),
            "length": int(lengths[row]),
            "ended": bool(ended[row]),
        }
        for row in rows
    ]
