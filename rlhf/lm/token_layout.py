"""Which tokens of a batch are computed once: prompts that rows share, and no padding.

Completions of one group repeat their prompt. In a causal model the hidden states of a prompt do not depend on what
follows, so all that works token by token (projections, norms, the gated MLP) needs each prompt once, and padding never.
Attention alone wants rows: there each row reads its prompt and its completion side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLayout:
    """M tokens to compute, and their places in B rows of S positions, real tokens to the left."""

    ids: Tensor
    """[M] token ids: shared prompts one after the other, then what is each row's own, row by row."""
    positions: Tensor
    """[M] place of each token in its row, for rotary embedding."""
    token_of_place: Tensor
    """[B * S] which token stands there; on padding, which no real token attends to, any (0)."""
    place_of_token: Tensor
    """[M] one place of each token; of a shared prompt, that in its first row."""
    copies: Tensor | None
    """[N, B] 1.0 where a row repeats a prompt of an earlier row; None where no prompt is shared."""
    prompt_cells: Tensor
    """[m] of the first m tokens, those of shared prompts, the index in [N, P], P the longest prompt's length."""
    rows: int
    width: int

    @property
    def is_plain(self) -> bool:
        """Every place holds a token of its own, in order: nothing has to be moved."""
        return self.copies is None and len(self.ids) == self.rows * self.width

    def to_rows(self, tokens: Tensor) -> Tensor:
        """[M, C] to [B, S, C]."""
        if not self.is_plain:
            tokens = tokens.index_select(0, self.token_of_place)
        return tokens.view(self.rows, self.width, -1)

    def sum_to_tokens(self, rows: Tensor) -> Tensor:
        """[B, S, C] to [M, C], summed over the rows of a shared prompt: the gradient of `to_rows`.

        Padding is left out: it is 0 where the rows came from causal attention.
        """
        tokens = self.to_tokens(rows)
        if self.copies is not None:
            longest = int(self.positions[: len(self.prompt_cells)].max()) + 1
            others = self.copies.to(rows.dtype) @ rows[:, :longest].reshape(self.rows, -1)  # [N, P * C]
            others = others.view(len(self.copies) * longest, -1).index_select(0, self.prompt_cells)
            tokens[: len(self.prompt_cells)] += others
        return tokens

    def to_tokens(self, rows: Tensor) -> Tensor:
        """[B, S, C] to [M, C]: of a shared prompt, what its first row has."""
        places = rows.reshape(self.rows * self.width, -1)
        return places if self.is_plain else places.index_select(0, self.place_of_token)

    def spread(self, tokens: Tensor) -> Tensor:
        """[M, C] to [B, S, C], each token to one place, zeros elsewhere: the gradient of `to_tokens`."""
        if not self.is_plain:
            places = tokens.new_zeros(self.rows * self.width, tokens.shape[1])
            tokens = places.index_copy_(0, self.place_of_token, tokens)
        return tokens.view(self.rows, self.width, -1)


def lay_out(ids: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> TokenLayout:
    """Find the shared prompts of rows and give every token its places.

    Args:
        ids: [B, S] int64, real tokens to the left.
        lengths: [B] real tokens of each row, at most S.
        prompt_lengths: [B] how many of them are prompt.
    """
    count, width = ids.shape
    columns = torch.arange(width, device=ids.device)
    longest = int(prompt_lengths.max())
    in_prompt = columns < prompt_lengths[:, None]  # [B, S]
    prompts = ids.masked_fill(~in_prompt, -1)[:, :longest]
    different, prompt_of_row = torch.unique(prompts, dim=0, return_inverse=True)
    own = columns < lengths[:, None]
    if len(different) == count:
        return rows_alone(ids, lengths)
    everyone = torch.arange(count, device=ids.device)
    first_row = everyone.new_full((len(different),), count).scatter_reduce(0, prompt_of_row, everyone, "amin")
    in_different = columns[:longest] < prompt_lengths[first_row][:, None]  # [N, P]
    prompt_places = (first_row[:, None] * width + columns[:longest])[in_different]
    own_places = (own & ~in_prompt).flatten().nonzero().squeeze(1)
    places = torch.cat([prompt_places, own_places])
    token_of_place = places.new_zeros(count * width)
    token_of_place[own_places] = torch.arange(len(prompt_places), len(places), device=ids.device)
    starts = prompt_lengths[first_row].cumsum(0) - prompt_lengths[first_row]
    prompt_tokens = starts[prompt_of_row][:, None] + columns
    token_of_place = torch.where(in_prompt, prompt_tokens, token_of_place.view(count, width)).flatten()
    copies = torch.nn.functional.one_hot(prompt_of_row, len(different)).t().float()
    copies[prompt_of_row[first_row], first_row] = 0.0
    return TokenLayout(
        ids=ids.flatten()[places],
        positions=places % width,
        token_of_place=token_of_place,
        place_of_token=places,
        copies=copies,
        prompt_cells=in_different.flatten().nonzero().squeeze(1),
        rows=count,
        width=width,
    )


def rows_alone(ids: Tensor, lengths: Tensor) -> TokenLayout:
    """The layout where no prompt is shared: row after row, without padding; arguments as of `lay_out`."""
    count, width = ids.shape
    own = torch.arange(width, device=ids.device) < lengths[:, None]
    places = own.flatten().nonzero().squeeze(1)
    token_of_place = places.new_zeros(count * width)
    token_of_place[places] = torch.arange(len(places), device=ids.device)
    return TokenLayout(
        ids=ids.flatten()[places],
        positions=places % width,
        token_of_place=token_of_place,
        place_of_token=places,
        copies=None,
        prompt_cells=places[:0],
        rows=count,
        width=width,
    )
