"""Models and tokenizers from a folder, a hub id, or a small config; LoRA; a character tokenizer for tiny tasks."""

from __future__ import annotations

import difflib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf.config import Config
from rlhf.errors import ConfigError, ModelError
from rlhf.lm.compilation import CompileBackend, compile_layers

DTYPES: dict[str, Any] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}


class LoraSettings(Config):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685): train a few small matrices, keep the rest."""

    rank: int = Field(16, ge=1)
    """Rank of every adapter."""
    alpha: float = Field(32.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get an adapter; `all-linear` takes every linear layer except the output head."""
    modules_to_save: list[str] = []
    """Layers that are trained and saved whole, for instance `lm_head` after new tokens were added."""


class ModelConfig(Config):
    """Which causal language model to use: an existing one (`path`) or a fresh one (`config`)."""

    path: str | None = None
    """A transformers folder or hub id. A folder with a LoRA adapter is merged into its base."""
    config: dict[str, Any] | None = None
    """A fresh model instead: `{"model_type": "llama", "hidden_size": 64, ...}`; vocabulary and special tokens
    come from the tokenizer."""
    tokenizer: str | None = None
    """Folder or hub id of the tokenizer; defaults to `path`."""
    pad_token: str | None = None
    """A token of the vocabulary to pad with, where the tokenizer names none (Llama 3: `<|finetune_right_pad_id|>`)."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Type of the weights; `auto` keeps what the folder holds. Trained weights are best kept in float32, with
    mixed precision left to accelerate."""
    lora: LoraSettings | None = None
    """Train low-rank adapters instead of all weights."""
    quantization: Literal["nf4", "int8"] | None = None
    """QLoRA (https://arxiv.org/abs/2305.14314): keep the frozen weights in 4-bit NormalFloat or 8 bits, computed with
    in bfloat16 (float32 without a GPU, slowly); asks for `path`, `lora` and bitsandbytes."""
    attention: str | None = None
    """Attention implementation of transformers: `sdpa` (its default), `eager`, `flash_attention_2`, ..."""
    gradient_checkpointing: bool = False
    """Recompute each layer in backward: less memory, about a third more time."""
    compile: CompileBackend | None = None
    """Compile the layers with torch.compile for training and measuring (not for generation): `inductor` fuses their
    element-wise operations. The first forward and backward take about a minute on a CPU; whether it pays on a GPU is
    not yet measured. `aot_eager` and `eager` only trace."""

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.path is None) == (self.config is None):
            raise ValueError("set exactly one of `path` (an existing model) and `config` (a fresh one)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError('`config` needs a `model_type`, for instance {"model_type": "llama", "hidden_size": 64}')
        if self.quantization is not None and (self.lora is None or self.path is None):
            raise ValueError(
                "quantized weights cannot be trained and only an existing model has any; set `path` and `lora`, or "
                "remove `quantization`"
            )
        return self


def resolve_precision(word: Literal["no", "bf16", "auto"] | None) -> Literal["no", "bf16"] | None:
    """Replace `auto` by what the hardware has: bfloat16 on a GPU that computes with it, else no mixed precision."""
    if word != "auto":
        return word
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def load_tokenizer(source: ModelConfig | str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        source: A folder, a hub id, or a `ModelConfig` (its `tokenizer`, else its `path`).

    Returns:
        The tokenizer, padding on the left.

    Raises:
        ModelError: There is no tokenizer at that place, or it lacks `pad_token`.
    """
    if isinstance(source, ModelConfig):
        path = source.tokenizer or source.path
        if path is None:
            raise ModelError(
                "a model made from `config` brings no tokenizer",
                where="model.tokenizer",
                remedy="Set model.tokenizer to a folder or hub id, or pass one such as character_tokenizer(...).",
            )
    else:
        path = str(source)
    _require_existing_folder(path, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the tokenizer cannot be loaded: {_first_line(error)}",
            where=path,
            remedy="Save it beside the model with tokenizer.save_pretrained(folder).",
        ) from error
    tokenizer.padding_side = "left"
    if isinstance(source, ModelConfig) and source.pad_token is not None:
        _set_pad_token(tokenizer, source.pad_token)
    return tokenizer


def _set_pad_token(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """A token that is not there yet would have no embedding."""
    if token not in tokenizer.get_vocab():
        raise ModelError(
            "the tokenizer has no such token",
            where="model.pad_token",
            got=token,
            remedy=f"Choose one of its vocabulary, for instance the end token {tokenizer.eos_token!r}.",
        )
    tokenizer.pad_token = token


def load_causal_lm(model: ModelConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """Load or build a causal language model.

    Weights are read from safetensors only, and no code from the folder is executed. A fresh model is initialised
    with torch's global generator: seed it before.

    Args:
        model: What to load.
        tokenizer: Needed for a fresh model; for an existing one it is checked against the vocabulary.

    Returns:
        The model in eval mode; with `model.lora` a `PeftModel` around it.

    Raises:
        ModelError: The folder cannot be opened, or tokenizer and model do not fit.
        ConfigError: `config` has an unknown model type or an unknown key; or `quantization` without bitsandbytes.
    """
    loaded = _build(model, tokenizer) if model.config is not None else _open(model)
    if tokenizer is not None and len(tokenizer) > loaded.config.get_text_config().vocab_size:
        raise ModelError(
            "the tokenizer has more tokens than the model has embeddings",
            where=model.path or "model.config",
            got=len(tokenizer),
            expected=f"at most {loaded.config.get_text_config().vocab_size}",
            remedy="Use the model's own tokenizer, or model.resize_token_embeddings(len(tokenizer)) and save both.",
        )
    if model.quantization is not None:
        loaded = _prepare_quantized(loaded)
    if model.lora is not None:
        loaded = add_lora(loaded, model.lora)
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if model.compile is not None:
        compile_layers(loaded, model.compile)
    return loaded.eval()


def add_lora(model: PreTrainedModel, lora: LoraSettings) -> Any:
    """Wrap `model` with fresh adapters (which change nothing until trained); all other weights are frozen."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(
        task_type="CAUSAL_LM",  # without a task type PEFT saves no head and from_pretrained finds no model class
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides it by the rank as a float
        lora_dropout=0.0,  # dropout would make policy and sampler two different distributions
        target_modules=lora.target_modules,
        modules_to_save=lora.modules_to_save or None,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        raise ModelError(f"LoRA does not fit this model: {_first_line(error)}", where="model.lora") from error


def _open(model: ModelConfig) -> PreTrainedModel:
    assert model.path is not None
    _require_existing_folder(model.path, "model")
    arguments: dict[str, Any] = {
        "dtype": DTYPES[model.dtype],
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    if model.attention is not None:
        arguments["attn_implementation"] = model.attention
    if model.quantization is not None:
        arguments |= _quantization_arguments(model)
    try:
        if (Path(model.path) / "adapter_config.json").is_file():
            return _open_merged(model.path, arguments)
        return AutoModelForCausalLM.from_pretrained(model.path, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"the model cannot be loaded: {_first_line(error)}",
            where=model.path,
            expected="a transformers folder or hub id of a causal language model with safetensors weights",
        ) from error


def _quantization_arguments(model: ModelConfig) -> dict[str, Any]:
    """What transformers is told of the quantized weights; on this process's GPU, because they cannot be moved.

    Without a GPU they stay on the CPU, where products are computed in float32: slow, with the same weights.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "quantized weights need bitsandbytes",
            where="model.quantization",
            got=model.quantization,
            remedy="Install it: pip install 'rlhf-toolkit[quantization]'.",
        )
    if (Path(str(model.path)) / "adapter_config.json").is_file():
        raise ConfigError(
            "an adapter is merged into its base, which rounds it away where the base is quantized",
            where="model.path",
            got=model.path,
            remedy="Merge it first: load_causal_lm(ModelConfig(path=...)).save_pretrained(folder).",
        )
    on_gpu = torch.cuda.is_available()
    if model.quantization == "nf4":
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
        )
    else:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    return {"quantization_config": settings, "device_map": {"": torch.cuda.current_device() if on_gpu else "cpu"}}


def _prepare_quantized(model: PreTrainedModel) -> Any:
    """Freeze the weights and keep norms and embeddings in float32; checkpointing is switched on by its own setting."""
    from peft import prepare_model_for_kbit_training

    for module in model.modules():
        # On some CPUs it packs 4-bit weights of certain shapes when it first predicts, fails on others, and computes in
        # bfloat16 from then on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def _open_merged(path: str, arguments: dict[str, Any]) -> PreTrainedModel:
    """Open an adapter folder as one plain model.

    Merging keeps one meaning of "reference": with an unmerged SFT adapter, switching adapters off would compare
    the policy to the base model instead of the SFT model.
    """
    from peft import AutoPeftModelForCausalLM

    arguments.pop("use_safetensors")
    return AutoPeftModelForCausalLM.from_pretrained(path, **arguments).merge_and_unload()


def _build(model: ModelConfig, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    if tokenizer is None:
        raise ModelError(
            "a fresh model needs a tokenizer for its vocabulary and special tokens",
            where="model.config",
            remedy="Set model.tokenizer or pass a tokenizer to load_causal_lm.",
        )
    config = fresh_config(model.config or {}, tokenizer)
    dtype = torch.float32 if model.dtype == "auto" else DTYPES[model.dtype]
    arguments = {} if model.attention is None else {"attn_implementation": model.attention}
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **arguments)
    except (ValueError, ImportError) as error:
        raise ModelError(f"the model cannot be built: {_first_line(error)}", where="model.config") from error


def fresh_config(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The transformers config of a fresh model; unknown keys are refused, since transformers ignores them silently."""
    settings = dict(settings)
    model_type = settings.pop("model_type")
    try:
        defaults = AutoConfig.for_model(model_type)
    except ValueError as error:
        raise ConfigError("unknown model type", where="model.config.model_type", got=model_type) from error
    known = {*defaults.to_dict(), *defaults.attribute_map, "attn_implementation"}
    for key in settings:
        if key not in known:
            nearest = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"Did you mean {nearest[0]!r}?" if nearest else f"{model_type} knows: {', '.join(sorted(known))}."
            raise ConfigError("unknown key", where=f"model.config.{key}", remedy=hint)
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    try:
        return AutoConfig.for_model(model_type, **{"vocab_size": len(tokenizer), **special, **settings})
    except (ValueError, TypeError) as error:
        raise ConfigError(f"not a valid {model_type} config: {_first_line(error)}", where="model.config") from error


def character_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character, for small tasks.

    Ids: 0 `<pad>`, 1 `<bos>`, 2 `<eos>`, then the characters in the order given. It adds no special tokens by
    itself and has no unknown token: a character outside the alphabet is an error, never a silent gap.

    Args:
        alphabet: The characters, each once.

    Returns:
        A fast tokenizer, padding on the left, that `save_pretrained` and `AutoTokenizer.from_pretrained` round-trip.

    Raises:
        ConfigError: The alphabet is empty or repeats a character.

    Example:
        >>> tokenizer = character_tokenizer("ab>")
        >>> tokenizer("ab>")["input_ids"]
        [3, 4, 5]
        >>> tokenizer.decode([3, 4, 2], skip_special_tokens=True)
        'ab'
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    repeated = sorted({character for character in alphabet if alphabet.count(character) > 1})
    if not alphabet or repeated:
        raise ConfigError(
            "not an alphabet", got=alphabet, expected="each character once", remedy=f"Repeated: {repeated}"
        )
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    vocabulary = {token: index for index, token in enumerate([*special.values(), *alphabet])}
    backend = Tokenizer(models.WordLevel(vocabulary))
    # [\s\S] and not ".": a newline is a character too.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", clean_up_tokenization_spaces=False, **special
    )


def _require_existing_folder(path: str, kind: str) -> None:
    """Paths that look local must exist: otherwise the hub client turns a typo into a network error."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not Path(path).is_dir():
        raise ModelError(
            f"no such {kind} folder", where=path, expected="a folder saved by save_pretrained, or a hub id"
        )
    models = sorted(str(file.parent) for file in Path(path).glob("*/config.json"))
    if models and not (Path(path) / "config.json").is_file() and not (Path(path) / "tokenizer_config.json").is_file():
        raise ModelError(f"no {kind} lies in this folder itself", where=path, expected=" or ".join(models))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
