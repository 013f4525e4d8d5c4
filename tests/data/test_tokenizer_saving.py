"""A saved tokenizer tokenizes as before."""

from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from rlhf.data.tokenizer_saving import save_tokenizer
from rlhf.errors import ModelError
from rlhf.lm.loading import character_tokenizer

REAL = Path(__file__).resolve().parents[2] / ".." / "shared/data/tokenizers"
TEXT = "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<s>caf\u00e9</s> x"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="real tokenizers are not here")
@pytest.mark.parametrize("name", ["minueza-32m-chat", "llama2"])
def test_special_tokens_are_followed_by_the_same_tokens(tmp_path, name):
    """transformers 5.23 forgets `legacy: true` of the first: "user" after <|im_start|> became another token."""
    tokenizer = AutoTokenizer.from_pretrained(REAL / name)
    before = tokenizer(TEXT)["input_ids"]
    save_tokenizer(tokenizer, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == before


def test_a_folder_that_tokenizes_differently_is_refused(tmp_path, monkeypatch):
    tokenizer = character_tokenizer("ab ")
    save_tokenizer(tokenizer, tmp_path)
    other = character_tokenizer("ab ")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *arguments, **named: other)
    with pytest.raises(ModelError, match=r"would tokenize differently.*pre_tokenizer"):
        save_tokenizer(tokenizer, tmp_path)
    other = character_tokenizer("ab c")
    with pytest.raises(ModelError, match="7 tokens instead of 6"):
        save_tokenizer(tokenizer, tmp_path)
