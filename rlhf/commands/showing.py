"""A run's first batch as the model sees it: every token, what is learned, what is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rlhf.config import Config
from rlhf.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf.lm.sft_preview import ShownRow

LEARNED, LEARNED_SPECIAL, SPECIAL, HIDDEN, RESET = "\x1b[32m", "\x1b[1;92m", "\x1b[33m", "\x1b[90m", "\x1b[0m"
"""Green: learned. Bold green: a special token that is learned. Yellow: one that is not. Grey: the rest."""
OPEN, CLOSE = "«", "»"
"""Around what is learned, where there is no colour."""


def show_batch(config: Config, *, rows: int = 4, colour: bool = True) -> Iterator[str]:
    """Lines about the first batch of a recipe: demonstrations with their loss mask, or prompts as they are answered.

    Only the tokenizer and the data are loaded.

    Args:
        config: A recipe's, with `demonstrations` (supervised fine-tuning), `prompts` (reinforcement learning), or
            `prompts` or `data` (evaluation).
        rows: How many rows are printed at most.
        colour: Mark learned tokens by colour; else by « and ».

    Raises:
        UserError: The recipe has neither, or its data cannot be used.
    """
    named: Any = config
    if hasattr(config, "demonstrations"):
        return _show_demonstrations(named, rows=rows, colour=colour)
    if hasattr(config, "model") and (getattr(config, "prompts", None) or getattr(config, "data", None)):
        return _show_prompts(named, rows=rows, colour=colour)
    raise UserError(
        "the recipe has no batches of text to show",
        got=type(config).__name__,
        expected="a config with `demonstrations` (sft), `prompts` (grpo, ppo_rlhf) or `data` (evaluate)",
    )


def _show_demonstrations(config: Any, *, rows: int, colour: bool) -> Iterator[str]:
    from rlhf.lm.actors import pick_tokenizer
    from rlhf.lm.sft_preview import preview_sft
    from rlhf.lm.sources import load_demonstration_sets

    tokenizer = pick_tokenizer(config.model, config.demonstrations)
    demonstrations, held_out = load_demonstration_sets(config.demonstrations)
    preview = preview_sft(tokenizer, demonstrations, config=config.training, seed=config.run.seed)
    yield from _legend(colour)
    for number, row in enumerate(preview.rows[:rows], start=1):
        packed = f", {len(row.starts)} demonstrations packed" if len(row.starts) > 1 else ""
        yield f"--- row {number}: {len(row.input_ids)} tokens, {sum(row.learned)} learned{packed}"
        yield mark_tokens(tokenizer, row, colour=colour)
    yield f"--- first microbatch: {len(preview.rows)} rows, {preview.padding:.1%} of its places are padding"
    yield (
        f"{preview.demonstrations} demonstrations ({preview.dropped} dropped as too long), {len(held_out)} held out; "
        f"{preview.learned_tokens:.1%} of the tokens are learned"
    )
    yield f"the end token is learned in {preview.learned_ends:.1%} of the rows"
    if preview.learned_ends < 1:
        yield (
            "WARNING: the model would not learn to stop; check the tokenizer's eos_token and how its chat template "
            "closes the assistant's turn"
        )


def _show_prompts(config: Any, *, rows: int, colour: bool) -> Iterator[str]:
    from rlhf.data.loading import load_prompts
    from rlhf.data.tokenization import encode_prompts
    from rlhf.lm.actors import pick_tokenizer
    from rlhf.lm.loading import load_tokenizer
    from rlhf.lm.sft_preview import ShownRow
    from rlhf.lm.sources import load_prompt_sets

    trains = hasattr(config, "collector")  # `evaluate` answers the held-out prompts, or all of `data`
    if config.prompts is not None:
        tokenizer = pick_tokenizer(config.model, config.prompts)
        train, held_out = load_prompt_sets(config.prompts)
        prompts, others = (train, f", {len(held_out)} held out") if trains else (held_out, "")
    else:
        tokenizer, prompts, others = load_tokenizer(config.model), load_prompts(config.data), ""
    limit = config.collector.max_prompt_length if trains else None
    encoded = encode_prompts(tokenizer, prompts, max_length=limit)
    for number, (prompt, ids) in enumerate(zip(prompts[:rows], encoded, strict=False), start=1):
        yield f"--- prompt {number}: {len(ids)} tokens; the completion begins after the last one"
        yield mark_tokens(tokenizer, ShownRow(ids, [False] * len(ids), [0]), colour=colour)
        for name, value in prompt.columns.items():
            text = repr(value)
            yield f"  {name}: {text if len(text) <= 200 else text[:200] + '...'}"
    lengths = sorted(len(ids) for ids in encoded)
    yield (f"--- {len(prompts)} prompts{others}; tokens: median {lengths[len(lengths) // 2]}, longest {lengths[-1]}")


def _legend(colour: bool) -> Iterator[str]:
    if colour:
        yield f"{LEARNED}learned{RESET}  {HIDDEN}not learned{RESET}  {LEARNED_SPECIAL}special, learned{RESET}  " + (
            f"{SPECIAL}special, not learned{RESET}"
        )
    else:
        yield f"{OPEN}learned{CLOSE}, the rest is not"


def mark_tokens(tokenizer: PreTrainedTokenizerBase, row: ShownRow, *, colour: bool) -> str:
    """The row's text with special tokens spelled out and the learned parts marked."""
    special = set(tokenizer.all_special_ids) | {
        token for token, added in tokenizer.added_tokens_decoder.items() if added.special
    }
    parts: list[str] = []
    for first, end in _runs(row, special):
        ids, learned = row.input_ids[first:end], row.learned[first]
        text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if first in row.starts and first > 0:
            parts.append("\n- - -\n")
        parts.append(_paint(text, learned=learned, special=ids[0] in special, colour=colour))
    return "".join(parts).replace(CLOSE + OPEN, "")


def _runs(row: ShownRow, special: set[int]) -> Iterator[tuple[int, int]]:
    """Stretches of tokens that look alike; decoded together, because a character may take several tokens."""
    first = 0
    for place in range(1, len(row.input_ids) + 1):
        if place == len(row.input_ids) or _looks(row, place, special) != _looks(row, first, special):
            yield first, place
            first = place


def _looks(row: ShownRow, place: int, special: set[int]) -> tuple[bool, bool, int]:
    return row.learned[place], row.input_ids[place] in special, sum(start <= place for start in row.starts)


def _paint(text: str, *, learned: bool, special: bool, colour: bool) -> str:
    if not colour:
        return f"{OPEN}{text}{CLOSE}" if learned else text
    codes: Sequence[str] = (HIDDEN, SPECIAL, LEARNED, LEARNED_SPECIAL)
    return f"{codes[2 * learned + special]}{text}{RESET}"
