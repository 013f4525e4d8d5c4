"""Prompts in, completions and their scores out: the part of a rollout that evaluation and ranking makers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.collation import left_pad
from rlhf.data.records import Prompt, Text
from rlhf.data.tokenization import decode_completion, encode_prompts
from rlhf.errors import RewardError
from rlhf.lm.generation import Generator
from rlhf.lm.sampling import SamplingConfig
from rlhf.rewards.combination import CombinedReward
from rlhf.rewards.protocol import RewardFunction, RewardLog, score_completions


@dataclass(frozen=True)
class Samples:
    """Completions of N prompts, G each. Rows are ordered prompt 0 x G, prompt 1 x G, ...; R = N x G."""

    prompts: list[Prompt]
    """[R] the prompt of each row."""
    prompt_ids: Tensor
    """[R, P] int64, padded on the left."""
    prompt_mask: Tensor
    """[R, P] bool, True on the prompt's own tokens."""
    completion_ids: Tensor
    """[R, T] int64."""
    completion_mask: Tensor
    """[R, T] bool, True through the end token."""
    sampling_log_probs: Tensor
    """[R, T] as the generator reported them."""
    ended: Tensor
    """[R] bool, True where the completion ends with an end token rather than at the limit."""
    completions: list[Text]
    """[R] decoded without special tokens; for chat prompts a message list, as in TRL."""

    @property
    def lengths(self) -> Tensor:
        """[R] completion tokens, end token included."""
        return self.completion_mask.sum(dim=1)


def sample_completions(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    group_size: int = 1,
    encoded: Sequence[list[int]] | None = None,
    max_prompt_length: int | None = None,
    prompts_per_batch: int | None = None,
    device: torch.device | str = "cpu",
    random: torch.Generator | None = None,
) -> Samples:
    """Template, pad, generate and decode.

    Args:
        generator: Draws the completions.
        tokenizer: Encodes prompts (chat template for message lists) and decodes completions.
        prompts: N prompts, N >= 1.
        sampling: Temperature, lengths and filters.
        group_size: Completions per prompt.
        encoded: The prompts' token ids, where they are known already.
        max_prompt_length: Longer prompts are refused, never cut. None: no limit.
        prompts_per_batch: Prompts generated at once; bounds the memory of the cache. None: all.
        device: Where token ids are put.
        random: Source of randomness; None uses torch's global one.

    Returns:
        Samples with R = N x group_size rows.

    Raises:
        DataError: A prompt is longer than `max_prompt_length`.
    """
    if encoded is None:
        encoded = encode_prompts(tokenizer, prompts, max_length=max_prompt_length)
    step = prompts_per_batch or len(prompts)
    parts = [
        _sample_batch(
            generator,
            tokenizer,
            prompts=prompts[start : start + step],
            encoded=encoded[start : start + step],
            sampling=sampling,
            group_size=group_size,
            device=device,
            random=random,
        )
        for start in range(0, len(prompts), step)
    ]
    return concatenate_samples(parts, pad_id=_pad_id(tokenizer))


def _sample_batch(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[Prompt],
    encoded: Sequence[list[int]],
    sampling: SamplingConfig,
    group_size: int,
    device: torch.device | str,
    random: torch.Generator | None,
) -> Samples:
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in left_pad(encoded, _pad_id(tokenizer)))
    generation = generator.generate(prompt_ids, prompt_mask, group_size=group_size, sampling=sampling, generator=random)
    rows = [prompt for prompt in prompts for _ in range(group_size)]
    texts = [
        decode_completion(tokenizer, ids, mask)
        for ids, mask in zip(generation.completion_ids.cpu(), generation.completion_mask.cpu(), strict=True)
    ]
    return Samples(
        prompts=rows,
        prompt_ids=prompt_ids.repeat_interleave(group_size, dim=0),
        prompt_mask=prompt_mask.repeat_interleave(group_size, dim=0),
        completion_ids=generation.completion_ids,
        completion_mask=generation.completion_mask,
        sampling_log_probs=generation.sampling_log_probs,
        ended=generation.ended,
        completions=[as_completion(row.prompt, text) for row, text in zip(rows, texts, strict=True)],
    )


def as_completion(prompt: Text, text: str) -> Text:
    """A completion in the shape reward functions expect: text for text, an assistant message for chat (TRL's rule).

    >>> as_completion([{"role": "user", "content": "hi"}], "hello")
    [{'role': 'assistant', 'content': 'hello'}]
    """
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


