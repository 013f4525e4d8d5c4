"""Prompts in, a rollout out: the language side of the one loop.

A batch of prompts is templated and left-padded, answered G times each, judged by a reward function, and measured by
a forward without gradients. The gym side replaces all of this by its own `collect`; everything after is shared.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.core.advantages import carry_values
from rlhf.core.types import PolicyOutput, Rollout
from rlhf.data.records import Prompt
from rlhf.data.tokenization import encode_prompts, require_special_tokens
from rlhf.errors import ConfigError, TrainingError
from rlhf.lm.collector_config import CollectorConfig, ShapingConfig
from rlhf.lm.generation import Generator
from rlhf.lm.measurement import measure, measure_log_probs
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.prompt_stream import PromptStream, mix_seed
from rlhf.lm.reference import FrozenReference
from rlhf.lm.rollout_metrics import (
    gather_metrics,
    measured_statistics,
    readable_samples,
    score_statistics,
    uniform_groups,
)
from rlhf.lm.samples import Samples, concatenate_samples, sample_completions, score_samples, select_samples
from rlhf.rewards.protocol import RewardFunction
from rlhf.rewards.shaping import missing_end_penalty, soft_overlong
from rlhf.training.distributed import gather_stack

logger = logging.getLogger(__name__)

RECHECK_EVERY = 20
"""Iterations after which `old_log_probs: auto` compares the generator with the trainer's forward again."""
AGREEMENT = 1e-5
"""Mean |log-prob difference| in nats below which the generator's log-probs stand for the trainer's."""


@dataclass(frozen=True)
class Judged:
    """Completions, the reward function's scores, and what shaping made of them; groups lie side by side."""

    samples: Samples
    scores: Tensor
    """[R] float32 on the CPU."""
    rewards: Tensor
    """[R] float32 on the CPU, after shaping."""
    reported: dict[str, float]
    """What the reward function said about itself."""

    def select(self, rows: Tensor) -> Judged:
        """The rows at integer indices [n]."""
        return Judged(select_samples(self.samples, rows.tolist()), self.scores[rows], self.rewards[rows], self.reported)


