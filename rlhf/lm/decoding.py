"""The decode loop: one token for every unfinished row per step, until all rows are finished."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.cache_utils import get_layer_types_and_kwargs

from rlhf.errors import ModelError
from rlhf.lm.backbone import CausalParts, autocasting, evaluating, takes_positions
from rlhf.lm.cache import InPlaceCache, padding_bias
from rlhf.lm.fused_decoding import read_fused_step, read_head
from rlhf.lm.fused_probe import fusing_is_exact
from rlhf.lm.sampling import SamplingConfig, choose_tokens
from rlhf.lm.shared_prompt import SharedPromptError, shared_prompt_attention

MASKED_LAYER_TYPES = {"full_attention", "sliding_attention", "dummy"}
"""Layers whose only state is keys and values, and whose mask comes from outside the layer."""
UNIFORM_STEPS = 64
"""Steps whose random numbers are drawn (and sent to the device) at once."""
SHORT_PROMPT = 32
"""On a CPU, prompts up to this length are repeated for their group: reading them again costs less than sharing."""
DEVICE_CHECK_STEPS = 8
"""On a GPU, asking which rows finished waits for it: ask every so many steps. Rows finished since run along."""


@dataclass(frozen=True)
class DecodingPlan:
    """What the loop needs to know of a model, found out once."""

    parts: CausalParts
    num_layers: int
    sliding_window: int | None
    """The shortest attention window of any layer."""
    takes_positions: bool
    builds_own_mask: bool
    """The attention implementation wants a 2D mask (flash, flex, ALiBi) instead of a ready 4D one."""
    can_share_prompts: bool
    """Plain attention in every layer, so that `shared_prompt` computes the same."""
    can_fuse: bool
    """Layers like Llama's, so that `fused_decoding` computes the same."""


def plan_decoding(parts: CausalParts, *, share_prompts: bool = True) -> DecodingPlan:
    """Look at a model's layers.

    Args:
        parts: The model.
        share_prompts: Keep each prompt's keys and values once per group where the layers allow it.

    Raises:
        ModelError: A layer keeps a state other than keys and values of all tokens, such as Mamba or chunked layers.
    """
    layer_types, layer_settings = get_layer_types_and_kwargs(parts.config)
    unknown = sorted(set(layer_types) - MASKED_LAYER_TYPES)
    if unknown:
        raise ModelError(
            "the in-place generator only knows layers that attend to stored keys and values",
            got=", ".join(unknown),
            expected=", ".join(sorted(MASKED_LAYER_TYPES)),
            remedy="Set the generator's backend to `generate` (slower: transformers' own loop).",
        )
    windows = [settings["sliding_window"] for settings in layer_settings if settings.get("sliding_window")]
    positions = takes_positions(type(parts.body))
    plan = DecodingPlan(
        parts=parts,
        num_layers=len(layer_types),
        sliding_window=min(windows) if windows else None,
        takes_positions=positions,
        builds_own_mask=not positions or parts.config._attn_implementation not in ("sdpa", "eager"),
        can_share_prompts=False,
        can_fuse=False,
    )
    # sdpa models know no soft-capped scores, attention sinks or position biases; eager ones may.
    plain = positions and parts.config._attn_implementation == "sdpa" and set(layer_types) == {"full_attention"}
    can_fuse = not plan.builds_own_mask and set(layer_types) == {"full_attention"} and fusing_is_exact(parts.body)
    return replace(plan, can_share_prompts=share_prompts and plain and _sharing_is_exact(plan), can_fuse=can_fuse)


@torch.no_grad()
def _sharing_is_exact(plan: DecodingPlan) -> bool:
    """Decode two tokens with a shared and with a repeated prompt, and compare.

    The layer types do not tell whether a model attends through transformers' attention interface, nor whether it
    changes keys after they were cached (DeepSeek's latent attention does). Where sharing is not exact, prompts are
    repeated: the result is the same, only slower.
    """
    body = plan.parts.body
    weight = body.get_input_embeddings().weight
    tokens = torch.arange(5, device=weight.device)[None] % len(weight)  # 3 of the prompt, 2 completions
    try:
        with evaluating(body):
            results = [_decode_two(plan, tokens, share=share) for share in (False, True)]
    except SharedPromptError:
        return False
    tolerance = 1e-3 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    return torch.allclose(*results, rtol=tolerance, atol=tolerance * float(results[0].abs().max()))


