"""A reward model without a body of its own: its LoRA adapter on the backbone that the policy trains on.

Policy, critic, reward model and reference then share one copy of the frozen weights. The reward model must have been
trained with LoRA on the model that the policy starts from, and reads with the policy's backbone what its own tokenizer
makes of the text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from reward_models.model import RewardModel
from reward_models.scorer import RewardModelScorer
from rlhf.data.records import Text
from rlhf.errors import ModelError, RewardError
from rlhf.lm.adapters import REWARD, AdapterSwitch, add_frozen_adapter
from rlhf.lm.backbone import evaluating, unwrap_adapters
from rlhf.lm.critic import read_reward_adapter


class AdapterScorer:
    """Scores as `RewardModelScorer` does, through the policy's own backbone.

    In a config: `reward: {function: "reward_models.shared_backbone:AdapterScorer", arguments: {folder: ...}}`, with
    `model.lora` set; the recipe hands over the policy's model.

    Args:
        folder: The adapter of a reward model: adapters and head, its tokenizer beside them.
        batch_tokens: Tokens, padding included, in one forward.

    Raises:
        ModelError: The folder holds no adapter of a reward model, or no tokenizer.
    """

    def __init__(self, folder: str | Path, *, batch_tokens: int = 16_384) -> None:
        self._folder, self._batch_tokens = str(folder), batch_tokens
        self._lora, self._weights, self._head, self._settings = read_reward_adapter(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError("the reward model's folder has no tokenizer", where=self._folder) from error
        self._scorer: RewardModelScorer | None = None
        self._switch: AdapterSwitch | None = None
        self.__name__ = "reward_model"

    def attach(self, model: Any) -> None:
        """Put the adapter onto the policy's model; it is frozen, and off except while scoring.

        Args:
            model: The policy's PEFT model.

        Raises:
            ModelError: The policy has no adapters, or the adapter belongs to another backbone.
        """
        add_frozen_adapter(model, self._lora, self._weights, name=REWARD)
        base = unwrap_adapters(model)
        config = copy.deepcopy(base.config)
        config.num_labels = 1
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
        setattr(classifier, classifier.base_model_prefix, getattr(base, base.base_model_prefix))
        head = nn.Linear(self._head.shape[1], 1, bias=False, device=base.device, dtype=base.dtype)
        with torch.no_grad():
            head.weight.copy_(self._head)
        classifier.score = head.requires_grad_(False)
        self._switch = AdapterSwitch(model)
        self._scorer = RewardModelScorer(
            RewardModel(classifier), self._tokenizer, batch_tokens=self._batch_tokens, **self._settings
        )

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Score completions; see `RewardModelScorer`.

        Raises:
            RewardError: No policy has lent its backbone.
        """
        if self._scorer is None or self._switch is None:
            raise RewardError(
                "this reward model has no body of its own",
                where=self._folder,
                remedy="Use it in a recipe with model.lora, call attach(model), or open the folder with "
                "RewardModelScorer.from_pretrained.",
            )
        with self._switch.only(REWARD), evaluating(self._scorer.model):
            return self._scorer(prompts, completions)
