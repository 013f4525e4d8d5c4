"""A reward model: the body of a causal language model and one linear head, read at the last attended token.

The folder it is saved to is an ordinary `AutoModelForSequenceClassification` (num_labels=1) with its tokenizer, so
`from_pretrained` and `pipeline("text-classification", function_to_apply="none")` open it. Two things differ from
transformers' own forward, which finds the last token by comparing ids with the pad token: here the position comes
from the attention mask, so a pad token that equals the end token, padding on the left, or a pad token inside the text
change nothing; and the head is computed in float32 whatever the body's precision.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.tokenizer_saving import save_tokenizer
from rlhf.errors import ModelError
from rlhf.lm.fused_training_probe import exact_fused_pass
from rlhf.lm.measurement import CPU_TOKENS
from rlhf.lm.token_layout import lay_out
from rlhf.training.linear import use_fast_linear

Adapters = Literal["merge", "keep"]
MAX_PADDING_TOKENS = 256
"""In one chunk of a forward: about what a small forward costs beside its tokens, so that more padding is worth one."""
ADAPTED_CONFIG = "reward_model_config.json"
"""The reward model's config in a folder of adapters."""


class RewardModel(nn.Module):
    """Scores token sequences.

    Args:
        model: A sequence-classification model with one label, or a peft model around one.
        chunk_tokens: Tokens, padding included, that go through the body at a time. Rows are sorted by length into
            such chunks, so little is spent on padding; no score and no gradient depends on it. On a CPU a chunk has
            `CPU_TOKENS` at most.
    """

    def __init__(self, model: nn.Module, *, chunk_tokens: int = 8192) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens
        score_head(self.classifier)  # refuses now what could not be scored later
        use_fast_linear(self)
        self._is_causal = _later_tokens_change_nothing(getattr(self.classifier, self.classifier.base_model_prefix))

    @property
    def classifier(self) -> PreTrainedModel:
        """The sequence-classification model, with peft's wrapper taken off."""
        base = getattr(self.model, "get_base_model", None)
        return base() if base is not None else self.model  # type: ignore[return-value]

    @property
    def config(self) -> PretrainedConfig:
        """The transformers config."""
        return self.classifier.config

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(self.model.parameters()).device

    def forward(self, input_ids: Tensor, attention_mask: Tensor, shared_lengths: Tensor | None = None) -> Tensor:
        """Return one score per row.

        Args:
            input_ids: [N, L] token ids.
            attention_mask: [N, L] bool or 0/1, True where a token belongs to the text; padding may be anywhere.
            shared_lengths: [N] first tokens of each text that other texts may have too, such as its prompt; each such
                beginning is computed once where that is possible. No score depends on it.

        Returns:
            [N] float32 scores, read at the last attended token of each row.
        """
        mask = attention_mask.bool()
        # All padding to the right, whatever side it came from: positions and scores then cannot depend on it.
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)
        input_ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        lengths = mask.sum(dim=1).tolist()
        if min(lengths) == 0:
            raise ModelError("a row has no attended token, so there is nothing to score", got=lengths.index(0))
        scores: list[Tensor] = []
        rows: list[int] = []
        shared = mask.new_ones(len(mask), dtype=torch.int64) if shared_lengths is None else shared_lengths.clamp(min=1)
        chunk_tokens = min(self.chunk_tokens, CPU_TOKENS) if mask.device.type == "cpu" else self.chunk_tokens
        for chunk in length_sorted_chunks(lengths, chunk_tokens):
            longest = max(lengths[row] for row in chunk)
            scores.append(self._score_chunk(input_ids[chunk, :longest], mask[chunk, :longest], shared[chunk]))
            rows += chunk
        return torch.cat(scores)[torch.tensor(rows, device=input_ids.device).argsort()]

    def _score_chunk(self, input_ids: Tensor, mask: Tensor, shared: Tensor) -> Tensor:
        """Score right-padded rows [n, l] -> [n]."""
        last = self._last_hidden(input_ids, mask, shared)
        with torch.autocast(last.device.type, enabled=False):
            return F.linear(last.float(), score_head(self.classifier).weight.float()).squeeze(1)

    def _last_hidden(self, input_ids: Tensor, mask: Tensor, shared: Tensor) -> Tensor:
        """[n, h] hidden states of the last tokens."""
        body = getattr(self.classifier, self.classifier.base_model_prefix)
        lengths = mask.sum(dim=1)
        rows = torch.arange(len(mask), device=mask.device)
        fused = exact_fused_pass(body)
        if fused is not None:
            layout = lay_out(input_ids, lengths, torch.minimum(shared, lengths))
            return fused(layout, layout.token_of_place[rows * layout.width + lengths - 1])
        # Padding stands after the text, where a causal body cannot see it; without a mask attention is up to 1.5x as
        # fast.
        attention_mask = None if self._is_causal else mask.long()
        hidden = body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return hidden[rows, lengths - 1]

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute activations in the backward pass; `transformers.Trainer` calls it by this name."""
        self.classifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def save_pretrained(
        self, folder: str | Path, tokenizer: PreTrainedTokenizerBase, *, adapters: Adapters = "merge"
    ) -> None:
        """Write an ordinary sequence-classification folder: weights, config, tokenizer.

        Args:
            folder: Where to.
            tokenizer: The reward model's own.
            adapters: Of a model trained with LoRA. merge: weights of their own, no base needed. keep: a peft folder of
                adapters and head, which needs its base where it was; `AutoModelForSequenceClassification` opens it
                too, given `num_labels=1`.

        Raises:
            ModelError: Adapters are to be kept, but there are none, or their base is no plain saved model.
        """
        if adapters == "keep":
            self._save_adapters(folder)
        else:
            model = _merged_copy(self.model) if hasattr(self.model, "merge_and_unload") else self.model
            model.save_pretrained(folder)  # type: ignore[operator]
        save_tokenizer(tokenizer, folder)

    def _save_adapters(self, folder: str | Path) -> None:
        settings = getattr(self.model, "peft_config", None)
        base = settings["default"].base_model_name_or_path if settings is not None else None
        if not base or (Path(base) / "adapter_config.json").exists():
            raise ModelError(
                "adapters can only be kept apart from a base that is saved without adapters",
                where=str(folder),
                got="a model without adapters" if settings is None else base or "a fresh model",
                remedy="Save it merged.",
            )
        self.model.save_pretrained(folder)  # type: ignore[operator]
        # It says more than the base's config: one label, the pad token, the normalisation. Not as config.json, or
        # transformers would look for whole weights in this folder.
        self.config.to_json_file(Path(folder) / ADAPTED_CONFIG)


@torch.no_grad()
def _later_tokens_change_nothing(body: nn.Module) -> bool:
    """Whether the hidden states of two tokens are the same when a third follows: the body is causal."""
    weight = next(body.parameters())
    if weight.device.type == "meta":
        return False
    was_training = body.training
    body.eval()
    ids = torch.tensor([[0, 1, 2]], device=weight.device)
    alone, followed = (body(input_ids=x, use_cache=False).last_hidden_state[0, :2].float() for x in (ids[:, :2], ids))
    body.train(was_training)
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    return bool((alone - followed).abs().max() <= tolerance * alone.abs().max())


def length_sorted_chunks(lengths: Sequence[int], chunk_tokens: int) -> Iterator[list[int]]:
    """Yield row indices in chunks of similar length.

    A chunk has at most `chunk_tokens` padded tokens (or is one row), and at most `MAX_PADDING_TOKENS` of padding.
    """
    chunk: list[int] = []
    padding = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        # Longest first, so the first row of a chunk sets its width.
        if chunk:
            padding += lengths[chunk[0]] - lengths[row]
            if lengths[chunk[0]] * (len(chunk) + 1) > chunk_tokens or padding > MAX_PADDING_TOKENS:
                yield chunk
                chunk, padding = [], 0
        chunk.append(row)
    if chunk:
        yield chunk


def score_head(model: nn.Module) -> nn.Linear:
    """Return the linear head of a one-label classifier; `ModelError` if it has none."""
    head = getattr(model, "score", None)
    wrapped = getattr(head, "modules_to_save", None)  # peft's copy that is trained and saved
    if wrapped is not None:
        head = wrapped[head.active_adapters[0]]  # type: ignore[union-attr]
    if not isinstance(head, nn.Linear) or head.weight.shape[0] != 1 or head.bias is not None:
        raise ModelError(
            "not a reward model: it needs a linear head named `score` with one output and no bias",
            got=f"{type(model).__name__} with head {head}",
            remedy="Decoder-only models (Llama, Qwen, Mistral, Gemma, GPT-2 ...) have one; encoders do not.",
        )
    return head


def _merged_copy(model: Any) -> PreTrainedModel:
    """Return a merged copy of a peft model; the original goes on training."""
    return copy.deepcopy(model).merge_and_unload()
