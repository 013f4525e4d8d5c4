"""PPO-ptx: the language-modelling loss on given texts, mixed into every minibatch against forgetting.

objective = RL objective + coefficient x E[log pi(text)], with the texts of a data source of its own. Source: Ouyang et
al. 2022, https://arxiv.org/abs/2203.02155, eq. 2, whose coefficient is 27.8 for a loss averaged over tokens beside
rewards normalised to unit variance; 0 < coefficient < 1 is where others found stability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from rlhf.config import Config
from rlhf.core.masking import Reduce
from rlhf.data.collation import left_pad, right_pad
from rlhf.data.loading import load_demonstrations
from rlhf.data.records import Demonstration
from rlhf.data.settings import DataConfig
from rlhf.data.tokenization import encode_completion, encode_prompt
from rlhf.errors import ConfigError, DataError
from rlhf.lm.prompt_stream import PromptStream
from rlhf.training.distributed import make_reduce
from rlhf.training.mixing import MixedBatch


class PtxConfig(Config):
    """Texts to go on imitating while rewards are learned from."""

    coefficient: float = Field(gt=0)
    """Factor of the loss, which is in nats per token."""
    data: DataConfig | None = None
    """Demonstrations; pretraining texts are demonstrations with an empty prompt (`derive: {prompt: "{{ '' }}",
    completion: text}`). None takes the demonstrations of `prompts`, as SFT does."""
    batch_size: int = Field(32, ge=1)
    """Texts beside each minibatch, over all processes."""
    microbatch_size: int | None = Field(None, ge=1)
    """Most texts in one forward of one process; None takes its whole share. Changes memory, not gradients."""
    max_length: int | None = Field(None, ge=2)
    """Tokens of prompt and completion together; longer ones are refused. None sets no limit."""


class ImitationLoss:
    """Minibatches of demonstrations; a `MixedLoss`.

    The denominator is the number of completion tokens of the minibatch over all processes.

    Args:
        demonstrations: At least one.
        tokenizer: The policy's.
        config: Sizes and coefficient.
        accelerator: Whose processes share each minibatch; None is one process.
        device: Where token ids are put.
        seed: Of the order.

    Raises:
        ConfigError: The minibatch cannot be shared evenly.
        DataError: A demonstration is too long, or has nothing to learn.
    """

    replicated = True
    """A checkpoint needs the state of one process only."""

    def __init__(
        self,
        demonstrations: Sequence[Demonstration],
        *,
        tokenizer: PreTrainedTokenizerBase,
        config: PtxConfig,
        accelerator: Accelerator | None = None,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        """Encode everything, so that what is too long is refused before any time is spent."""
        processes = 1 if accelerator is None else accelerator.num_processes
        _require_even_shares(config, processes)
        self._config, self._device = config, device
        self._pad = int(tokenizer.pad_token_id or 0)  # pyright: ignore[reportArgumentType]  # masked in any case
        self._rows = [_encode(tokenizer, item, max_length=config.max_length) for item in demonstrations]
        if not self._rows:
            raise DataError("there is no demonstration to mix in", where="ptx", remedy="Give ptx.data.")
        rank = 0 if accelerator is None else accelerator.process_index
        self._stream = PromptStream(
            len(self._rows), batch=config.batch_size, process=rank, processes=processes, seed=seed
        )
        self._share = config.batch_size // processes
        self._reduce: Reduce = (lambda tensor: tensor) if accelerator is None else make_reduce(accelerator)
        self._loss, self._minibatches = torch.zeros((), dtype=torch.float64), 0

    def minibatch(self) -> list[MixedBatch]:
        """This process's part of the next minibatch, in microbatches."""
        rows = [self._rows[index] for index in self._stream.take()]
        tokens = torch.tensor(float(sum(len(completion) for _, completion in rows)), device=self._device)
        weight = self._config.coefficient / self._reduce(tokens).item()
        size = self._config.microbatch_size or self._share
        self._minibatches += 1
        return [self._collate(rows[start : start + size], weight) for start in range(0, self._share, size)]

    def record(self, loss: torch.Tensor) -> None:
        """Add up losses; they are divided by global counts, so sums over parts and processes are means."""
        self._loss = self._loss + loss.detach().cpu().double()

    def metrics(self) -> dict[str, float]:
        """`ptx_loss`: nats per token, mean over the minibatches since the last call; empty where there was none."""
        if self._minibatches == 0:
            return {}
        total = self._reduce(self._loss.to(self._device)).item() / self._config.coefficient
        mean = total / self._minibatches
        self._loss, self._minibatches = torch.zeros((), dtype=torch.float64), 0
        return {"ptx_loss": mean}

    def state_dict(self) -> dict[str, Any]:
        """Where the stream of texts stands; equal on all processes."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._stream.load_state_dict(state)

    def _collate(self, rows: Sequence[tuple[list[int], list[int]]], weight: float) -> MixedBatch:
        prompt_ids, prompt_mask = left_pad([prompt for prompt, _ in rows], self._pad)
        completion_ids, completion_mask = right_pad([completion for _, completion in rows], self._pad)
        inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_mask": completion_mask}
        return MixedBatch(
            inputs={name: tensor.to(self._device) for name, tensor in inputs.items()},
            actions=completion_ids.to(self._device),
            action_mask=inputs["completion_mask"].to(self._device),
            weight=weight,
        )


def make_imitation(
    config: PtxConfig | None, demonstrations: Sequence[Demonstration] | None, **settings: Any
) -> ImitationLoss | None:
    """The mixed loss of a run, from its own data or from the given demonstrations; None where it is off."""
    if config is None:
        return None
    own = load_demonstrations(config.data) if config.data is not None else demonstrations
    return ImitationLoss(own or [], config=config, **settings)


def _encode(
    tokenizer: PreTrainedTokenizerBase, item: Demonstration, *, max_length: int | None
) -> tuple[list[int], list[int]]:
    """Prompt and completion ids; where neither prompt nor tokenizer gives a first token, the text's own does."""
    prompt = encode_prompt(tokenizer, item.prompt, where=item.source)
    completion = encode_completion(tokenizer, item.prompt, item.completion)
    if not prompt:
        prompt, completion = completion[:1], completion[1:]
    if not completion:
        raise DataError("a text of one token has nothing to learn", where=item.source or "ptx", got=item.completion)
    if max_length is not None and len(prompt) + len(completion) > max_length:
        raise DataError(
            "a demonstration is too long",
            where=item.source or "ptx",
            got=len(prompt) + len(completion),
            expected=f"at most {max_length} tokens",
            remedy="Raise ptx.max_length, or take such texts out of the data; nothing is cut silently.",
        )
    return prompt, completion


def _require_even_shares(config: PtxConfig, processes: int) -> None:
    share = config.batch_size // processes
    if config.batch_size % processes or share % (config.microbatch_size or share):
        raise ConfigError(
            "the texts of a minibatch cannot be shared evenly",
            where="ptx.batch_size",
            got=config.batch_size,
            expected=f"a multiple of {processes} processes x microbatch_size {config.microbatch_size}",
        )
