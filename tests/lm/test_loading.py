import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.config import load_config, validate
from rlhf.errors import ConfigError, ModelError
from rlhf.lm.loading import (
    LoraSettings,
    ModelConfig,
    add_lora,
    character_tokenizer,
    load_causal_lm,
    load_tokenizer,
    resolve_precision,
)
from tests.lm.fresh_models import fresh_model

SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


@pytest.fixture
def tokenizer():
    return character_tokenizer("abc>\n é")


def test_character_tokenizer_has_one_token_per_character_in_the_order_given(tokenizer):
    # 0-2 are the special tokens; then a b c > newline space é.
    assert tokenizer("ab>\n é")["input_ids"] == [3, 4, 6, 7, 8, 9]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == 10


@pytest.mark.parametrize("text", ["abc", "a  b", " a\n\nb ", "é>c", ""])
def test_character_tokenizer_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_character_tokenizer_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded("b>\na")["input_ids"] == tokenizer("b>\na")["input_ids"]
        assert loaded.decode([3, 4, 8, 5, 2], skip_special_tokens=True) == "ab c"
        assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 2)
    assert load_tokenizer(tmp_path).padding_side == "left"


def test_character_tokenizer_pads_on_the_left(tokenizer):
    batch = tokenizer(["a", "abc"], padding=True)
    assert batch["input_ids"] == [[0, 0, 3], [3, 4, 5]]


def test_character_outside_the_alphabet_is_no_silent_gap(tokenizer):
    with pytest.raises(Exception, match="UNK"):
        tokenizer("axb")


@pytest.mark.parametrize("alphabet", ["", "aba"])
def test_alphabet_must_hold_each_character_once(alphabet):
    with pytest.raises(ConfigError, match="alphabet"):
        character_tokenizer(alphabet)


def test_fresh_model_takes_vocabulary_and_special_tokens_from_the_tokenizer(tokenizer):
    model = load_causal_lm(ModelConfig(config=SMALL), tokenizer)
    assert model.config.vocab_size == 10
    assert (model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id) == (0, 1, 2)
    assert not model.training


def test_fresh_model_needs_a_tokenizer():
    with pytest.raises(ModelError, match="needs a tokenizer"):
        load_causal_lm(ModelConfig(config=SMALL))
    with pytest.raises(ModelError, match="brings no tokenizer"):
        load_tokenizer(ModelConfig(config=SMALL))


def test_misspelt_key_of_a_fresh_model_is_refused_with_the_nearest_name(tokenizer):
    with pytest.raises(ConfigError, match=r"model\.config\.hiden_size.*'hidden_size'"):
        load_causal_lm(ModelConfig(config={**SMALL, "hiden_size": 8}), tokenizer)


def test_unknown_model_type_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="unknown model type"):
        load_causal_lm(ModelConfig(config={**SMALL, "model_type": "lama"}), tokenizer)


@pytest.mark.parametrize("settings", [{}, {"path": "x", "config": SMALL}, {"config": {"hidden_size": 8}}])
def test_exactly_one_source(settings):
    from rlhf.config import validate

    with pytest.raises(ConfigError, match=r"exactly one|model_type"):
        validate(ModelConfig, settings)


def test_missing_folder_is_named(tmp_path):
    for load in (lambda path: load_causal_lm(ModelConfig(path=path)), load_tokenizer):
        with pytest.raises(ModelError, match="no such"):
            load(str(tmp_path / "nothing"))


def test_folder_without_a_model_is_one_clear_error(tmp_path):
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_causal_lm(ModelConfig(path=str(tmp_path)))


def test_weights_other_than_safetensors_are_refused(tmp_path):
    model = fresh_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safetensors"):
        load_causal_lm(ModelConfig(path=str(tmp_path)))


def test_tokenizer_larger_than_the_model_is_refused(tmp_path):
    fresh_model().save_pretrained(tmp_path)  # 61 embeddings
    large = character_tokenizer("".join(chr(0x4E00 + index) for index in range(59)))  # 62 tokens
    with pytest.raises(ModelError, match="more tokens than the model has embeddings"):
        load_causal_lm(ModelConfig(path=str(tmp_path)), large)


