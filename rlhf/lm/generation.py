"""Completions from a transformers model, several times faster than `model.generate` and with log-probs.

What makes it fast: each prompt is prefilled once and its cache repeated for the group; the cache is written in
place; the head sees one position per row; finished rows leave the batch; the attention mask is built once; models
like Llama decode through `fused_decoding`. The loop is in `decoding`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf.errors import ConfigError, DataError
from rlhf.lm.backbone import autocasting, evaluating, split_model, unwrap_adapters
from rlhf.lm.compilation import uncompiled
from rlhf.lm.decoding import Decoder, plan_decoding
from rlhf.lm.fusible_structure import has_fusible_structure
from rlhf.lm.graphed_decoding import GraphedDecoder, can_be_recorded
from rlhf.lm.sampling import SamplingConfig, choose_tokens

__all__ = ["Generation", "Generator", "SamplingConfig", "TransformersGenerator"]

DecodePath = Literal["graph", "fused", "model"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Completions of N prompts x G samples; rows are prompt 0 G times, prompt 1 G times, ..."""

    completion_ids: Tensor
    """[N * G, T] int64, padded on the right; T is the longest completion of this batch."""
    completion_mask: Tensor
    """[N * G, T] bool, True through the end token."""
    sampling_log_probs: Tensor
    """[N * G, T] float32 log-prob under the distribution sampled from (see `choose_tokens`), 0 where masked."""
    ended: Tensor
    """[N * G] bool, True where an end token came within the limit."""


