"""What the step-0 doctor checks, and what it says: each check turns evidence into one finding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rlhf.config import Config
from rlhf.lm.evidence import Evidence

CheckName = Literal[
    "ratio", "kl", "generator", "reward", "reward_varies", "groups", "limit", "room", "end_token", "entropy", "credit"
]
Verdict = Literal["ok", "warning", "refused"]

ENOUGH = 32
"""Completions from which on 'all equal' is no accident any more."""
UNREACHABLE = -18.0
"""Log-probability (1.5e-8) below which an end token is taken for suppressed where nothing ended."""


class Finding(Config):
    """What one check found."""

    name: CheckName
    """Which check."""
    verdict: Verdict
    """`refused` stops the run."""
    measured: str
    """The number, in words."""
    remedy: str = ""
    """What it means and what to do; empty where all is well."""


def examine(evidence: Evidence, *, allow: Sequence[CheckName] = ()) -> list[Finding]:
    """All findings, in the order in which one would look.

    Args:
        evidence: Of the first rollout, over all processes.
        allow: Checks whose refusals become warnings.
    """
    findings: list[Finding | None] = [
        check_ratio(evidence),
        check_kl(evidence),
        check_generator(evidence),
        check_reward(evidence),
        check_reward_varies(evidence),
        check_groups(evidence),
        check_limit(evidence),
        check_room(evidence),
        check_end_token(evidence),
        check_entropy(evidence),
        check_credit(evidence),
    ]
    found = [finding for finding in findings if finding is not None]
    allowed = {"verdict": "warning"}
    return [f.model_copy(update=allowed) if f.verdict == "refused" and f.name in allow else f for f in found]


# --- the checks ---------------------------------------------------------------------------------------------------


def check_ratio(evidence: Evidence) -> Finding:
    """exp(log pi - log pi_old) must be 1 before the first step: policy and collected log-probs are the same model."""
    measured = f"|log ratio| mean {evidence.ratio.mean:.2g}, max {evidence.ratio.largest:.2g}"
    verdict = _grade(evidence.ratio.mean, evidence)
    if verdict == "ok":
        return Finding(name="ratio", verdict="ok", measured=measured)
    return Finding(name="ratio", verdict=verdict, measured=measured, remedy=_cause_of_difference(evidence))


def check_kl(evidence: Evidence) -> Finding | None:
    """The reference is the policy at its start, so that their log-probs are equal."""
    if evidence.kl is None:
        return None
    measured = f"|log policy - log reference| mean {evidence.kl.mean:.2g}, max {evidence.kl.largest:.2g}"
    verdict = _grade(evidence.kl.mean, evidence)
    if verdict == "ok":
        return Finding(name="kl", verdict="ok", measured=measured)
    if evidence.is_random or evidence.is_bfloat16:
        remedy = _cause_of_difference(evidence)
    elif evidence.reference_uses_adapters:
        remedy = "with its adapters off the policy is another model: start from fresh adapters on merged weights"
    else:
        remedy = "the reference is not the model that training starts from: load both from the same folder"
    return Finding(name="kl", verdict=verdict, measured=measured, remedy=remedy)


def check_generator(evidence: Evidence) -> Finding:
    """What the generator says it sampled with, against the trainer's forward; above 1e-3 nats something differs."""
    measured = f"|log mu - log pi| mean {evidence.mismatch.mean:.2g}, max {evidence.mismatch.largest:.2g}"
    if evidence.mismatch.mean <= 1e-3:
        return Finding(name="generator", verdict="ok", measured=measured)
    if not evidence.full_support:
        remedy = "top_p or top_k renormalise what is sampled from; old log-probs are the trainer's own, so that is fine"
        return Finding(name="generator", verdict="ok", measured=measured, remedy=remedy)
    refused = not evidence.mismatch.mean <= 0.05 and not evidence.corrects_mismatch
    remedy = (
        "generator and trainer are two distributions: compare their temperature, precision and attention "
        "implementation, and that the generator has the current weights; or set algorithm.rollout_correction"
    )
    return Finding(name="generator", verdict="refused" if refused else "warning", measured=measured, remedy=remedy)


def check_reward(evidence: Evidence) -> Finding:
    """Every completion has a finite reward, and every advantage is finite."""
    bad, count = evidence.unscored, len(evidence.scores)
    if bad:
        remedy = "the reward function has no answer there (None or nan): give each completion a number, 0 for instance"
        return Finding(name="reward", verdict="refused", measured=f"{bad} of {count} not finite", remedy=remedy)
    if not evidence.finite_advantages:
        remedy = "rewards are finite and advantages are not: look at the critic's values and the KL coefficient"
        return Finding(name="reward", verdict="refused", measured="advantages not finite", remedy=remedy)
    return Finding(name="reward", verdict="ok", measured=f"{count} finite, mean {evidence.score_mean:.3g}")


def check_reward_varies(evidence: Evidence) -> Finding:
    """A reward that is the same for every completion teaches nothing but noise."""
    lowest, highest = evidence.score_range
    measured = f"from {lowest:.3g} to {highest:.3g} over {len(evidence.scores)} completions"
    if highest > lowest or evidence.unscored:
        return Finding(name="reward_varies", verdict="ok", measured=measured)
    remedy = (
        "all got the same reward: test it on a good and a bad answer by hand, take prompts or start states that are "
        "neither solved nor hopeless, or fine-tune on demonstrations first"
    )
    verdict: Verdict = "refused" if len(evidence.scores) >= ENOUGH else "warning"
    return Finding(name="reward_varies", verdict=verdict, measured=measured, remedy=remedy)


