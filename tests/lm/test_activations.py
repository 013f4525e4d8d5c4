"""What a forward keeps for backward, counted without weights, against the same forward with weights."""

import pytest
import torch
from torch import nn

from rlhf.lm.activations import activation_bytes
from rlhf.lm.backbone import unwrap_adapters
from rlhf.lm.loading import LoraSettings, ModelConfig, load_causal_lm
from tests.lm.fresh_models import fresh_model

ROWS, LENGTH = 3, 40


def really_kept(model) -> int:
    """Bytes of the distinct tensors that autograd saves in a real forward on the CPU, weights left out."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = unwrap_adapters(model).base_model(input_ids=torch.full((ROWS, LENGTH), 4), use_cache=False)
    assert output[0].requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def layers(model) -> int:
    return model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt_neox", "gemma", "gemma3"])
def test_a_forward_keeps_what_is_counted(name, tmp_path):
    """Within a tenth; a layer's backward comes on top, as much as a layer keeps."""
    model = fresh_model(name)
    model.config.save_pretrained(tmp_path)
    kept = really_kept(model) / ROWS
    counted = activation_bytes(ModelConfig(path=str(tmp_path)), length=LENGTH)
    assert counted == pytest.approx(kept * (1 + 1 / layers(model)), rel=0.1)


def test_frozen_layers_keep_less(tmp_path):
    model = fresh_model("llama")
    model.save_pretrained(tmp_path)
    settings = ModelConfig(path=str(tmp_path), lora=LoraSettings(rank=2))
    kept = really_kept(load_causal_lm(settings, None)) / ROWS
    counted = activation_bytes(settings, length=LENGTH)
    assert counted == pytest.approx(kept * (1 + 1 / layers(model)), rel=0.1)


def test_it_depends_on_length_precision_attention_and_checkpointing(tmp_path):
    model = fresh_model("llama")
    model.config.save_pretrained(tmp_path)

    def count(length=LENGTH, dtype=torch.float32, **changes) -> int:
        counted = activation_bytes(ModelConfig(path=str(tmp_path), **changes), length=length, dtype=dtype)
        assert counted is not None
        return counted

    assert count(2 * LENGTH) == pytest.approx(2 * count(), rel=0.02)
    assert 0.5 * count() <= count(dtype=torch.bfloat16) < 0.7 * count()  # norms stay in float32
    heads = model.config.num_attention_heads
    # Written out, attention keeps the probabilities, T x T for each head and layer, at least.
    assert count(attention="eager") - count() > layers(model) * heads * LENGTH * LENGTH * 4
    kept = count() / (1 + 1 / layers(model))
    inputs = layers(model) * LENGTH * model.config.hidden_size * 4
    assert count(gradient_checkpointing=True) == pytest.approx(2 * kept / layers(model) + inputs, rel=0.01)


def test_what_cannot_be_counted_is_not_guessed(tmp_path):
    fresh_model("mixtral").config.save_pretrained(tmp_path)
    assert activation_bytes(ModelConfig(path=str(tmp_path)), length=8) is None
