"""Making reward models: a causal language model's body with a new head, or a reward model's folder again."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from reward_models.model import ADAPTED_CONFIG, RewardModel, score_head
from rlhf.data.tokenization import end_token_ids
from rlhf.errors import ModelError
from rlhf.lm.loading import DTYPES, LoraSettings, ModelConfig, load_causal_lm

logger = logging.getLogger(__name__)

PAD_TOKEN = "<|pad|>"
ADAPTER_FILE = "adapter_config.json"
SCORING_SETTINGS = "reward_model"
"""Entry of a saved `config.json` that holds what scoring needs beyond the weights (see `RewardModelScorer`)."""


def make_reward_model(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, context_factor: float = 1.0
) -> RewardModel:
    """Make a reward model from a causal language model (or a fresh small config), or reopen a reward model.

    On a causal model's body sits a new head, N(0, 1/sqrt(h + 1)) without bias (Stiennon et al. 2020,
    arXiv 2009.01325). A reward model's folder keeps its own head. Dropout is off: a score must not be random.

    Args:
        model: A folder, a hub id or a fresh config, as for a causal language model; with `lora`, adapters and the
            head are trained and everything else is frozen.
        tokenizer: From `prepare_tokenizer`; its pad id goes into the config, and the embedding grows if it must.
        seed: Of the new head, and of all weights of a fresh model.
        context_factor: Lengthens the context so many times (see `extend_context`); 1 leaves it.

    Raises:
        ModelError: There is no such model, it has no sequence-classification form with a linear `score` head, or
            its positions cannot be interpolated.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # a fresh body and fresh adapters; the head has its own generator
        if model.path is not None and _is_sequence_classifier(model.path):
            classifier = open_classifier(model.path, dtype=DTYPES[model.dtype], attention=model.attention)
            # The former normalisation does not hold for what is trained now.
            setattr(classifier.config, SCORING_SETTINGS, None)
        else:
            classifier = _put_head_on_body(model, tokenizer, seed=seed)
        _configure(classifier, tokenizer)
        if context_factor != 1.0:
            extend_context(classifier, context_factor)
        trained = _add_lora(classifier, model.lora) if model.lora is not None else classifier
    if model.gradient_checkpointing:
        classifier.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if model.lora is not None:
            classifier.enable_input_require_grads()  # frozen embeddings would cut the graph at the first checkpoint
    return RewardModel(trained)


def open_classifier(path: str | Path, *, dtype: Any = torch.float32, attention: str | None = None) -> PreTrainedModel:
    """Open a sequence-classification folder or hub id, refusing one whose weights are incomplete."""
    looks_local = str(path).startswith((".", "/", "~")) or str(path).count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ModelError("no such model folder", where=str(path), expected="a folder saved by save_pretrained")
    arguments = {} if attention is None else {"attn_implementation": attention}
    if (Path(path) / ADAPTER_FILE).is_file():
        return _open_adapters(Path(path), dtype=dtype, **arguments)
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **arguments
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"not loadable as a reward model: {str(error).splitlines()[0]}", where=str(path)) from error
    if loading["missing_keys"]:
        raise ModelError(
            "this is no trained reward model: weights are missing",
            where=str(path),
            got=", ".join(sorted(loading["missing_keys"])),
            remedy="Train one with the reward_model recipe, or give the folder that it saved.",
        )
    return model


def _open_adapters(folder: Path, *, dtype: Any, **arguments: Any) -> PreTrainedModel:
    """Open a peft folder of adapters and head on its base, merged into one plain model."""
    from peft import PeftConfig, PeftModel

    _require_saved_head(folder)
    try:
        base = str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
        own = folder / ADAPTED_CONFIG
        config = AutoConfig.from_pretrained(own if own.is_file() else base, num_labels=1, trust_remote_code=False)
        text = config.get_text_config()
        vocabulary, pad_token = text.vocab_size, config.pad_token_id
        # A pad token may have been added; its row of the embedding is never read, so the base need not have it.
        text.vocab_size = AutoConfig.from_pretrained(base, trust_remote_code=False).get_text_config().vocab_size
        config.pad_token_id = text.pad_token_id = None
        model = AutoModelForSequenceClassification.from_pretrained(
            base, config=config, dtype=dtype, use_safetensors=True, trust_remote_code=False, **arguments
        )
        if vocabulary != text.vocab_size:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        model.config.pad_token_id = model.config.get_text_config().pad_token_id = pad_token
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"adapters not loadable: {str(error).splitlines()[0]}",
            where=str(folder),
            remedy="Adapters need their base where it was when they were trained; a merged folder needs none.",
        ) from error


def _require_saved_head(folder: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
            names = list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"the adapters' weights cannot be read: {error}", where=str(folder)) from error
    if not any(name.endswith("score.weight") for name in names):
        raise ModelError(
            "the adapters were saved without the reward model's head",
            where=str(folder),
            remedy='Train them with task_type="SEQ_CLS", which trains and saves `score`.',
        )