@dataclass(frozen=True)
class Verdict:
    """What a reward function said about R completions."""

    scores: Tensor
    """[R] float32 on the CPU."""
    reported: dict[str, float]
    """What it reported about itself, as `reward/<name>` -> mean."""
    token_scores: list[list[float]] | None = None
    """[R] lists with one number per completion token, where it gave rewards per token or step."""
    parts: Tensor | None = None
    """[R, P] what the parts of a combined reward gave, before weighting; NaN where a part does not apply."""
    part_weights: tuple[float, ...] = ()
    """P factors of the parts."""

    def select(self, rows: Tensor) -> Verdict:
        """The rows at integer indices [n]."""
        tokens = self.token_scores
        return replace(
            self,
            scores=self.scores[rows],
            token_scores=None if tokens is None else [tokens[row] for row in rows.tolist()],
            parts=None if self.parts is None else self.parts[rows],
        )

    @staticmethod
    def concatenate(verdicts: Sequence[Verdict]) -> Verdict:
        """Verdicts of one reward function under one another; what it reported is averaged."""
        first = verdicts[0]
        tokens = [verdict.token_scores for verdict in verdicts if verdict.token_scores is not None]
        if tokens and len(tokens) < len(verdicts):
            raise RewardError("the reward function gave rewards per token in some calls and per completion in others")
        parts = [verdict.parts for verdict in verdicts if verdict.parts is not None]
        return Verdict(
            scores=torch.cat([verdict.scores for verdict in verdicts]),
            reported={
                name: sum(verdict.reported[name] for verdict in verdicts) / len(verdicts) for name in first.reported
            },
            token_scores=[row for part in tokens for row in part] if tokens else None,
            parts=torch.cat(parts) if parts else None,
            part_weights=first.part_weights,
        )


def score_samples(reward: RewardFunction, samples: Samples) -> tuple[Tensor, dict[str, float]]:
    """Ask a reward function for one score a completion.

    Args:
        reward: Sees decoded text, token ids, and the prompts' other columns by name.
        samples: R completions.

    Returns:
        [R] float32 on the CPU, and what the reward function reported about itself, as `reward/<name>` -> mean.

    Raises:
        RewardError: It raised, returned a wrong number of scores, or something that is no number.
    """
    verdict = judge_samples(reward, samples)
    return verdict.scores, verdict.reported


def judge_samples(reward: RewardFunction, samples: Samples) -> Verdict:
    """Ask a reward function about completions: scores, rewards per token, and the parts of a combination.

    Args:
        reward: Sees decoded text, token ids, and the prompts' other columns by name.
        samples: R completions.

    Raises:
        RewardError: It raised, returned a wrong number of scores, or something that is no number.
    """
    names = sorted({name for prompt in samples.prompts for name in prompt.columns})
    columns: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt in samples.prompts] for name in names}
    log = RewardLog()
    scores = score_completions(
        reward,
        prompts=[prompt.prompt for prompt in samples.prompts],
        completions=samples.completions,
        columns=columns,
        completion_ids=[
            ids[: int(length)] for ids, length in zip(samples.completion_ids.tolist(), samples.lengths, strict=True)
        ],
        log=log,
    )
    reported = {f"reward/{name}": sum(values) / len(values) for name, values in log.metrics.items()}
    if not isinstance(reward, CombinedReward):
        return Verdict(scores, reported, log.token_scores)
    return Verdict(scores, reported | reward.metrics(), log.token_scores, *reward.part_scores())


def concatenate_samples(parts: Sequence[Samples], *, pad_id: int) -> Samples:
    """Rows of several batches under one another: prompts padded on the left, completions on the right.

    Args:
        parts: At least one batch.
        pad_id: Token id for the padding.
    """
    if len(parts) == 1:
        return parts[0]
    prompt_width = max(part.prompt_ids.shape[1] for part in parts)
    completion_width = max(part.completion_ids.shape[1] for part in parts)

    def stack(name: str, width: int, value: float, *, left: bool) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        missing = [width - tensor.shape[1] for tensor in tensors]
        sides = [(gap, 0) if left else (0, gap) for gap in missing]
        return torch.cat(
            [torch.nn.functional.pad(tensor, side, value=value) for tensor, side in zip(tensors, sides, strict=True)]
        )

    return Samples(
        prompts=[prompt for part in parts for prompt in part.prompts],
        prompt_ids=stack("prompt_ids", prompt_width, pad_id, left=True),
        prompt_mask=stack("prompt_mask", prompt_width, False, left=True),
        completion_ids=stack("completion_ids", completion_width, pad_id, left=False),
        completion_mask=stack("completion_mask", completion_width, False, left=False),
        sampling_log_probs=stack("sampling_log_probs", completion_width, 0.0, left=False),
        ended=torch.cat([part.ended for part in parts]),
        completions=[completion for part in parts for completion in part.completions],
    )


def select_samples(samples: Samples, rows: Sequence[int]) -> Samples:
    """The samples at `rows`, in that order."""
    index = torch.as_tensor(rows, dtype=torch.int64, device=samples.prompt_ids.device)
    tensors = {
        name: getattr(samples, name)[index]
        for name in (
            "prompt_ids",
            "prompt_mask",
            "completion_ids",
            "completion_mask",
            "sampling_log_probs",
            "ended",
        )
    }
    return Samples(
        prompts=[samples.prompts[row] for row in rows],
        completions=[samples.completions[row] for row in rows],
        **tensors,
    )


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    assert tokenizer.pad_token_id is not None, "require_special_tokens runs before any sampling"
    return int(tokenizer.pad_token_id)
