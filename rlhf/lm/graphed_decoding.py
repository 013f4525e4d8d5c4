"""The decode loop as a CUDA graph: a GPU repeats the recorded step without waiting for Python.

On a GPU, one decode step of a small or middling model is hundreds of kernels of a few microseconds, and launching
them takes longer than running them. A CUDA graph launches all of them at once. What it asks for is that every step
reads and writes the same memory with the same shapes, so here

- keys and values of a block of `COLUMN_BLOCK` columns are read whole, those yet to be written behind a mask;
- the step's number, its column and its random numbers are tensors on the device;
- finished rows leave the batch only when at most half of the rows are left.

A new recording is made when one of these changes. It serves the bodies that `fused_decoding` serves, and chooses the
same tokens from the same random numbers, up to rounding.

Source: CUDA graphs as torch offers them, https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlhf.errors import TrainingError
from rlhf.lm.cache import InPlaceCache, padding_bias
from rlhf.lm.decoding import DEVICE_CHECK_STEPS, UNIFORM_STEPS, Decoder, DecodingPlan
from rlhf.lm.fused_decoding import STATIC_ROTARY
from rlhf.lm.fusible_structure import is_plain_linear
from rlhf.lm.sampling import choose_tokens

COLUMN_BLOCK = 256
"""Columns by which attention's reach grows from one recording to the next."""
WORTHWHILE_STEPS = 16
"""A recording costs a few steps' time: with fewer steps ahead there is none."""


def can_be_recorded(plan: DecodingPlan) -> bool:
    """Whether every operation of a step of this model runs on the device alone."""
    body, head = plan.parts.body, plan.parts.head
    if not plan.can_fuse or not is_plain_linear(head.module):
        return False
    return getattr(body.rotary_emb, "rope_type", "default") in STATIC_ROTARY  # others ask the device


class GraphedDecoder(Decoder):
    """As `Decoder`, with its steps recorded; see the module.

    Args:
        *arguments: Of `Decoder`; its plan must be one that `can_be_recorded`.
        record: False runs every step as it comes, on any device: the same operations, to be tested without a GPU.
        **settings: Of `Decoder`.
    """

    shares_prompts = False
    column_multiple = 64
    reads_ahead = True

    def __init__(self, *arguments: Any, record: bool = True, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.record = record
        self.step = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.block_row = torch.zeros_like(self.step)
        self.column = torch.full_like(self.step, self.prompt_length)
        self.uniforms = torch.zeros(UNIFORM_STEPS, self.token_ids.shape[1], device=self.device)
        self.reach = self.prompt_length
        self.graph: torch.cuda.CUDAGraph | None = None
        self._start_shapes()

    def run(self) -> int:
        """Write tokens until every row is finished or the limit is reached; return the number of steps."""
        limit = self.sampling.max_completion_length
        for step in range(limit):
            if step % UNIFORM_STEPS == 0 and not self.sampling.greedy:
                block = self.draw_uniforms(step)
                self.uniforms[: len(block)].copy_(block)
            if self.prompt_length + step == self.reach:
                self._extend(step)
            self._step_or_replay(steps_ahead=min(self.reach - self.prompt_length, limit) - step)
            if (step + 1) % DEVICE_CHECK_STEPS == 0 and step + 1 < limit and self._drop_half(step + 1) == 0:
                break
        return step + 1

    def _make_mask(self, prompt_mask: Tensor) -> Tensor:
        """[n, 1, 1, capacity] added to scores: hides padding, and every column until it is written."""
        later = prompt_mask.new_zeros(len(prompt_mask), self.cache.capacity - self.prompt_length)
        return padding_bias(torch.cat([prompt_mask, later], dim=1), self.cache.layers[0].keys.dtype)

    def _start_shapes(self) -> None:
        """Forget the recording: shapes or memory have changed."""
        if self.graph is not None:
            torch.cuda.current_stream().synchronize()  # its memory must not be given away while it runs
        self.view = _FixedColumns(self.cache, self.column, self.reach)
        self.graph = None
        self.has_run = False

    def _extend(self, step: int) -> None:
        """Let attention reach the next block of columns."""
        self.reach = min(self.prompt_length + step + COLUMN_BLOCK, self.cache.capacity)
        self.reach += -self.reach % self.column_multiple
        self.cache.reserve(self.reach, written=self.prompt_length + step)
        self._start_shapes()

    def _step_or_replay(self, *, steps_ahead: int) -> None:
        if self.graph is None and self.record and self.has_run and steps_ahead >= WORTHWHILE_STEPS:
            self.graph = self._record()
        if self.graph is not None:
            self.graph.replay()
            return
        self._take_step()  # the first of its shapes always, since it may load kernels
        self.has_run = True

    def _take_step(self) -> None:
        """Choose, record and feed one token per row; everything it changes is changed in place."""
        uniforms = None
        if not self.sampling.greedy:
            uniforms = self.uniforms.index_select(0, self.block_row).squeeze(0).index_select(0, self.row_ids)
        tokens, log_probs = choose_tokens(self.logits, self.sampling, uniforms=uniforms)
        places = self.step * self.token_ids.shape[1] + self.row_ids
        self.token_ids.view(-1).index_copy_(0, places, tokens)
        self.log_probs.view(-1).index_copy_(0, places, log_probs)
        for end_token_id in self.end_token_ids:
            self.finished |= tokens == end_token_id
        assert self.mask is not None
        assert self.fused is not None
        self.mask.index_fill_(-1, self.column, 0.0)
        hidden = self.fused(tokens, self.positions, cache=self.view, mask=self.mask[..., : self.reach])
        self.logits.copy_(self.head(hidden))
        for counter in (self.positions, self.step, self.column):
            counter += 1
        self.block_row.copy_(self.step % UNIFORM_STEPS)

    def _record(self) -> torch.cuda.CUDAGraph:
        """Record a step; nothing is computed."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                # Other threads may use the GPU meanwhile (data loaders that pin memory).
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._take_step()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            raise TrainingError(
                "a decode step of this model cannot be recorded as a CUDA graph",
                where="generator.cuda_graphs",
                got=str(error).strip().split("\n")[0],
                remedy="Set generator.cuda_graphs to false: slower, with the same tokens.",
            ) from error
        torch.cuda.current_stream().wait_stream(stream)
        return graph

    def _drop_half(self, step: int) -> int:
        """Take finished rows out of the batch once they are half of it; return how many rows go on."""
        finished = self.finished.tolist()
        remaining = finished.count(False)
        if self.drop_finished and 0 < remaining <= len(finished) // 2:
            self.cache.reserve(self.reach, written=self.prompt_length + step)
            kept = self._keep_unfinished(finished)
            self.logits = self.logits[kept]
            self._start_shapes()
        return remaining


class _FixedColumns:
    """The cache as every step of one recording sees it: the same memory, the column to write a tensor.

    Args:
        cache: After `start_decoding`, prompts repeated.
        column: [1] int64 on the device.
        reach: Columns that are read.
    """

    groups = None

    def __init__(self, cache: InPlaceCache, column: Tensor, reach: int) -> None:
        self.column, self.reach = column, reach
        self.pairs = [layer.active_pair() for layer in cache.used_layers()]

    def append(self, keys_values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write one column [n, 2, H, D] of a layer; return keys and values [n, H, reach, D]."""
        pair = self.pairs[layer_idx]
        pair.index_copy_(3, self.column, keys_values.transpose(0, 1).unsqueeze(3))
        keys, values = pair[:, :, :, : self.reach].unbind(0)
        return keys, values
