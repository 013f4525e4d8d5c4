"""What the step-0 doctor looks at: numbers about the first rollout, over all processes.

A rollout of completions and one of conversations are looked at alike: rows are scored, log-probs compared, and what is
cut at the limit of `max_completion_length` are completions there and turns here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.core.advantage_axis import Gae
from rlhf.core.advantages import length_adaptive_lambda
from rlhf.core.types import Experience, Rollout
from rlhf.data.tokenization import end_token_ids
from rlhf.lm.collector import PromptCollector
from rlhf.lm.episode_collector import EpisodeCollector
from rlhf.lm.judging import last_position
from rlhf.training.distributed import gather_objects
from rlhf.training.learner import Learner
from rlhf.training.sharding import whole_weights


@dataclass(frozen=True)
class Difference:
    """Absolute differences of log-probs over actions, nats."""

    mean: float
    largest: float


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Facts about the first rollout and those who made it."""

    ratio: Difference
    """Learner's forward against old log-probs."""
    kl: Difference | None
    """Old log-probs against the reference's; None without one."""
    mismatch: Difference
    """Generator's log-probs against old ones."""
    is_random: bool
    """Whether two forwards over the same rows differ."""
    is_bfloat16: bool
    """Whether weights or forwards are bfloat16."""
    old_is_sampled: bool
    """Whether old log-probs are the generator's own."""
    reference_uses_adapters: bool
    full_support: bool
    """Whether every token can be sampled."""
    corrects_mismatch: bool
    """Whether importance weights correct for the generator."""
    scores: list[float]
    """Rewards of all completions."""
    uniform_groups: float | None
    """Share of groups of equal rewards; None without groups."""
    needs_groups: bool
    finite_advantages: bool
    cut: float
    """Share of completions, or of turns, cut at the limit."""
    limit: int
    end_in_vocabulary: bool
    end_log_prob: float
    """Greatest log-prob of an end token at the looked-at positions."""
    entropy: float | None
    """Nats per token."""
    one_step: float | None = None
    """Share of rows too short for a length-adaptive lambda: it is 0 there. None where lambda is another."""
    turns: bool = False
    """Whether rows are conversations of several turns."""
    out_of_room: float = 0.0
    """Share of conversations cut because one more turn might have exceeded `max_episode_length`."""

    @property
    def unscored(self) -> int:
        """Completions whose reward is not finite."""
        return sum(not math.isfinite(score) for score in self.scores)

    @property
    def score_mean(self) -> float:
        """Mean reward."""
        return sum(self.scores) / len(self.scores)

    @property
    def score_range(self) -> tuple[float, float]:
        """Lowest and highest reward."""
        return min(self.scores), max(self.scores)


@torch.no_grad()
def gather_evidence(
    rollout: Rollout,
    experience: Experience,
    *,
    learner: Learner,
    collector: PromptCollector | EpisodeCollector,
    rows: int,
) -> Evidence:
    """Measure what `examine` judges; every process takes part and gets the same.

    Args:
        rollout: The first one, of this process.
        experience: What `estimate` made of it.
        learner: Whose forward counts.
        collector: Who made the rollout.
        rows: How many completions a process scores again.
    """
    mask, told = rollout.action_mask, rollout.metrics
    old, policy, settings = rollout.old_log_probs, learner.policy, collector.config
    again, is_random = _score_again(learner, rollout, rows, tokens=settings.measure_tokens)
    with whole_weights(policy):
        end = _end_log_prob(rollout, collector, rows=len(again))
    sampled = rollout.sampling_log_probs if rollout.sampling_log_probs is not None else old
    local = {
        "ratio": _moments(again - old[: len(again)], mask[: len(again)]),
        "kl": None if rollout.ref_log_probs is None else _moments(old - rollout.ref_log_probs, mask),
        "mismatch": _moments(sampled - old, mask),
        "random": is_random,
        "scores": rollout.scores.tolist(),
        "groups": [] if rollout.group_ids is None else rollout.group_ids.tolist(),
        "finite": bool(experience.advantages[mask].isfinite().all()),
        "end": end,
        "lambdas": _length_lambdas(rollout, learner),
    }
    parts = gather_objects(learner.accelerator, local)
    scores = [score for part in parts for score in part["scores"]]
    groups = [group for part in parts for group in part["groups"]]
    ends = [part["end"] for part in parts]
    return Evidence(
        ratio=_difference([part["ratio"] for part in parts]),
        kl=None if local["kl"] is None else _difference([part["kl"] for part in parts]),
        mismatch=_difference([part["mismatch"] for part in parts]),
        is_random=any(part["random"] for part in parts),
        is_bfloat16=learner.accelerator.mixed_precision == "bf16"
        or any(parameter.dtype == torch.bfloat16 for parameter in policy.parameters()),
        old_is_sampled=isinstance(collector, PromptCollector) and collector.config.old_log_probs == "sampling",
        reference_uses_adapters=collector.reference is not None and collector.reference.uses_adapters,
        full_support=settings.sampling.full_support,
        corrects_mismatch=learner.algorithm.rollout_correction is not None,
        scores=scores,
        uniform_groups=_uniform_share(scores, groups) if settings.group_size > 1 else None,
        needs_groups=learner.algorithm.needs_groups,
        finite_advantages=all(part["finite"] for part in parts),
        cut=told.get("rollout/cut_turns_fraction", told.get("rollout/truncated_fraction", 0.0)),
        limit=settings.sampling.max_completion_length,
        end_in_vocabulary=None not in ends,
        end_log_prob=max((end for end in ends if end is not None), default=-math.inf),
        entropy=told.get("rollout/entropy"),
        one_step=_share_of_zeros([value for part in parts for value in part["lambdas"]]),
        turns=isinstance(collector, EpisodeCollector),
        out_of_room=told.get("rollout/out_of_room_fraction", 0.0),
    )