def check_groups(evidence: Evidence) -> Finding | None:
    """Groups whose rewards are all equal have no advantage."""
    if evidence.uniform_groups is None:
        return None
    measured = f"{evidence.uniform_groups:.0%} of groups have equal rewards"
    if evidence.uniform_groups < 0.5 or not evidence.needs_groups:  # a critic's advantages need no group to differ
        return Finding(name="groups", verdict="ok", measured=measured)
    remedy = "these teach nothing: take a larger collector.group_size, a higher temperature, "
    remedy += "easier episodes" if evidence.turns else "prompts of middling difficulty, or collector.dynamic_sampling"
    hopeless = evidence.uniform_groups == 1.0 and len(evidence.scores) >= ENOUGH
    return Finding(name="groups", verdict="refused" if hopeless else "warning", measured=measured, remedy=remedy)


def check_limit(evidence: Evidence) -> Finding:
    """Completions cut at the limit are judged unfinished."""
    measured = f"{evidence.cut:.0%}{' of turns' if evidence.turns else ''} cut at {evidence.limit} tokens"
    if evidence.cut < 0.5:
        return Finding(name="limit", verdict="ok", measured=measured)
    remedy = "most answers are judged unfinished: raise collector.sampling.max_completion_length, or "
    if evidence.turns:
        remedy += "fine-tune on demonstrations first, which end"
    else:
        remedy += "teach stopping by collector.shaping.missing_end_score, or leave them out by collector.mask_truncated"
    return Finding(name="limit", verdict="warning", measured=measured, remedy=remedy)


def check_room(evidence: Evidence) -> Finding | None:
    """A conversation that is cut for want of tokens hides its outcome, and with it the reward."""
    if not evidence.turns:
        return None
    measured = f"{evidence.out_of_room:.0%} of episodes without room for one more turn"
    if evidence.out_of_room < 0.5:
        return Finding(name="room", verdict="ok", measured=measured)
    remedy = "most episodes end before their outcome: raise collector.max_episode_length"
    return Finding(name="room", verdict="warning", measured=measured, remedy=remedy)


def check_end_token(evidence: Evidence) -> Finding:
    """The model must be able to write the token that ends a completion."""
    if not evidence.end_in_vocabulary:
        remedy = "the tokenizer's end token has no logit in this model: use the model's own tokenizer"
        return Finding(name="end_token", verdict="refused", measured="outside the vocabulary", remedy=remedy)
    measured = f"best log-prob of an end {evidence.end_log_prob:.3g}, {1 - evidence.cut:.0%} ended"
    if evidence.cut < 1.0:
        return Finding(name="end_token", verdict="ok", measured=measured)
    remedy = (
        "no completion ended: check that the tokenizer's end token is the one the chat template and the model's "
        "training used (fine-tune on demonstrations that end), or raise the limit"
    )
    verdict: Verdict = "refused" if evidence.end_log_prob < UNREACHABLE else "warning"
    return Finding(name="end_token", verdict=verdict, measured=measured, remedy=remedy)


def check_entropy(evidence: Evidence) -> Finding | None:
    """A policy that is certain explores nothing."""
    if evidence.entropy is None:
        return None
    measured = f"{evidence.entropy:.3g} nats per token"
    if evidence.entropy >= 0.02:
        return Finding(name="entropy", verdict="ok", measured=measured)
    remedy = "the policy hardly varies its answers: raise the temperature, or fine-tune less before"
    return Finding(name="entropy", verdict="warning", measured=measured, remedy=remedy)


def _grade(mean: float, evidence: Evidence) -> Verdict:
    """Rounding is fine, more is suspicious, and a mean difference of a hundredth of a nat is another distribution."""
    fine, bearable = (1e-2, 5e-2) if evidence.is_bfloat16 else (1e-4, 1e-2)
    if mean <= fine:
        return "ok"
    return "warning" if mean <= bearable else "refused"  # nan is refused


def _cause_of_difference(evidence: Evidence) -> str:
    if evidence.is_random:
        return "two forwards over the same rows differ: some module draws at random (dropout); set its rate to 0"
    if evidence.old_is_sampled:
        return "old log-probs are the generator's, whose forward differs; set collector.old_log_probs=recompute"
    if evidence.is_bfloat16:
        return "bfloat16 rounds; use float32 weights with mixed_precision, or correct by algorithm.rollout_correction"
    return "the learner's forward differs from the collector's: temperature, precision, or weights that changed between"


def check_credit(evidence: Evidence) -> Finding | None:
    """With lambda 0 an action is told of its reward by the critic alone, and an untrained critic tells noise."""
    if evidence.one_step is None:
        return None
    measured = f"lambda is 0 for {evidence.one_step:.0%} of the rows"
    if evidence.one_step <= 0.5:
        return Finding(name="credit", verdict="ok", measured=measured)
    remedy = (
        "these rows are shorter than 1 / alpha, so that no action but the last sees the reward: raise "
        "algorithm.advantages.length_adaptive (20 / length gives lambda .95), or set it to null and gae_lambda"
    )
    return Finding(name="credit", verdict="warning", measured=measured, remedy=remedy)