class Generator(Protocol):
    """Anything that completes prompts."""

    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        group_size: int = 1,
        sampling: SamplingConfig,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Complete each of the left-padded prompts [N, P] `group_size` times."""
        ...


class TransformersGenerator:
    """Generation through the model's own layers; weights are shared with the policy, so it is always current.

    Args:
        model: A causal language model, bare or with LoRA adapters.
        end_token_ids: Tokens that end a completion.
        pad_token_id: Fills completions after their end; may equal an end token, masks tell them apart.
        backend: `in_place` (this module's loop) or `generate` (transformers' own `model.generate`, for models
            with recurrent or chunked layers, which `in_place` refuses).
        drop_finished: False keeps finished rows in the batch of `in_place`; only the time changes.
        dtype: The trainer's precision of products (bfloat16 in mixed precision), so that sampler and trainer round
            alike; None computes in the weights' own.
        cuda_graphs: On a GPU, record the decode step where the model allows (`graphed_decoding`).

    Attributes:
        decode_path: How the last batch was decoded (before the first: how it will be): `graph` (see
            `graphed_decoding`), `fused` (see `fused_decoding`) or `model` (the model's own forward). The tokens are
            the same, only the time differs.

    Raises:
        ModelError: The model's layers keep states that `in_place` cannot handle, or its logits cannot be repeated.
        ConfigError: There is no end token.
    """

    def __init__(
        self,
        model: Any,
        *,
        end_token_ids: int | Sequence[int],
        pad_token_id: int,
        backend: Literal["in_place", "generate"] = "in_place",
        drop_finished: bool = True,
        dtype: torch.dtype | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self.model = model
        self.end_token_ids = (
            [end_token_ids] if isinstance(end_token_ids, int) else [int(token) for token in end_token_ids]
        )
        self.pad_token_id = int(pad_token_id)
        self.backend, self.drop_finished, self.dtype = backend, drop_finished, dtype
        if not self.end_token_ids:
            raise ConfigError("generation needs at least one end token", where="end_token_ids")
        self._plan = plan_decoding(split_model(model)) if backend == "in_place" else None
        self._records = self._plan is not None and cuda_graphs and can_be_recorded(self._plan)
        self.decode_path: DecodePath = self._path(model.device, fused=self._plan is not None and self._plan.can_fuse)

    @torch.no_grad()  # not inference_mode: its tensors could never enter autograd later
    def generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        group_size: int = 1,
        sampling: SamplingConfig,
        generator: torch.Generator | None = None,
    ) -> Generation:
        """Complete each prompt `group_size` times.

        Args:
            prompt_ids: [N, P] int64, padded on the left.
            prompt_mask: [N, P] bool, True on real tokens.
            group_size: Samples per prompt.
            sampling: Temperature, filters, greatest length.
            generator: Source of randomness; None uses torch's global CPU generator.

        Returns:
            `Generation` with N * group_size rows.

        Raises:
            DataError: A prompt is empty or not padded on the left, or prompt and completion may exceed the context.
        """
        require_left_padding(prompt_ids, prompt_mask)
        require_room(self.model, prompt_mask, sampling)
        with evaluating(self.model), uncompiled(self.model):
            if self._plan is None:
                return self._generate(prompt_ids, prompt_mask, group_size, sampling, generator)
            fused = self._plan.can_fuse and has_fusible_structure(self._plan.parts.body, adapters=True)
            self.decode_path = self._path(prompt_ids.device, fused=fused)
            decoder = (GraphedDecoder if self.decode_path == "graph" else Decoder)(
                self._plan,
                prompt_ids,
                prompt_mask,
                group_size=group_size,
                sampling=sampling,
                generator=generator,
                end_token_ids=self.end_token_ids,
                drop_finished=self.drop_finished,
                dtype=self.dtype,
            )
            steps = decoder.run()
        return self._finish(decoder.token_ids[:steps].T, decoder.log_probs[:steps].T)

    def _path(self, device: torch.device, *, fused: bool) -> DecodePath:
        if not fused:
            return "model"
        return "graph" if self._records and device.type == "cuda" else "fused"

    def _generate(
        self,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        group_size: int,
        sampling: SamplingConfig,
        generator: torch.Generator | None,
    ) -> Generation:
        """The `generate` backend: transformers runs the loop, `_SamplingProcessor` chooses the tokens."""
        processor = _SamplingProcessor(sampling, generator)
        base = unwrap_adapters(self.model)
        defaults = base.generation_config
        # The model's own defaults (repetition penalty, forced tokens, ...) would change the distribution unseen.
        base.generation_config = GenerationConfig()
        try:
            with autocasting(prompt_ids.device, self.dtype):
                sequences = base.generate(
                    prompt_ids.repeat_interleave(group_size, dim=0),
                    attention_mask=prompt_mask.repeat_interleave(group_size, dim=0).long(),
                    max_new_tokens=sampling.max_completion_length,
                    do_sample=False,
                    eos_token_id=self.end_token_ids,
                    pad_token_id=self.pad_token_id,
                    logits_processor=LogitsProcessorList([processor]),
                )
        finally:
            base.generation_config = defaults
        return self._finish(sequences[:, prompt_ids.shape[1] :], torch.stack(processor.log_probs, dim=1))

    def _finish(self, token_ids: Tensor, log_probs: Tensor) -> Generation:
        """Cut each row after its first end token and the batch after its longest row."""
        is_end = torch.zeros_like(token_ids, dtype=torch.bool)
        for end_token_id in self.end_token_ids:
            is_end |= token_ids == end_token_id
        mask = (is_end.cumsum(dim=1) - is_end.long()) == 0  # no end token before this one
        longest = int(mask.sum(dim=1).max())
        token_ids, log_probs, mask = token_ids[:, :longest], log_probs[:, :longest], mask[:, :longest]
        return Generation(
            completion_ids=token_ids.masked_fill(~mask, self.pad_token_id).contiguous(),
            completion_mask=mask.contiguous(),
            sampling_log_probs=log_probs.masked_fill(~mask, 0.0).contiguous(),
            ended=is_end.any(dim=1),
        )


class _SamplingProcessor(LogitsProcessor):
    """Chooses the token itself and leaves transformers no other choice: same sampling, same log-probs."""

    def __init__(self, sampling: SamplingConfig, generator: torch.Generator | None) -> None:
        self.sampling, self.generator = sampling, generator
        self.log_probs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        device = self.generator.device if self.generator is not None else torch.device("cpu")
        uniforms = torch.rand(len(scores), generator=self.generator, device=device).to(scores.device)
        tokens, log_probs = choose_tokens(scores.float(), self.sampling, uniforms=uniforms)
        self.log_probs.append(log_probs)
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


def bring_up_to_date(generator: Generator) -> None:
    """Hand the policy's weights to a generator that keeps a copy of them; all processes call it alike.

    It is called before each rollout and each evaluation. `TransformersGenerator` shares the policy's weights and has
    no `synchronize`.
    """
    synchronize = getattr(generator, "synchronize", None)
    if synchronize is not None:
        synchronize()


def require_room(model: Any, prompt_mask: Tensor, sampling: SamplingConfig, *, limit: int | None = None) -> None:
    """Beyond its context a model has no positions (GPT-2 fails deep inside) or writes noise (rotary models).

    Args:
        model: Its config tells the context.
        prompt_mask: [N, P] bool.
        sampling: Tells the greatest length.
        limit: Of the generator itself, where it has less room.

    Raises:
        DataError: Longest prompt and completion have no room.
    """
    context = getattr(unwrap_adapters(model).config.get_text_config(), "max_position_embeddings", None)
    room = min((length for length in (context, limit) if length is not None), default=None)
    needed = int(prompt_mask.sum(dim=1).max()) + sampling.max_completion_length
    if room is not None and needed > room:
        raise DataError(
            "longest prompt and max_completion_length together exceed the model's context",
            where="sampling.max_completion_length",
            got=needed,
            expected=f"at most {room} tokens",
            remedy="Lower sampling.max_completion_length or the greatest prompt length.",
        )


def require_left_padding(prompt_ids: Tensor, prompt_mask: Tensor) -> None:
    """The last column must be real in every row, and no padding may follow a real token."""
    if prompt_ids.shape != prompt_mask.shape or prompt_ids.ndim != 2:
        raise DataError("prompt_ids and prompt_mask differ in shape", got=(prompt_ids.shape, prompt_mask.shape))
    if prompt_mask.dtype != torch.bool:
        raise DataError("the prompt mask must be bool", got=str(prompt_mask.dtype), remedy="Use mask.bool().")
    wrong = ~prompt_mask[:, -1:].all(dim=1) | (prompt_mask[:, :-1] & ~prompt_mask[:, 1:]).any(dim=1)
    if bool(wrong.any()):
        raise DataError(
            "a prompt is empty or not padded on the left",
            where=f"row {int(wrong.int().argmax())}",
            remedy="Pad prompts on the left; give empty prompts a bos token.",
        )