def _score_again(learner: Learner, rollout: Rollout, rows: int, *, tokens: int) -> tuple[Tensor, bool]:
    """[n, T] log-probs as the learner computes them in an update, and whether a second look gives others."""
    longest = sum(rollout.inputs[name].shape[1] for name in ("prompt_mask", "completion_mask"))
    count = min(rows, len(rollout.actions), max(1, tokens // longest))
    inputs = {name: tensor[:count] for name, tensor in rollout.inputs.items()}
    first, second = (learner.score(inputs, rollout.actions[:count]).log_probs for _ in range(2))
    return first, not torch.equal(first, second)


def _end_log_prob(rollout: Rollout, collector: PromptCollector | EpisodeCollector, *, rows: int) -> float | None:
    """Greatest log-prob of an end token in the place of the first or the last action; None outside the vocabulary."""
    policy = collector.policy
    known = policy.model.config.get_text_config().vocab_size  # pyright: ignore[reportAttributeAccessIssue]
    ends = [token for token in end_token_ids(collector.tokenizer) if token < known]
    if not ends:
        return None
    mask = rollout.inputs["completion_mask"][:rows]
    best = -math.inf
    for places in (torch.arange(mask.shape[1], device=mask.device).eq(0) & mask, last_position(mask)):
        until = places.flip(1).cumsum(1).flip(1).bool() & mask  # the place and all before it
        inputs = {name: tensor[:rows] for name, tensor in rollout.inputs.items()} | {"completion_mask": until}
        for token in ends:
            actions = rollout.actions[:rows].masked_fill(places, token)
            best = max(best, policy.action_log_probs(inputs, actions)[places].max().item())
    return best


def _length_lambdas(rollout: Rollout, learner: Learner) -> list[float]:
    """Lambda of each row where it follows the row's length."""
    axis = learner.algorithm.advantages
    if not isinstance(axis, Gae) or axis.length_adaptive is None:
        return []
    return length_adaptive_lambda(rollout.action_mask, alpha=axis.length_adaptive).flatten().tolist()


def _share_of_zeros(values: list[float]) -> float | None:
    return sum(value == 0 for value in values) / len(values) if values else None


def _moments(difference: Tensor, mask: Tensor) -> tuple[float, float, float]:
    """Count, sum and maximum of |difference|."""
    values = difference[mask].abs().double()
    return float(len(values)), values.sum().item(), values.max().item() if len(values) else 0.0


def _difference(moments: list[tuple[float, float, float]]) -> Difference:
    count = sum(part[0] for part in moments)
    return Difference(mean=sum(part[1] for part in moments) / max(1.0, count), largest=max(part[2] for part in moments))


def _uniform_share(scores: list[float], groups: list[int]) -> float | None:
    """Share of groups of at least two whose scores are all equal."""
    members: dict[int, list[float]] = {}
    for group, score in zip(groups, scores, strict=True):
        members.setdefault(group, []).append(score)
    several = [own for own in members.values() if len(own) > 1]
    return sum(min(own) == max(own) for own in several) / len(several) if several else None