@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(tmp_path, name, dtype):
    fresh_model().save_pretrained(tmp_path)
    assert load_causal_lm(ModelConfig(path=str(tmp_path), dtype=name)).dtype == dtype


def test_lora_trains_adapters_only_and_starts_as_the_same_model():
    model = fresh_model()
    tokens = torch.arange(8)[None]
    before = model(tokens).logits.detach()
    wrapped = add_lora(model, LoraSettings(rank=4))
    trainable = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert torch.equal(wrapped(tokens).logits, before)


def test_adapter_folder_is_merged_into_one_plain_model(tmp_path):
    fresh_model().save_pretrained(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), lora=LoraSettings(rank=4))
    wrapped = load_causal_lm(config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    merged = load_causal_lm(ModelConfig(path=str(tmp_path / "adapter")))
    tokens = torch.arange(8)[None]
    assert not hasattr(merged, "peft_config") or not merged.peft_config
    torch.testing.assert_close(merged(tokens).logits, wrapped(tokens).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged(tokens).logits, fresh_model()(tokens).logits, atol=1e-2)


def test_saved_model_opens_with_transformers(tmp_path, tokenizer):
    model = load_causal_lm(ModelConfig(config=SMALL), tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.tensor([[3, 4, 5]])
    assert torch.equal(opened(tokens).logits, model(tokens).logits)


def test_gradient_checkpointing_is_switched_on(tokenizer):
    model = load_causal_lm(ModelConfig(config=SMALL, gradient_checkpointing=True), tokenizer)
    assert model.is_gradient_checkpointing


def test_attention_implementation_is_passed_on(tokenizer):
    assert (
        load_causal_lm(ModelConfig(config=SMALL, attention="eager"), tokenizer).config._attn_implementation == "eager"
    )


def test_config_reads_from_yaml(tmp_path):
    (tmp_path / "model.yaml").write_text("path: somewhere\nlora: {rank: 8, target_modules: [q_proj]}\n")
    config = load_config(ModelConfig, tmp_path / "model.yaml")
    assert config.lora == LoraSettings(rank=8, target_modules=["q_proj"])


# --- quantized weights: what can be tested without bitsandbytes; see test_quantized.py for the rest ------------------


@pytest.mark.parametrize("settings", [{"path": "x"}, {"config": SMALL, "lora": {}}])
def test_quantized_weights_are_for_lora_on_an_existing_model(settings):
    with pytest.raises(ConfigError, match=r"set `path` and `lora`"):
        validate(ModelConfig, {"quantization": "nf4", **settings})


def test_quantized_weights_without_bitsandbytes_say_how_to_install_it(tmp_path, monkeypatch):
    fresh_model().save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("rlhf.lm.loading.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'rlhf-toolkit\[quantization\]'"):
        load_causal_lm(ModelConfig(path=str(tmp_path), lora=LoraSettings(), quantization="int8"))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_transformers_is_asked_for_quantized_weights(quantization, tmp_path, monkeypatch):
    """A stand-in for from_pretrained on a GPU."""
    asked = {}

    def open_model(path, **arguments):
        asked.update(arguments)
        return fresh_model()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr("rlhf.lm.loading.find_spec", lambda name: object())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", open_model)
    model = load_causal_lm(ModelConfig(path=str(tmp_path), lora=LoraSettings(rank=2), quantization=quantization))
    settings = asked["quantization_config"]
    assert (settings.load_in_4bit, settings.load_in_8bit) == (quantization == "nf4", quantization == "int8")
    if quantization == "nf4":
        assert (settings.bnb_4bit_quant_type, settings.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    assert asked["device_map"] == {"": 3}
    learned = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learned
    assert all(".lora_" in name for name in learned)


@pytest.mark.parametrize(
    ("gpu", "bfloat16", "expected"), [(False, False, "no"), (True, False, "no"), (True, True, "bf16")]
)
def test_precision_follows_the_hardware_where_it_is_left_to_it(gpu, bfloat16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bfloat16)
    assert resolve_precision("auto") == expected
    assert [resolve_precision(word) for word in ("no", "bf16", None)] == ["no", "bf16", None]
