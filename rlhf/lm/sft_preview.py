"""The batches that supervised fine-tuning would be shown, without the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from rlhf.data.records import Demonstration
from rlhf.data.tokenization import end_token_ids
from rlhf.lm.sft import IGNORED_LABEL, SftConfig, make_sft_trainer
from rlhf.lm.sft_rows import share_of_learned_ends

STAND_IN = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
"""The trainer asks for a model; its batches do not depend on which."""


@dataclass(frozen=True)
class ShownRow:
    """One row of a batch as the model sees it, padding left out."""

    input_ids: list[int]
    learned: list[bool]
    """True where the token is a target of the loss."""
    starts: list[int]
    """Where a demonstration begins: several places in a packed row. Attention does not reach over them."""


@dataclass(frozen=True)
class SftPreview:
    """The first microbatch, and what holds for all demonstrations."""

    rows: list[ShownRow]
    padding: float
    """Share of the batch's places that are padding."""
    demonstrations: int
    dropped: int
    learned_tokens: float
    """Share of all tokens that are learned."""
    learned_ends: float
    """Share of all demonstrations whose end token is learned."""


def preview_sft(
    tokenizer: PreTrainedTokenizerBase, demonstrations: Sequence[Demonstration], *, config: SftConfig, seed: int = 0
) -> SftPreview:
    """Make the run's own first microbatch: tokenized, packed, shuffled and padded as in training.

    Raises:
        DataError: A demonstration cannot be used.
        ModelError: The tokenizer lacks something.
    """
    settings = AutoConfig.for_model("llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **STAND_IN)
    state = torch.random.get_rng_state()
    model = AutoModelForCausalLM.from_config(settings)
    unpacked = make_sft_trainer(
        model, tokenizer, demonstrations, config=config.model_copy(update={"packing": False}), seed=seed
    )
    rows = [unpacked.train_dataset[index] for index in range(len(unpacked.train_dataset))]
    trainer = unpacked
    if config.packing:
        trainer = make_sft_trainer(model, tokenizer, demonstrations, config=config, seed=seed)
    batch = next(iter(trainer.get_train_dataloader()))
    torch.random.set_rng_state(state)
    shown = list(_rows(batch))
    places = batch["input_ids"].numel()
    learned = sum(label != IGNORED_LABEL for row in rows for label in row["labels"])
    return SftPreview(
        rows=shown,
        padding=1 - sum(len(row.input_ids) for row in shown) / places,
        demonstrations=len(rows),
        dropped=unpacked.dropped,
        learned_tokens=learned / sum(len(row["input_ids"]) for row in rows),
        learned_ends=share_of_learned_ends(rows, end_token_ids(tokenizer)),
    )


def _rows(batch: dict[str, Tensor]) -> Iterator[ShownRow]:
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    positions = batch["position_ids"].tolist() if "position_ids" in batch else [list(range(len(row))) for row in ids]
    masks = batch["attention_mask"].tolist() if "attention_mask" in batch else [[1] * len(row) for row in ids]
    for row, targets, places, mask in zip(ids, labels, positions, masks, strict=True):
        kept = [place for place, real in enumerate(mask) if real]
        yield ShownRow(
            input_ids=[row[place] for place in kept],
            learned=[targets[place] != IGNORED_LABEL for place in kept],
            starts=[index for index, place in enumerate(kept) if places[place] == 0] or [0],
        )
