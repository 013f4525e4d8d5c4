"""A tiny reward model and its tokenizer, made anew for every test that may change them."""

import pytest

from reward_models.loading import make_reward_model, prepare_tokenizer
from rlhf.lm.loading import ModelConfig, character_tokenizer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Absolute positions: a wrong position under left padding shows, which rotary positions would hide.
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


@pytest.fixture
def tokenizer():
    return prepare_tokenizer(character_tokenizer("abcdefghijklmnopqrstuvwxyz> "))


@pytest.fixture(params=[LLAMA, GPT2], ids=["llama", "gpt2"])
def architecture(request):
    return request.param


@pytest.fixture
def reward_model(tokenizer):
    return make_reward_model(ModelConfig(config=LLAMA), tokenizer, seed=0)