def _is_sequence_classifier(path: str) -> bool:
    adapters = Path(path) / ADAPTER_FILE
    if adapters.is_file():
        return json.loads(adapters.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return False  # nothing at all, which load_causal_lm refuses
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def _put_head_on_body(model: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, seed: int) -> PreTrainedModel:
    """Load a causal language model and move its body under a new one-label classifier, without a second copy."""
    plain = model.model_copy(update={"lora": None, "gradient_checkpointing": False})
    causal = load_causal_lm(plain, tokenizer if model.config is not None else None)
    config = copy.deepcopy(causal.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise ModelError(
            "this architecture has no sequence-classification form", where=str(model.path), got=config.model_type
        ) from error
    prefix = classifier.base_model_prefix
    body = getattr(causal, causal.base_model_prefix)
    if type(getattr(classifier, prefix)) is not type(body):
        raise ModelError(
            "the classifier's body is not the language model's",
            where=str(model.path),
            got=type(body).__name__,
            expected=type(getattr(classifier, prefix)).__name__,
        )
    setattr(classifier, prefix, body)
    body.config = classifier.config
    classifier.name_or_path = str(model.path or "")  # adapters name their base by it
    score_head(classifier)  # refuses heads of another shape before they are replaced
    classifier.score = new_head(config.get_text_config().hidden_size, seed=seed).to(causal.device, causal.dtype)
    return classifier


def new_head(width: int, *, seed: int) -> nn.Linear:
    """Return a head with weight [1, width] from N(0, 1/sqrt(width + 1)) and no bias.

    Source: Stiennon et al. 2020, "Learning to summarize from human feedback" (arXiv 2009.01325).
    """
    head = nn.Linear(width, 1, bias=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(1, width, generator=generator) / math.sqrt(width + 1))
    return head


def extend_context(model: PreTrainedModel, factor: float) -> None:
    """Lengthen a model's context by interpolating its rotary positions, in place; training must follow.

    Position p is encoded as p / factor, so `factor` times as many positions lie in the range the model knows. The
    config says so in transformers' own terms (`rope_type: linear`), so the saved folder opens with it.
    Source: Chen et al. 2023, "Extending context window of large language models via positional interpolation"
    (arXiv 2306.15595).

    Raises:
        ModelError: The model has no rotary positions, or they are scaled already.
    """
    config, body = model.config, getattr(model, model.base_model_prefix)
    rope = getattr(config, "rope_parameters", None)
    if not hasattr(body, "rotary_emb") or not isinstance(rope, dict) or rope.get("rope_type") != "default":
        raise ModelError(
            "the context can only be extended where plain rotary positions are used",
            where="context_factor",
            got=f"{config.model_type} with {rope}",
            remedy="Leave context_factor at 1, or take a model with a longer context.",
        )
    config.rope_parameters = {**rope, "rope_type": "linear", "factor": float(factor)}
    config.max_position_embeddings = int(config.max_position_embeddings * factor)
    body.rotary_emb = type(body.rotary_emb)(config).to(model.device)


def embedding_rows(model: PreTrainedModel) -> int:
    """Tokens that a model's embedding table has room for."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def _configure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Switch dropout off, fit the embedding to the tokenizer, and write what transformers must know."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "dropout" in name:
                setattr(module, name, 0.0)  # attention keeps its rate as a plain number
    for name, value in model.config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(model.config, name, 0.0)
    if len(tokenizer) > embedding_rows(model):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.eos_token_id = tokenizer.eos_token_id
    model.config.problem_type = "regression"  # pipeline then shows the score itself, not its sigmoid


def _add_lora(model: PreTrainedModel, lora: LoraSettings) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="SEQ_CLS",
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides it by the rank as a float
        lora_dropout=0.0,
        target_modules=lora.target_modules,
        # The head is new: left out here, it would stay at its random start and not be saved.
        modules_to_save=[*lora.modules_to_save, "score"],
    )
    base = model.name_or_path
    if base and Path(base).is_dir():
        model.name_or_path = str(Path(base).resolve())  # adapters are opened from other working directories too
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"LoRA does not fit this model: {str(error).splitlines()[0]}", where="model.lora") from error


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, *, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Give a reward model's own tokenizer, in place, what a reward model needs, and return it.

    A pad token that differs from the end token: transformers' own head, which `pipeline` uses, takes the last token
    that is not the pad token, so with pad == end it would read the token before the end. The unknown token serves if
    there is one (texts end in the end token, so it is never the last); otherwise `<|pad|>` is added.

    Args:
        tokenizer: Changed in place; a reward model's tokenizer is its own, the policy's is not touched.
        chat_template: Jinja template to use instead of the tokenizer's own, if any; it is saved with the tokenizer.

    Raises:
        ModelError: The tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "the tokenizer has no end token, which every scored text ends in",
            remedy="Set tokenizer.eos_token and save the tokenizer into the model's folder.",
        )
    tokenizer.padding_side = "right"
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    ends = end_token_ids(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        reusable = tokenizer.unk_token_id not in (None, *ends, tokenizer.bos_token_id)
        former = tokenizer.pad_token
        tokenizer.add_special_tokens({"pad_token": str(tokenizer.unk_token) if reusable else PAD_TOKEN})
        logger.info("reward model's tokenizer: pad token %r -> %r", former, tokenizer.pad_token)
    return tokenizer
