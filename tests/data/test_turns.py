"""What stands between two turns: the tokens of the whole conversation, the template's newline included."""

from pathlib import Path

import pytest

from rlhf.data.continuation import plain_ids
from rlhf.data.tokenization import encode_completion, encode_prompt
from rlhf.data.turns import following_ids
from rlhf.errors import ModelError
from rlhf.lm.loading import character_tokenizer
from rlhf.lm.players import TURNS_TEMPLATE

SHARED = (Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "tokenizers").resolve()
QUESTION = [{"role": "user", "content": "hello"}]
ANSWER = {"role": "assistant", "content": "hi there"}
NEXT = [{"role": "user", "content": "and now?"}]


def small_tokenizer():
    tokenizer = character_tokenizer("abc>\n")
    tokenizer.chat_template = TURNS_TEMPLATE
    return tokenizer


def test_the_newline_after_the_end_token_is_the_environments():
    """Ids: pad 0, bos 1, end 2, a 3, b 4, c 5, > 6, newline 7. The template prints "<eos>\\n", "b\\n", ">"."""
    assert following_ids(small_tokenizer(), [{"role": "user", "content": "b"}], ended=True) == [7, 4, 7, 6]


def test_a_cut_turn_is_closed_by_the_environment():
    assert following_ids(small_tokenizer(), [{"role": "user", "content": "b"}], ended=False) == [2, 7, 4, 7, 6]


def test_a_template_that_leaves_turns_open_is_refused():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ModelError, match="does not close"):
        following_ids(tokenizer, [{"role": "user", "content": "b"}], ended=True)


@pytest.mark.skipif(not SHARED.exists(), reason="the shared tokenizers are not here")
@pytest.mark.parametrize("name", ["qwen2.5", "smollm2"])
def test_the_pieces_make_the_conversation_that_the_template_prints(name):
    """The oracle is the tokenizer's own template over the whole conversation."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / name)
    if not tokenizer.chat_template:
        pytest.skip("this tokenizer came without a template")
    whole = tokenizer.apply_chat_template([*QUESTION, ANSWER, *NEXT], tokenize=False, add_generation_prompt=True)
    pieces = encode_prompt(tokenizer, QUESTION) + encode_completion(tokenizer, QUESTION, [ANSWER])
    pieces += following_ids(tokenizer, NEXT, ended=True)
    assert pieces == plain_ids(tokenizer, whole)
    assert "<|im_end|>\n" in tokenizer.decode(pieces)
