"""The model that plays a text environment: its tokenizer, and a first fine-tuning on demonstrated episodes."""

from __future__ import annotations

from pathlib import Path

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm, load_tokenizer
from rlhf.lm.sft import SftConfig, train_sft
from rlhf.lm.text_environments import (
    EnvironmentConfig,
    EnvironmentFactory,
    alphabet_of,
    play_demonstrations,
)
from rlhf.training.run import Run

TURNS_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}>{{ message.content }}{{ eos_token }}\n"
    "{% else %}{{ message.content }}\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
"""A chat template in one character a piece: `>` opens the assistant's turn, the end token and a newline close it."""


def pick_player_tokenizer(model: ModelConfig, factory: EnvironmentFactory) -> PreTrainedTokenizerBase:
    """The model's tokenizer; for a fresh model one token per character that the environment says or hears."""
    if model.config is None or model.tokenizer is not None:
        return load_tokenizer(model)
    tokenizer = character_tokenizer(alphabet_of(factory))
    tokenizer.chat_template = TURNS_TEMPLATE
    return tokenizer


def prepare_player(
    model: ModelConfig,
    environment: EnvironmentConfig,
    factory: EnvironmentFactory,
    *,
    sft: SftConfig | None,
    run: Run,
    accelerator: Accelerator,
) -> tuple[ModelConfig, PreTrainedTokenizerBase]:
    """The model a run starts from, and its tokenizer.

    With `sft` the model first imitates demonstrated episodes and is written to `<run directory>/sft`, from where it
    is loaded again; a resumed run finds it there.

    Args:
        model: As configured.
        environment: How many demonstrations.
        factory: Makes environments.
        sft: None starts from the model as it is.
        run: Its seed is the fine-tuning's, its console gets a word about it.
        accelerator: Whose processes take part.

    Raises:
        ConfigError: The environment does not demonstrate, or does not tell its alphabet to a fresh model.
        ModelError: The model cannot be loaded.
    """
    tokenizer = pick_player_tokenizer(model, factory)
    folder: Path = run.directory / "sft"
    if sft is None:
        return model, tokenizer
    if not run.finds_model(folder):
        seed = run.config.seed
        shown = play_demonstrations(factory, episodes=environment.demonstrations, seed=seed)
        untrained = load_causal_lm(model.model_copy(update={"lora": None}), tokenizer)
        metrics = train_sft(untrained, tokenizer, shown, config=sft, folder=folder, seed=seed)
        told = ", ".join(f"{name} {metrics[name]:.4g}" for name in ("steps", "loss", "seconds"))
        run.say(f"fine-tuned on {len(shown)} turns of {environment.demonstrations} episodes: {told}")
    accelerator.wait_for_everyone()
    return model.model_copy(update={"path": str(folder), "config": None, "tokenizer": None}), tokenizer