class PromptCollector:
    """Collects rollouts of completions; a `Collector`.

    Randomness is a function of (seed, iteration, process), so that a resumed run draws what the uninterrupted one
    would have drawn.

    Args:
        prompts: What to answer.
        policy: Measures old log-probs and values; shares its weights with the generator.
        generator: Answers.
        tokenizer: Encodes prompts, decodes completions.
        reward: Judges decoded text without special tokens.
        config: Sizes, lengths, shaping.
        single_step: The algorithm makes one optimizer step per rollout; `old_log_probs: auto` reads it.
        reference: Gives `ref_log_probs`; None where the algorithm needs none.
        accelerator: Whose processes share the prompts; None is one process.
        seed: Of the order of prompts and of sampling.

    Raises:
        ConfigError: Settings that do not fit one another.
        DataError: Prompts that are too long, or that the chat template refuses.
        ModelError: The tokenizer lacks a pad or an end token.
    """

    replicated = True
    """A checkpoint needs the state of one process only."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        policy: LanguageModelPolicy,
        generator: Generator,
        tokenizer: PreTrainedTokenizerBase,
        reward: RewardFunction,
        config: CollectorConfig,
        single_step: bool = False,
        reference: FrozenReference | None = None,
        accelerator: Accelerator | None = None,
        seed: int = 0,
    ) -> None:
        """Check what can be checked before any time is spent."""
        require_special_tokens(tokenizer)
        rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        _check_settings(config, prompts, policy=policy, processes=processes)
        self.policy, self.reference, self.generator = policy, reference, generator
        self.tokenizer, self.reward, self.config, self.accelerator = tokenizer, reward, config, accelerator
        # All prompts are encoded now, so that one that is too long is refused before any time is spent.
        self._prompts = list(prompts)
        self._encoded = encode_prompts(tokenizer, prompts, max_length=config.max_prompt_length)
        self._stream = PromptStream(
            len(prompts), batch=config.prompts_per_iteration, process=rank, processes=processes, seed=seed
        )
        self._quota = config.prompts_per_iteration // processes
        self._seed, self._rank, self._iteration = seed, rank, 0
        self._may_trust = single_step and config.sampling.full_support and not policy.has_critic
        self._trusts_generator = False

    def collect(self) -> Rollout:
        """Collect one rollout.

        Raises:
            RewardError: The reward function failed.
            TrainingError: Dynamic sampling found too few groups, or masking left nothing to learn from.
        """
        judged, metrics = self._judge_enough()
        groups = torch.arange(len(judged.scores)) // self.config.group_size
        if self.config.mask_truncated:
            rows = rows_to_learn_from(judged.samples.ended.cpu(), groups, grouped=self.config.group_size > 1)
            if len(rows) == 0:
                raise TrainingError(
                    "every completion was cut at the limit, and mask_truncated learns nothing from those",
                    where=f"iteration {self._iteration}",
                    remedy="Raise sampling.max_completion_length, or set mask_truncated to false.",
                )
            judged, groups = judged.select(rows), groups[rows]
        rollout = self._measure(judged, groups + self._rank * self._quota, metrics)
        self._iteration += 1
        return rollout

    def state_dict(self) -> dict[str, Any]:
        """Where the collector stands; equal on all processes."""
        return {
            "iteration": self._iteration,
            "prompts": self._stream.state_dict(),
            "trusts_generator": self._trusts_generator,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._iteration = int(state["iteration"])
        self._stream.load_state_dict(state["prompts"])
        self._trusts_generator = bool(state["trusts_generator"])

    # --- answering and judging ----------------------------------------------------------------------------------------

    def _judge_enough(self) -> tuple[Judged, dict[str, float]]:
        """One round of answers; with dynamic sampling as many as it takes to fill the batch with telling groups."""
        random = torch.Generator().manual_seed(mix_seed("sampling", self._seed, self._iteration, self._rank))
        dynamic, group_size = self.config.dynamic_sampling, self.config.group_size
        rounds = [self._judge(self._stream.take(), random)]
        while dynamic is not None and len(rounds) < dynamic.max_rounds and self._lacks_groups(rounds):
            rounds.append(self._judge(self._stream.take(), random))
        judged = _concatenate(rounds, pad_id=_pad_id(self.tokenizer))
        statistics = score_statistics(judged.samples, judged.scores, group_size=group_size)
        if dynamic is None:
            return judged, judged.reported | gather_metrics(statistics, accelerator=self.accelerator)
        groups, missing = telling_groups(judged.rewards, group_size=group_size, quota=self._quota)
        share = torch.tensor([missing / self._quota])
        statistics["uniform_groups_kept_fraction"] = ("mean", share, torch.ones_like(share, dtype=torch.bool))
        metrics = judged.reported | gather_metrics(statistics, accelerator=self.accelerator)
        metrics["rollout/rounds"] = float(len(rounds))
        self._report_shortfall(metrics["rollout/uniform_groups_kept_fraction"])
        rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
        return judged.select(rows), metrics

    def _judge(self, indices: list[int], random: torch.Generator) -> Judged:
        samples = sample_completions(
            self.generator,
            self.tokenizer,
            prompts=[self._prompts[index] for index in indices],
            encoded=[self._encoded[index] for index in indices],
            sampling=self.config.sampling,
            group_size=self.config.group_size,
            prompts_per_batch=self.config.generation_prompts,
            device=self.device,
            random=random,
        )
        scores, reported = score_samples(self.reward, samples)
        limit = self.config.sampling.max_completion_length
        rewards = shape_scores(
            scores, self.config.shaping, ended=samples.ended.cpu(), lengths=samples.lengths.cpu(), limit=limit
        )
        return Judged(samples, scores, rewards, reported)

    def _lacks_groups(self, rounds: Sequence[Judged]) -> bool:
        """Whether any process still has fewer telling groups than its share: all must go through the same rounds."""
        telling = sum(int((~uniform_groups(judged.rewards, self.config.group_size)).sum()) for judged in rounds)
        lacking = torch.tensor(float(telling < self._quota))
        return bool(lacking) if self.accelerator is None else bool(gather_stack(self.accelerator, lacking).any())

    def _report_shortfall(self, fraction: float) -> None:
        """Say, or refuse, that groups without any advantage fill the batch."""
        dynamic = self.config.dynamic_sampling
        if dynamic is None or fraction == 0.0:
            return
        what = f"after {dynamic.max_rounds} rounds {fraction:.0%} of the batch are groups whose scores are all equal"
        if dynamic.on_shortfall == "error":
            raise TrainingError(
                what,
                where=f"iteration {self._iteration}, dynamic sampling",
                remedy="Raise max_rounds, take prompts neither solved nor hopeless, or set on_shortfall: fill.",
            )
        logger.warning("Iteration %d: %s; they teach nothing.", self._iteration, what)

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _measure(self, judged: Judged, groups: Tensor, metrics: dict[str, float]) -> Rollout:
        """Add what the trainer's own forwards say, and put rewards where the completions end."""
        samples, mask = judged.samples, judged.samples.completion_mask
        inputs = {"prompt_ids": samples.prompt_ids, "prompt_mask": samples.prompt_mask, "completion_mask": mask}
        skips_forward = self._skips_forward()
        output = self._policy_output(inputs, samples, skips_forward=skips_forward)
        reference = None
        if self.reference is not None:
            with self._autocast():
                reference = measure_log_probs(
                    self.reference.log_probs, inputs, samples.completion_ids, tokens=self.config.measure_tokens
                )
        measured = measured_statistics(
            mask,
            old_log_probs=output.log_probs,
            sampling_log_probs=samples.sampling_log_probs,
            entropy=None if skips_forward else output.entropy,
            ref_log_probs=reference,
        )
        metrics |= gather_metrics(measured, accelerator=self.accelerator)
        if skips_forward:  # the generator was compared with itself
            metrics = {name: value for name, value in metrics.items() if "sampling_mismatch" not in name}
        else:
            self._trusts_generator = metrics["rollout/sampling_mismatch_mean"] < AGREEMENT
        ends = last_position(mask)
        return Rollout(
            inputs=inputs,
            actions=samples.completion_ids,
            action_mask=mask.clone(),
            rewards=torch.where(ends, judged.rewards.to(mask.device).unsqueeze(1), 0.0),
            old_log_probs=output.log_probs,
            episode_ends=ends,
            values=output.values,
            next_values=None if output.values is None else carry_values(output.values, mask, episode_ends=ends),
            ref_log_probs=reference,
            sampling_log_probs=samples.sampling_log_probs,
            group_ids=groups.to(mask.device),
            metrics=metrics,
            samples=readable_samples(samples, scores=judged.scores, rewards=judged.rewards, count=self.config.samples),
        )

    def _skips_forward(self) -> bool:
        """Whether the generator's log-probs serve as old log-probs in this iteration."""
        if self.config.old_log_probs == "auto":
            return self._may_trust and self._trusts_generator and self._iteration % RECHECK_EVERY != 0
        return self.config.old_log_probs == "sampling"

    def _policy_output(self, inputs: dict[str, Tensor], samples: Samples, *, skips_forward: bool) -> PolicyOutput:
        if skips_forward:
            log_probs = samples.sampling_log_probs.clone()
            return PolicyOutput(log_probs=log_probs, entropy=torch.zeros_like(log_probs), values=None)
        with self._autocast():
            return measure(self.policy, inputs, samples.completion_ids, tokens=self.config.measure_tokens)

    def _autocast(self) -> AbstractContextManager[None]:
        """The learner's precision: old log-probs of another precision would give ratios other than 1."""
        return nullcontext() if self.accelerator is None else self.accelerator.autocast()

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device


