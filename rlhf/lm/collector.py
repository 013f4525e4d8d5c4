"""Prompts in, a rollout out: the language side of the one loop.

A batch of prompts is templated and left-padded, answered G times each, judged by a reward function, and measured by
a forward without gradients. The gym side replaces all of this by its own `collect`; everything after is shared.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.core.advantages import carry_values
from rlhf.core.algorithm import AlgorithmConfig, GreedyBaseline, GroupRelativeParts
from rlhf.core.types import PolicyOutput, Rollout
from rlhf.data.records import Prompt
from rlhf.data.tokenization import encode_prompts, require_special_tokens
from rlhf.errors import ConfigError, TrainingError
from rlhf.lm.collector_config import CollectorConfig
from rlhf.lm.generation import Generator, bring_up_to_date
from rlhf.lm.judging import (
    Judged,
    concatenate_judged,
    last_position,
    rows_to_learn_from,
    shape_scores,
    telling_groups,
)
from rlhf.lm.measurement import RECHECK_EVERY, measure, measure_alone, step_gives_old_log_probs
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
from rlhf.lm.samples import Samples, judge_samples, sample_completions
from rlhf.rewards.combination import CombinedReward
from rlhf.rewards.protocol import RewardFunction
from rlhf.training.distributed import gather_stack
from rlhf.training.sharding import is_sharded, whole_weights

logger = logging.getLogger(__name__)

AGREEMENT = 1e-5
"""Mean |log-prob difference| in nats below which the generator's log-probs stand for the trainer's."""


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
        algorithm: What will learn from the rollouts: ReMax wants greedy completions besides, GDPO a reward of parts.
            None collects what all others need.
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
        algorithm: AlgorithmConfig | None = None,
        reference: FrozenReference | None = None,
        accelerator: Accelerator | None = None,
        seed: int = 0,
    ) -> None:
        """Check what can be checked before any time is spent."""
        require_special_tokens(tokenizer)
        rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        _check_settings(config, prompts, policy=policy, processes=processes)
        _check_algorithm(algorithm, config, reward)
        if config.keep_forward:
            _check_keeping(policy, algorithm, processes=processes)
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
        # A head on the policy's hidden states needs the policy's forward in any case.
        may_skip = not policy.has_critic or policy.critic is not None
        self._may_trust = may_skip and config.sampling.full_support
        self._trusts_generator = False
        self._takes_one_step = may_skip and step_gives_old_log_probs(
            algorithm, sampling=config.sampling, has_reference=reference is not None
        )
        self._greedy_baseline = algorithm is not None and isinstance(algorithm.advantages, GreedyBaseline)

    def collect(self) -> Rollout:
        """Collect one rollout.

        Raises:
            RewardError: The reward function failed.
            TrainingError: Dynamic sampling found too few groups, or masking left nothing to learn from.
        """
        with whole_weights(self.policy):
            return self._collect()

    def _collect(self) -> Rollout:
        bring_up_to_date(self.generator)
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
        judged = concatenate_judged(rounds, pad_id=_pad_id(self.tokenizer))
        reported = judged.verdict.reported
        statistics = score_statistics(judged.samples, judged.scores, group_size=group_size)
        if judged.baselines is not None:
            statistics["greedy_reward_mean"] = ("mean", judged.baselines, torch.ones(len(judged.rewards)).bool())
        if dynamic is None:
            return judged, reported | gather_metrics(statistics, accelerator=self.accelerator)
        groups, missing = telling_groups(judged.rewards, group_size=group_size, quota=self._quota)
        share = torch.tensor([missing / self._quota])
        statistics["uniform_groups_kept_fraction"] = ("mean", share, torch.ones_like(share, dtype=torch.bool))
        metrics = reported | gather_metrics(statistics, accelerator=self.accelerator)
        metrics["rollout/rounds"] = float(len(rounds))
        metrics["rollout/refills"] = float(len(rounds) - 1)
        self._report_shortfall(metrics["rollout/uniform_groups_kept_fraction"])
        rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
        return judged.select(rows), metrics

    def _judge(self, indices: list[int], random: torch.Generator) -> Judged:
        judged = self._answer(indices, random, group_size=self.config.group_size)
        if not self._greedy_baseline:
            return judged
        greedy = self._answer(indices, random, group_size=1, greedy=True)
        return replace(judged, baselines=greedy.rewards.repeat_interleave(self.config.group_size))

    def _answer(self, indices: list[int], random: torch.Generator, *, group_size: int, greedy: bool = False) -> Judged:
        samples = sample_completions(
            self.generator,
            self.tokenizer,
            prompts=[self._prompts[index] for index in indices],
            encoded=[self._encoded[index] for index in indices],
            sampling=self.config.sampling.model_copy(update={"greedy": greedy}),
            group_size=group_size,
            prompts_per_batch=self.config.generation_prompts,
            device=self.device,
            random=random,
        )
        verdict = judge_samples(self.reward, samples)
        limit = self.config.sampling.max_completion_length
        ended, lengths = samples.ended.cpu(), samples.lengths.cpu()
        rewards = shape_scores(verdict.scores, self.config.shaping, ended=ended, lengths=lengths, limit=limit)
        return Judged(samples, verdict, rewards)

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
        source = self._source_of_old_log_probs()
        live = self._policy_output(inputs, samples, skips_forward=source != "forward")
        output = PolicyOutput(*(None if one is None else one.detach() for one in live))  # type: ignore[arg-type]
        reference = None
        if self.reference is not None:
            with self._autocast():
                reference = measure_alone(
                    self.reference.log_probs, inputs, samples.completion_ids, tokens=self.config.measure_tokens
                )
        measured = measured_statistics(
            mask,
            old_log_probs=output.log_probs,
            sampling_log_probs=samples.sampling_log_probs,
            entropy=output.entropy if source == "forward" else None,
            ref_log_probs=reference,
        )
        if measured:
            metrics |= gather_metrics(measured, accelerator=self.accelerator)
        if source == "forward":
            self._trusts_generator = metrics["rollout/sampling_mismatch_mean"] < AGREEMENT
        ends = last_position(mask)
        parts, part_weights = judged.parts()
        return Rollout(
            inputs=inputs,
            actions=samples.completion_ids,
            action_mask=mask.clone(),
            rewards=judged.placed(ends.cpu()).to(mask.device),
            old_log_probs=output.log_probs,
            on_policy=source == "step",
            episode_ends=ends,
            values=output.values,
            live_log_probs=_differentiable(live.log_probs),
            live_entropy=_differentiable(live.entropy),
            live_values=_differentiable(live.values),
            next_values=None if output.values is None else carry_values(output.values, mask, episode_ends=ends),
            ref_log_probs=reference,
            sampling_log_probs=samples.sampling_log_probs,
            group_ids=groups.to(mask.device),
            baselines=None if judged.baselines is None else judged.baselines.to(mask.device),
            reward_parts=None if parts is None else parts.to(mask.device),
            part_weights=part_weights,
            metrics=metrics,
            samples=readable_samples(samples, scores=judged.scores, rewards=judged.rewards, count=self.config.samples),
        )

    def _source_of_old_log_probs(self) -> Literal["generator", "step", "forward"]:
        """Who gives this iteration's: the generator, the one step made of the rollout, or a forward before it."""
        if self.config.old_log_probs == "sampling":
            return "generator"
        if self.config.old_log_probs == "recompute" or self._iteration % RECHECK_EVERY == 0:
            return "forward"
        if self._may_trust and self._trusts_generator:
            return "generator"
        return "step" if self._takes_one_step else "forward"

    def _policy_output(self, inputs: dict[str, Tensor], samples: Samples, *, skips_forward: bool) -> PolicyOutput:
        actions, tokens, keeps = samples.completion_ids, self.config.measure_tokens, self.config.keep_forward
        values, own_critic = None, self.policy.critic is not None
        with self._autocast():
            if own_critic:
                values = measure_alone(self.policy.action_values, inputs, actions, tokens=tokens, differentiable=keeps)
            if not skips_forward:
                # Of two bodies the critic's forward is kept: it is the one that is made in every iteration.
                score, keeps = partial(self.policy, with_values=not own_critic), keeps and not own_critic
                output = measure(score, inputs, actions, tokens=tokens, differentiable=keeps)
                return output._replace(values=values) if own_critic else output
        log_probs = samples.sampling_log_probs.clone()
        return PolicyOutput(log_probs=log_probs, entropy=torch.zeros_like(log_probs), values=values)

    def _autocast(self) -> AbstractContextManager[None]:
        """The learner's precision: old log-probs of another precision would give ratios other than 1."""
        return nullcontext() if self.accelerator is None else self.accelerator.autocast()

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device


