"""Cases of `grpo.py`: random models of several shapes, and prompts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

PROMPT_LENGTH = 16
MODELS = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "vocab": 512,
    },
    "small": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "vocab": 8192,
    },
    "wide": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab": 151_665,
    },
    "half_billion": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab": 151_665,
    },
    "one_and_a_half_billion": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab": 151_665,
    },
}
"""Shapes; the last two are Qwen2.5-0.5B's and -1.5B's, with an output matrix of its own."""


class Case(NamedTuple):
    """What is measured in one row of the table."""

    model: str
    limit: int
    """Most tokens of a completion."""
    ends: bool
    steps: int
    """Measured steps of each side."""


CASES = {
    "tiny_32": Case("tiny", 32, ends=False, steps=15),
    "tiny_128": Case("tiny", 128, ends=False, steps=11),
    "tiny_ends": Case("tiny", 128, ends=True, steps=11),
    "small_128": Case("small", 128, ends=False, steps=3),
    "wide_24": Case("wide", 24, ends=False, steps=3),
    "gpu_05b_256": Case("half_billion", 256, ends=False, steps=3),
    "gpu_05b_ends": Case("half_billion", 256, ends=True, steps=3),
    "gpu_15b_256": Case("one_and_a_half_billion", 256, ends=False, steps=2),
}
TOKENIZER = Path(__file__).parents[2] / "shared" / "data" / "tokenizers" / "qwen2.5"
"""Of the wide model; see `--tokenizer`."""
MEAN_LENGTH = 40
"""Of completions in cases with an end."""


def make_model(folder: Path, case: Case, wide_tokenizer: Path) -> str:
    """Write a random Llama and its tokenizer; return what the tokenizer is."""
    from rlhf.lm.loading import ModelConfig, load_causal_lm, load_tokenizer

    shape = dict(MODELS[case.model])
    vocabulary = shape.pop("vocab")
    real = vocabulary == 151_665 and wide_tokenizer.is_dir()
    tokenizer = load_tokenizer(wide_tokenizer) if real else _one_token_per_character(vocabulary)
    assert len(tokenizer) == vocabulary, f"{wide_tokenizer} has {len(tokenizer)} tokens, not {vocabulary}"
    torch.manual_seed(0)
    settings = {"model_type": "llama", **shape, "max_position_embeddings": 1024}
    model = load_causal_lm(ModelConfig(config=settings), tokenizer)
    if case.ends:
        _make_ends_likely(model, tokenizer.eos_token_id, vocabulary)
    else:
        tokenizer.add_special_tokens({"eos_token": "<never>"})  # one past the vocabulary: the model cannot write it
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return wide_tokenizer.name if real else "one token per character"


def _one_token_per_character(vocabulary: int) -> Any:
    from rlhf.lm.loading import character_tokenizer

    first = 0x4E00 if vocabulary < 20_000 else 0x20000  # past the surrogates, which are no characters
    return character_tokenizer("".join(chr(first + index) for index in range(vocabulary - 3)))


@torch.no_grad()
def _make_ends_likely(model: Any, end: int, vocabulary: int) -> None:
    """Give the end token probability 1 / MEAN_LENGTH everywhere: one hidden dimension is held constant and feeds it."""
    model.model.embed_tokens.weight[:, 0] = 1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    ids = torch.randint(3, vocabulary, (8, 64))
    level = model.model(ids)[0][..., 0].mean()
    model.lm_head.weight[:, 0] = 0.0
    model.lm_head.weight[end] = 0.0
    model.lm_head.weight[end, 0] = torch.log(torch.tensor(vocabulary / (MEAN_LENGTH - 1))) / level


def prompts_of(folder: Path, count: int) -> list[str]:
    """Random prompts of equal length."""
    from rlhf.lm.loading import load_tokenizer

    letters = sorted(token for token in load_tokenizer(folder).get_vocab() if len(token) == 1)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(len(letters), (count, PROMPT_LENGTH), generator=generator).tolist()
    return ["".join(letters[index] for index in row) for row in rows]


def runs_on_gpu(case: str) -> bool:
    """Whether a case is one for a GPU."""
    return case.startswith("gpu_")