def _decode_two(plan: DecodingPlan, tokens: Tensor, *, share: bool) -> Tensor:
    """Hidden states after decoding the last two of `tokens` [1, 5] in two rows."""
    cache = InPlaceCache(plan.num_layers, capacity=5)
    hidden = plan.parts.body(input_ids=tokens[:, :3], past_key_values=cache, use_cache=True)[0]
    cache.start_decoding(2, share=share, prompt_mask=torch.ones_like(tokens[:, :3], dtype=torch.bool))
    with shared_prompt_attention(plan.parts.config, cache) if share else nullcontext():
        for position in (3, 4):
            new = tokens[:, position : position + 1].expand(2, 1)
            positions = torch.full_like(new, position)
            hidden = plan.parts.body(input_ids=new, position_ids=positions, past_key_values=cache, use_cache=True)[0]
    return hidden


class Decoder:
    """One batch of completions being written.

    Active rows are the first `len(self.row_ids)` rows of the cache and of every tensor here; when rows finish, the
    last active rows move into their places, so that a step costs what the unfinished rows cost.

    Args:
        plan: The model.
        prompt_ids: [N, P] left-padded.
        prompt_mask: [N, P] bool.
        group_size: G samples per prompt.
        sampling: How to choose tokens.
        generator: Source of randomness.
        end_token_ids: Tokens that finish a row.
        drop_finished: False keeps finished rows in the batch (for tests and measurements).
        dtype: Precision of products where it is not the weights' (mixed precision); prompts are then read under
            autocast.
    """

    shares_prompts = True
    """Whether prompts may be kept once per group."""
    column_multiple = 1
    """The cache's width is a multiple of this."""
    reads_ahead = False
    """Whether attention reads columns that are yet to be written, behind a mask."""

    def __init__(
        self,
        plan: DecodingPlan,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        *,
        group_size: int,
        sampling: SamplingConfig,
        generator: torch.Generator | None,
        end_token_ids: Sequence[int],
        drop_finished: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.plan, self.sampling, self.generator, self.dtype = plan, sampling, generator, dtype
        self.end_token_ids, self.drop_finished = end_token_ids, drop_finished
        self.device = prompt_ids.device
        self.prompt_length = prompt_ids.shape[1]
        rows, steps = len(prompt_ids) * group_size, sampling.max_completion_length
        self.token_ids = torch.zeros(steps, rows, dtype=torch.int64, device=self.device)
        self.log_probs = torch.zeros(steps, rows, dtype=torch.float32, device=self.device)
        self.row_ids = torch.arange(rows, device=self.device)
        self.finished = torch.zeros(rows, dtype=torch.bool, device=self.device)
        capacity = self.prompt_length + steps
        capacity += -capacity % self.column_multiple
        self.cache = InPlaceCache(plan.num_layers, capacity=capacity, zeroed=self.reads_ahead)
        self.padded = not bool(prompt_mask.all())
        with autocasting(self.device, dtype):
            logits = self._prefill(prompt_ids, prompt_mask)
        self.logits = logits.repeat_interleave(group_size, dim=0)
        # Read for each batch: training changes weights, and adapters or hooks may have come since the plan was made.
        self.fused = read_fused_step(plan.parts.body, dtype=dtype, positions=capacity) if plan.can_fuse else None
        self.head = read_head(plan.parts.head, dtype) if self.fused is not None else plan.parts.head
        if self.fused is not None:
            self.fused.take_over(self.cache)
        worthwhile = group_size > 1 and (self.device.type != "cpu" or self.prompt_length > SHORT_PROMPT)
        self.shared = self.shares_prompts and plan.can_share_prompts and worthwhile
        across = self.fused is not None and self.fused.wants_keys_across and not self.reads_ahead
        self.cache.start_decoding(group_size, share=self.shared, prompt_mask=prompt_mask, keys_across=across)
        self.positions = prompt_mask.sum(dim=1).repeat_interleave(group_size)[:, None]  # [n, 1] of the next token
        self.mask = self._make_mask(prompt_mask.repeat_interleave(group_size, dim=0))

    def run(self) -> int:
        """Write tokens until every row is finished or the limit is reached; return the number of steps."""
        limit = self.sampling.max_completion_length
        check_steps = 1 if self.device.type == "cpu" else DEVICE_CHECK_STEPS
        attention = shared_prompt_attention(self.plan.parts.config, self.cache) if self.shared else nullcontext()
        with attention, autocasting(self.device, self.dtype if self.fused is None else None):
            for step in range(limit):
                tokens = self._choose(step)
                if step + 1 == limit:
                    break
                if (step + 1) % check_steps == 0:
                    tokens = self._drop_finished(tokens)
                    if len(tokens) == 0:
                        break
                self._advance(tokens)
        return step + 1

    def _prefill(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Read the prompts; return the logits [N, V] of the first completion token."""
        arguments = {}
        if self.plan.takes_positions:
            arguments["position_ids"] = (prompt_mask.cumsum(dim=1) - 1).clamp(min=0)
        hidden = self.plan.parts.body(
            input_ids=prompt_ids,
            attention_mask=prompt_mask if self.padded else None,
            past_key_values=self.cache,
            use_cache=True,
            **arguments,
        )[0]
        return self.plan.parts.head(hidden[:, -1])

    def _make_mask(self, prompt_mask: Tensor) -> Tensor | None:
        """The mask [n, ..., capacity] of all steps at once; a step takes its first columns.

        None where every row sees every column, and where the cache masks the shared prompts itself.
        """
        if not self.padded or self.shared:
            return None
        steps = self.sampling.max_completion_length
        visible = torch.cat([prompt_mask, prompt_mask.new_ones(len(prompt_mask), steps)], dim=1)
        window = self.plan.sliding_window
        if self.plan.builds_own_mask or (window is not None and window < visible.shape[1]):
            return visible  # transformers combines it with its window or kernel
        return padding_bias(visible, self.cache.layers[0].keys.dtype)

    def _choose(self, step: int) -> Tensor:
        """Choose and record the tokens [n] of this step."""
        uniforms = None if self.sampling.greedy else self._uniforms(step)
        tokens, log_probs = choose_tokens(self.logits, self.sampling, uniforms=uniforms)
        self.token_ids[step].index_copy_(0, self.row_ids, tokens)
        self.log_probs[step].index_copy_(0, self.row_ids, log_probs)
        for end_token_id in self.end_token_ids:
            self.finished |= tokens == end_token_id
        return tokens

    def _uniforms(self, step: int) -> Tensor:
        """[n] uniform numbers; each row's depend on seed and row alone, not on which rows are still active."""
        if step % UNIFORM_STEPS == 0:
            self._block = self.draw_uniforms(step)
        return self._block[step % UNIFORM_STEPS].index_select(0, self.row_ids)

    def draw_uniforms(self, step: int) -> Tensor:
        """[at most UNIFORM_STEPS, rows] uniform numbers for the steps from `step` on."""
        steps = min(UNIFORM_STEPS, self.sampling.max_completion_length - step)
        source = self.generator.device if self.generator is not None else torch.device("cpu")
        shape = (steps, self.token_ids.shape[1])
        return torch.rand(shape, generator=self.generator, device=source).to(self.device)

    def _drop_finished(self, tokens: Tensor) -> Tensor:
        """Take finished rows out of the batch; return the tokens of the others."""
        finished = self.finished.tolist()
        remaining = finished.count(False)
        if remaining == 0:
            return tokens[:0]
        if remaining == len(finished) or not self.drop_finished:
            return tokens
        return tokens[self._keep_unfinished(finished)]

    def _keep_unfinished(self, finished: list[bool]) -> Tensor:
        """Move the unfinished rows to the front and forget the others; return which row each of them was."""
        count, remaining = len(finished), finished.count(False)
        holes = [row for row in range(remaining) if finished[row]]
        movers = [row for row in range(remaining, count) if not finished[row]]
        keep = list(range(remaining))
        for hole, mover in zip(holes, movers, strict=True):
            keep[hole] = mover
        kept, sources, destinations = (
            torch.tensor(rows, dtype=torch.int64, device=self.device) for rows in (keep, movers, holes)
        )
        self.cache.move_rows(sources, destinations, kept)
        self.row_ids, self.positions, self.finished = self.row_ids[kept], self.positions[kept], self.finished[kept]
        if self.mask is not None:
            self.mask = self.mask[kept]
        return kept

    def _advance(self, tokens: Tensor) -> None:
        """Feed the chosen tokens [n] and compute the logits of the next ones."""
        mask = self.mask
        if mask is not None:
            mask = mask[..., : self.cache.get_seq_length() + 1]
        if self.fused is not None:
            hidden = self.fused(tokens, self.positions, cache=self.cache, mask=mask)
        else:
            arguments = {"position_ids": self.positions} if self.plan.takes_positions else {}
            hidden = self.plan.parts.body(
                input_ids=tokens[:, None], attention_mask=mask, past_key_values=self.cache, use_cache=True, **arguments
            )[0][:, -1]
        self.positions = self.positions + 1
        self.logits = self.head(hidden)
