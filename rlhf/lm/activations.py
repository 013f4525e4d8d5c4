"""How many bytes a forward keeps for its backward, counted before a weight is loaded.

The model's own forward is made on torch's meta device, where nothing is computed or allocated, and autograd is asked
what it saves. So every architecture that transformers knows is counted by its own code, with LoRA too (a frozen layer
saves less), but for attention: what a fused kernel keeps (query, key, value, output) stands in for `sdpa` and
`flash_attention_2`, since on the meta device sdpa would take its slow path, which keeps a T x T matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.lm.backbone import unwrap_adapters
from rlhf.lm.footprint import read_model_config
from rlhf.lm.loading import ModelConfig, add_lora

COUNTED_ATTENTION = "rlhf_counted"


def activation_bytes(
    model: ModelConfig,
    *,
    length: int,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> int | None:
    """Bytes that a forward and backward of the body over one row hold; the head and the loss are left out.

    What the forward saves, and as much again as one layer saves, which a layer's backward works with. With gradient
    checkpointing, each layer's input, and one layer's forward and backward. Linear in the number of rows.

    Args:
        model: A folder or hub id, of which config.json alone is read; or a fresh config.
        length: Tokens of the row.
        dtype: In which the layers compute.
        tokenizer: Gives a fresh model its vocabulary.

    Returns:
        None where the architecture's forward does not run without numbers (some mixtures of experts).

    Raises:
        ModelError: There is no config.json to read.
    """
    config = read_model_config(model, tokenizer)
    attention = COUNTED_ATTENTION if model.attention != "eager" else "eager"
    try:
        with _counted_attention(), torch.device("meta"):
            built: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
            if model.lora is not None:
                built = add_lora(built, model.lora)
            built.train()
            for module in built.modules():
                if isinstance(module, torch.nn.Dropout):  # the policy has none, whatever the config says
                    module.p = 0.0
            tokens = torch.zeros(1, length, dtype=torch.long)
            saved = _saved_bytes(built, input_ids=tokens, attention_mask=torch.ones_like(tokens))
    except (RuntimeError, NotImplementedError, ValueError, TypeError):  # as their forwards happen to fail
        return None
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    if not model.gradient_checkpointing:
        return saved + saved // layers
    return 2 * saved // layers + layers * length * int(text.hidden_size) * dtype.itemsize


def _saved_bytes(model: Any, **inputs: Tensor) -> int:
    """Storages that autograd holds after a forward of the body, each once; weights are not among them."""
    owned = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    held: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage()._cdata
        if place not in owned:
            held.setdefault(place, tensor)  # kept alive, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = unwrap_adapters(model).base_model(**inputs, use_cache=False)
    assert output is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


class _Counted(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, length, _ = query.shape
        # Kernels write it as [batch, length, heads, width], so that what follows needs no copy.
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(query, key, value, out)
        return out


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Signature of transformers' attention functions."""
    return _Counted.apply(query, key, value).transpose(1, 2), None  # pyright: ignore[reportOptionalMemberAccess]


@contextmanager
def _counted_attention() -> Iterator[None]:
    """Let transformers know the stand-in for a while."""
    ALL_ATTENTION_FUNCTIONS.register(COUNTED_ATTENTION, _attend)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[COUNTED_ATTENTION]
