"""A reward model as a reward function: texts in, scores out, exactly as it was trained to see them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reward_models.collation import encode_candidate
from reward_models.evaluation import score_sequences
from reward_models.loading import SCORING_SETTINGS, open_classifier
from reward_models.model import Adapters, RewardModel
from reward_models.settings import Normalization
from reward_models.trainer import RankingTrainer
from rlhf.data.loading import load_demonstrations
from rlhf.data.records import Text
from rlhf.errors import ModelError, RewardError
from rlhf.lm.loading import DTYPES

REFERENCES = 512
"""Training candidates that the first normalisation is measured on; the standard error of their mean is 0.044 std."""


class RewardModelScorer:
    """Scores completions with a reward model; called as every reward function, `(prompts, completions, **columns)`.

    It has a tokenizer and chat template of its own, which may differ from the policy's: it reads text. The end token
    is appended as in training; where a completion spells it in its midst, that is text. Scores depend on nothing but
    the text: not on padding, not on the rest of the batch.
    From the raw score, `mean` is subtracted and the difference divided by `std` (see `normalize_on`).

    Args:
        model: The reward model; it is put into eval mode.
        tokenizer: Its own tokenizer.
        max_length: Most tokens of prompt plus completion; None sets no limit.
        truncate: Whether longer texts are cut (as `overlong: truncate` in training) or refused.
        mean: Of raw scores on reference completions.
        std: Likewise.
        batch_tokens: Tokens, padding included, in one forward.
    """

    def __init__(
        self,
        model: RewardModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int | None = None,
        truncate: bool = False,
        mean: float = 0.0,
        std: float = 1.0,
        batch_tokens: int = 16_384,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.truncate = truncate
        self.mean = mean
        self.std = std
        self.batch_tokens = batch_tokens
        self.__name__ = "reward_model"  # reward functions are logged by their name

    @classmethod
    def from_trainer(
        cls,
        trainer: RankingTrainer,
        *,
        normalization: Normalization | None = Normalization(),  # noqa: B008  # frozen
        batch_tokens: int = 16_384,
    ) -> Self:
        """Make the scorer of a trained model, with the limits it was trained under.

        Args:
            trainer: After training.
            normalization: On what scores get mean 0 (and standard deviation 1); None leaves them as they are. Before
                RL, `normalize_on` samples of the model that RL starts from.
            batch_tokens: Tokens, padding included, in one forward.

        Raises:
            RewardError: All reference completions score the same.
            DataError: The references cannot be read.
        """
        scorer = cls(
            trainer.reward_model,
            trainer.tokenizer,
            max_length=trainer.max_length,
            truncate=trainer.settings.overlong == "truncate",
            batch_tokens=batch_tokens,
        )
        if normalization is None:
            return scorer
        if normalization.references is not None:
            rows = load_demonstrations(normalization.references)
            raw = torch.tensor(scorer.raw_scores([row.prompt for row in rows], [row.completion for row in rows]))
        else:
            sequences = [ids for ranking in trainer.rankings for ids in ranking.sequences]
            sequences = sequences[:: -(-len(sequences) // REFERENCES)]
            raw = score_sequences(scorer.model, sequences, pad_id=trainer.pad_id, batch_tokens=batch_tokens)
        scorer._normalize(raw, unit_variance=normalization.unit_variance)
        return scorer

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        batch_tokens: int = 16_384,
        device: torch.device | str | None = None,
        dtype: str = "float32",
    ) -> Self:
        """Open a folder that `save_pretrained` wrote, or any one-label sequence-classification folder or hub id.

        Args:
            folder: The folder or hub id.
            batch_tokens: Tokens, padding included, in one forward.
            device: None takes this process's GPU where there is one, else the CPU.
            dtype: Of the weights: float32, bfloat16 or auto; the head is computed in float32 in any case.

        Raises:
            ModelError: The folder is no reward model, or its tokenizer lacks an end token.
        """
        classifier = open_classifier(folder, dtype=DTYPES[dtype])
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError("the reward model's folder has no tokenizer", where=str(folder)) from error
        if tokenizer.eos_token_id is None:
            raise ModelError("the reward model's tokenizer has no end token", where=str(folder))
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = getattr(classifier.config, SCORING_SETTINGS, None) or {}
        return cls(RewardModel(classifier).to(device), tokenizer, batch_tokens=batch_tokens, **settings)

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Score completions.

        Args:
            prompts: N prompts, strings or chat messages.
            completions: N completions, strings or chat messages.
            columns: Ignored; every reward function receives the data set's other columns.

        Returns:
            N normalised scores.

        Raises:
            RewardError: The counts differ, or a text is longer than `max_length` and `truncate` is off.
        """
        raw = self.raw_scores(prompts, completions)
        return [(score - self.mean) / self.std for score in raw]

    def raw_scores(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """Return the N scores as the head gives them, before normalisation."""
        if len(prompts) != len(completions):
            raise RewardError(
                "as many prompts as completions are needed",
                where="RewardModelScorer",
                got=f"{len(prompts)} prompts and {len(completions)} completions",
            )
        if not prompts:
            return []
        sequences = [
            self._encode(*pair, index=index) for index, pair in enumerate(zip(prompts, completions, strict=True))
        ]
        # The filler is masked, so its id does not matter.
        return score_sequences(self.model, sequences, pad_id=0, batch_tokens=self.batch_tokens).tolist()

    def _encode(self, prompt: Text, completion: Text, *, index: int) -> list[int]:
        ids, is_overlong = encode_candidate(
            self.tokenizer,
            prompt,
            completion,
            max_length=self.max_length,
            truncate=self.truncate,
            inner_end="text",  # a policy may spell the end token; that must neither stop RL nor end the text early
        )
        if is_overlong and not self.truncate:
            raise RewardError(
                f"completion {index} with its prompt is longer than the reward model's {self.max_length} tokens",
                where="RewardModelScorer",
                got=len(ids),
                remedy="Shorten prompts or max_completion_length, or set truncate=True on the scorer.",
            )
        return ids

    def normalize_on(
        self, prompts: Sequence[Text], completions: Sequence[Text], *, unit_variance: bool = True
    ) -> tuple[float, float]:
        """Shift (and scale) scores so that these reference completions have mean 0 (and standard deviation 1).

        A ranking loss leaves the mean of scores undetermined; the KL coefficient of an RL run only has a scale once
        the reward has one. Source: Ziegler et al. 2019 (arXiv 1909.08593, section 2); Stiennon et al. 2020.

        Args:
            prompts: N >= 2 prompts, best those that RL will use.
            completions: N completions, best samples of the model that RL starts from.
            unit_variance: Whether to scale too.

        Returns:
            The mean and standard deviation of the raw scores (1 where `unit_variance` is off).

        Raises:
            RewardError: All raw scores are equal, so that nothing can be scaled.
        """
        return self._normalize(torch.tensor(self.raw_scores(prompts, completions)), unit_variance=unit_variance)

    def _normalize(self, raw: Tensor, *, unit_variance: bool) -> tuple[float, float]:
        raw = raw.double()
        if unit_variance and (len(raw) < 2 or raw.std(correction=0) < 1e-6 * max(1.0, abs(raw.mean()))):
            raise RewardError(
                "all reference completions score the same, so their scores have no scale",
                where="normalize_on",
                got=f"{len(raw)} completions",
                remedy="Give more and different completions, or unit_variance=False.",
            )
        self.mean = raw.mean().item()
        self.std = raw.std(correction=0).item() if unit_variance else 1.0
        return self.mean, self.std

    def save_pretrained(self, folder: str | Path, *, adapters: Adapters = "merge") -> None:
        """Write the sequence-classification folder, with the scorer's settings in its config.

        Args:
            folder: Where to.
            adapters: Of a model trained with LoRA: merged into the weights, or kept apart (see `RewardModel`).
        """
        settings = {"max_length": self.max_length, "truncate": self.truncate, "mean": self.mean, "std": self.std}
        setattr(self.model.config, SCORING_SETTINGS, settings)
        self.model.save_pretrained(folder, self.tokenizer, adapters=adapters)