def _differentiable(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is not None and tensor.requires_grad else None


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
    if config.old_log_probs == "sampling" and policy.has_critic and policy.critic is None:
        raise ConfigError(
            "a critic on the policy's hidden states needs the forward that old_log_probs: sampling saves",
            where="collector.old_log_probs",
            remedy="Set it to recompute, or give the critic a body of its own.",
        )


def _check_keeping(policy: LanguageModelPolicy, algorithm: AlgorithmConfig | None, *, processes: int) -> None:
    """Refuse to keep a forward that no epoch could use."""
    if processes > 1:
        what = f"one process, and there are {processes}"
    elif is_sharded(policy):
        what = "whole weights, and these are sharded: they are whole for the rollout only"
    elif algorithm is not None and algorithm.minibatches > 1:
        what = (
            f"one minibatch, and the algorithm has {algorithm.minibatches}: most of them meet weights that have moved"
        )
    else:
        return
    raise ConfigError(
        f"a forward can be kept for {what}",
        where="collector.keep_forward",
        got="true",
        remedy="Set it to false.",
    )


def _check_algorithm(algorithm: AlgorithmConfig | None, config: CollectorConfig, reward: RewardFunction) -> None:
    """Refuse rewards and shaping that an algorithm which compares parts of the reward could not read."""
    if algorithm is None or not isinstance(algorithm.advantages, GroupRelativeParts):
        return
    if not isinstance(reward, CombinedReward):
        raise ConfigError(
            "group_relative_parts compares the parts of a reward, and there is one function only",
            where="algorithm.advantages",
            remedy="Give `reward` as a list, or use group_relative.",
        )
    shaping = config.shaping
    if shaping.score_clip is not None or shaping.missing_end_score is not None:
        raise ConfigError(
            "score_clip and missing_end_score change the sum of the rewards, but group_relative_parts reads the parts",
            where="collector.shaping",
            remedy="Remove them; a penalty for long completions (overlong_buffer) counts as a part.",
        )