def last_position(mask: Tensor) -> Tensor:
    """[R, T] bool, True on the last unmasked position of each row: the end token, or where the limit cut.

    >>> last_position(torch.tensor([[True, True, False]]))
    tensor([[False,  True, False]])
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    return mask & (positions == torch.where(mask, positions, -1).amax(dim=1, keepdim=True))


def shape_scores(scores: Tensor, shaping: ShapingConfig, *, ended: Tensor, lengths: Tensor, limit: int) -> Tensor:
    """Turn a reward function's scores into rewards: clip, replace where the end is missing, punish length.

    Args:
        scores: [R].
        shaping: Which of these, in this order.
        ended: [R] bool, True where an end token came within the limit.
        lengths: [R] completion tokens.
        limit: The greatest completion length.

    Returns:
        [R]
    """
    if shaping.score_clip is not None:
        scores = scores.clamp(-shaping.score_clip, shaping.score_clip)
    if shaping.missing_end_score is not None:
        scores = missing_end_penalty(scores, ended, score=shaping.missing_end_score)
    if shaping.overlong_buffer is not None:
        scores = scores + soft_overlong(lengths, limit=limit, buffer=shaping.overlong_buffer)
    return scores


def rows_to_learn_from(ended: Tensor, groups: Tensor, *, grouped: bool) -> Tensor:
    """Rows that are left when completions cut at the limit drop out, and with them groups of which one row is left.

    >>> rows_to_learn_from(torch.tensor([True, False, True, True]), torch.tensor([0, 0, 1, 1]), grouped=True)
    tensor([2, 3])
    """
    kept = ended.clone()
    if grouped:
        sizes = torch.zeros(int(groups.max()) + 1, dtype=torch.int64).index_add_(0, groups, ended.long())
        kept &= sizes[groups] > 1
    return kept.nonzero().squeeze(1)


def telling_groups(rewards: Tensor, *, group_size: int, quota: int) -> tuple[Tensor, int]:
    """The first `quota` groups whose rewards differ, filled up with uniform ones where there are too few.

    Args:
        rewards: [N * group_size].
        group_size: Rows of a group, side by side.
        quota: Groups to return; N >= quota.

    Returns:
        Group numbers [quota] in ascending order, and how many of them are uniform.

    >>> telling_groups(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), group_size=2, quota=2)
    (tensor([0, 1]), 1)
    """
    uniform = uniform_groups(rewards, group_size)
    preferred = uniform.to(torch.int8).argsort(stable=True)[:quota]
    return preferred.sort().values, int(uniform[preferred].sum())


def _concatenate(rounds: Sequence[Judged], *, pad_id: int) -> Judged:
    if len(rounds) == 1:
        return rounds[0]
    return Judged(
        samples=concatenate_samples([judged.samples for judged in rounds], pad_id=pad_id),
        scores=torch.cat([judged.scores for judged in rounds]),
        rewards=torch.cat([judged.rewards for judged in rounds]),
        reported={name: _mean([judged.reported[name] for judged in rounds]) for name in rounds[0].reported},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.pad_token_id, int), "require_special_tokens ran"
    return tokenizer.pad_token_id


def _check_settings(
    config: CollectorConfig, prompts: Sequence[Prompt], *, policy: LanguageModelPolicy, processes: int
) -> None:
    """Refuse what would fail, or silently mean something else, in the first iteration."""
    if not prompts:
        raise ConfigError("there is no prompt to answer", where="prompts", remedy="Check the data file and its limit.")
    if config.prompts_per_iteration % processes:
        raise ConfigError(
            "the prompts of an iteration cannot be shared evenly",
            where="collector.prompts_per_iteration",
            got=config.prompts_per_iteration,
            expected=f"a multiple of the {processes} processes",
        )
    if config.sampling.temperature != policy.temperature:
        raise ConfigError(
            "completions are drawn at one temperature and scored at another, so every ratio would be wrong",
            where="collector.sampling.temperature",
            got=config.sampling.temperature,
            expected=f"the policy's {policy.temperature}",
        )
    if config.old_log_probs == "sampling" and policy.has_critic:
        raise ConfigError(
            "a critic needs the forward that old_log_probs: sampling saves",
            where="collector.old_log_probs",
            remedy="Set it to recompute.",
        )
