"""Prompt ids plus completion ids are the conversation's ids, on real tokenizers and on hostile small ones.

The expected side is `apply_chat_template(tokenize=True)` of transformers on the whole conversation, or ids that can be
read off a vocabulary written here.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.records import Prompt
from rlhf.data.tokenization import (
    decode_completion,
    encode_completion,
    encode_prompt,
    encode_prompts,
    end_token_ids,
    require_special_tokens,
)
from rlhf.errors import DataError, ModelError
from rlhf.lm.loading import character_tokenizer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SHARED = (Path(__file__).resolve().parents[2] / ".." / "shared").resolve()
CHAT_TOKENIZERS = ("qwen2.5", "minueza-32m-chat", "smollm2")
TOKENIZERS = ("gpt2", "llama2", *CHAT_TOKENIZERS)
MODELS = ("stories260K", "TinyStories-656K")
shared = pytest.mark.skipif(not SHARED.exists(), reason="the shared tokenizers are not here")

QUESTION = [{"role": "user", "content": "How are you?"}]
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "2 + 2 = ?"},
]
ANSWERS = ["Fine.", " 4", "4\n", "\n\n4", "```py\nprint(1)\n```\n", "你好，世界", "a  b", "", " "]
CHATML = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_LOADED = {}


def load(name):
    if name not in _LOADED:
        folder = SHARED / ("models" if name in MODELS else "data/tokenizers") / name
        _LOADED[name] = transformers.AutoTokenizer.from_pretrained(folder)
    return _LOADED[name]


def small(*, template=CHATML, bos=None, adds=(None, None), eos="<end>", pad="<pad>"):
    """One token per character a-z, space and newline; ids can be read off the list below."""
    special = ["<pad>", "<bos>", "<eos>", "<end>", "<user>", "<assistant>", "<system>"]
    vocabulary = {token: index for index, token in enumerate([*special, "\n", " ", *"abcdefghijklmnopqrstuvwxyz"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(special)
    if any(adds):
        single = " ".join(part for part in (adds[0], "$A", adds[1]) if part)
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[(token, vocabulary[token]) for token in set(adds) if token]
        )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=pad, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


PAD, BOS, EOS, END, USER, ASSISTANT, SYSTEM, NEWLINE, SPACE, A = range(10)
B = A + 1
CHAT_A = [{"role": "user", "content": "a"}]


# --- strings ------------------------------------------------------------------------------------------------------


def test_a_string_prompt_begins_once_and_does_not_end():
    assert encode_prompt(small(), "ab") == [A, B]
    closing = small(bos="<bos>", eos="<eos>", adds=("<bos>", "<eos>"))
    assert closing("ab")["input_ids"] == [BOS, A, B, EOS]
    assert encode_prompt(closing, "ab") == [BOS, A, B]
    assert encode_prompt(closing, "<bos>ab") == [BOS, A, B]
    # A prompt that spells the end token keeps it: the user wrote it.
    assert encode_prompt(closing, "ab<eos>")[:4] == [BOS, A, B, EOS]
    assert encode_prompt(small(bos="<bos>", eos="<bos>", adds=("<bos>", None)), "") == [BOS]


def test_a_string_completion_ends_exactly_once():
    tokenizer = small(bos="<bos>", eos="<eos>", adds=("<bos>", "<eos>"))
    assert encode_completion(tokenizer, "a", "b", add_end=True) == [B, EOS]
    assert encode_completion(tokenizer, "a", "b<eos>", add_end=True) == [B, EOS]
    assert encode_completion(tokenizer, "a", "b", add_end=False) == [B]
    assert encode_completion(tokenizer, "a", "", add_end=True) == [EOS]


def test_an_end_token_inside_a_completion_is_refused_or_taken_as_text():
    tokenizer = load("gpt2") if SHARED.exists() else None
    if tokenizer is not None:
        with pytest.raises(
            DataError, match=r"x\.jsonl, line 3: the completion 'a<\|endoftext\|>b' holds the end token"
        ):
            encode_completion(tokenizer, "p", "a<|endoftext|>b", where="x.jsonl, line 3")
        ids = encode_completion(tokenizer, "p", "a<|endoftext|>b", inner_end="text")
        assert ids.count(tokenizer.eos_token_id) == 1
        assert decode_completion(tokenizer, ids) == "a<|endoftext|>b"
    with pytest.raises(DataError, match="holds the end token"):
        encode_completion(small(), CHAT_A, "a<end>b")


@shared
@pytest.mark.parametrize("name", [*TOKENIZERS, *MODELS])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Once upon a time", ", there was a cat."),
        ("Once upon", " a time"),
        ("Hel", "lo"),
        ("One\n", "two"),
        ("x", "\ny"),
    ],
)
def test_what_is_decoded_is_what_follows_the_prompt(name, prompt, completion):
    tokenizer = load(name)
    prompt_ids = encode_prompt(tokenizer, prompt)
    completion_ids = encode_completion(tokenizer, prompt, completion)
    assert completion_ids[-1] == tokenizer.eos_token_id
    assert decode_completion(tokenizer, completion_ids) == completion
    # No space was added at the seam, as tokenizers of the sentencepiece kind do at the start of a text.
    assert (
        tokenizer.decode(prompt_ids + completion_ids, skip_special_tokens=True).strip() == (prompt + completion).strip()
    )
    assert prompt_ids[:2].count(tokenizer.bos_token_id or -1) <= 1


@shared
def test_known_ids():
    # sentencepiece pieces of llama2, by its own `convert_ids_to_tokens`: no leading "▁" on the word that goes on.
    tokenizer = load("llama2")
    assert tokenizer.convert_ids_to_tokens(encode_completion(tokenizer, "Hel", "lo"))[:-1] == ["lo"]
    assert tokenizer.convert_ids_to_tokens(encode_completion(tokenizer, "Hello", " world"))[:-1] == ["▁world"]
    assert tokenizer.convert_ids_to_tokens(encode_prompt(tokenizer, "Hello")) == ["<s>", "▁Hello"]


@shared
@given(
    st.text(alphabet="abc é你\n.,!?019 ", max_size=30), st.sampled_from(["gpt2", "llama2", "qwen2.5", "stories260K"])
)
def test_any_completion_comes_back(text, name):
    tokenizer = load(name)
    assert decode_completion(tokenizer, encode_completion(tokenizer, "Hi", text)) == text


# --- chat ---------------------------------------------------------------------------------------------------------


def test_small_chat_by_hand():
    tokenizer = small()
    assert encode_prompt(tokenizer, CHAT_A) == [USER, A, END, NEWLINE, ASSISTANT]
    # The template prints a newline after the end token; it is not the completion's.
    assert encode_completion(tokenizer, CHAT_A, "b") == [B, END]
    assert encode_completion(tokenizer, CHAT_A, [{"role": "assistant", "content": "b"}], add_end=False) == [B]


def test_a_turn_that_the_prompt_opens_is_continued():
    prompt = [*CHAT_A, {"role": "assistant", "content": "b"}]
    assert encode_prompt(small(), prompt) == [USER, A, END, NEWLINE, ASSISTANT, B]
    assert encode_completion(small(), prompt, "a") == [A, END]


def test_a_completion_may_run_over_several_turns():
    turns = [{"role": role, "content": text} for role, text in [("assistant", "b"), ("user", "a"), ("assistant", "a")]]
    expected = [B, END, NEWLINE, USER, A, END, NEWLINE, ASSISTANT, A, END]
    assert encode_completion(small(), CHAT_A, turns) == expected


def test_the_template_may_close_turns_with_another_token_than_the_end_token():
    tokenizer = small(eos="<eos>")
    assert end_token_ids(tokenizer) == [EOS, END]
    assert encode_completion(tokenizer, CHAT_A, "b") == [B, END]
    assert end_token_ids(small(eos="<end>")) == [END]


def test_a_template_set_later_counts():
    tokenizer = small(eos="<eos>", template=None)
    assert end_token_ids(tokenizer) == [EOS]
    tokenizer.chat_template = CHATML
    assert end_token_ids(tokenizer) == [EOS, END]


@shared
@pytest.mark.parametrize("name", CHAT_TOKENIZERS)
@pytest.mark.parametrize("prompt", [QUESTION, DIALOGUE])
@pytest.mark.parametrize("answer", ANSWERS)
def test_prompt_and_completion_are_the_conversation(name, prompt, answer):
    tokenizer = load(name)
    message = {"role": "assistant", "content": answer}
    whole = tokenizer.apply_chat_template([*prompt, message], tokenize=True, return_dict=False)
    end = len(whole) - whole[::-1].index(tokenizer.eos_token_id)
    assert tokenizer.decode(whole[end:]).strip() == ""  # all that follows the end token is the template's newline
    ours = encode_prompt(tokenizer, prompt) + encode_completion(tokenizer, prompt, answer)
    if tokenizer.decode(whole[:end]) == tokenizer.decode(ours) and ours != whole[:end]:
        # Only where the answer's first space merged with the header's newline: then the prompt's own ids must stand.
        assert answer[0].isspace()
    else:
        assert ours == whole[:end]
    assert ours.count(tokenizer.eos_token_id) == whole.count(tokenizer.eos_token_id)
    assert encode_completion(tokenizer, prompt, [message]) == encode_completion(tokenizer, prompt, answer)


@shared
def test_known_chat_ids():
    # Read off Qwen2.5's vocabulary: "Hello" 9707, " there" 1052, <|im_end|> 151645.
    assert encode_completion(load("qwen2.5"), QUESTION, "Hello there") == [9707, 1052, 151645]


# --- decoding -----------------------------------------------------------------------------------------------------


def test_decoding_obeys_the_mask_and_drops_special_tokens():
    tokenizer = small()
    assert decode_completion(tokenizer, [A, SPACE, B, END, PAD], [True, True, True, True, False]) == "a b"
    assert decode_completion(tokenizer, [A, B], None) == "ab"


# --- refusals -----------------------------------------------------------------------------------------------------


def test_special_tokens_are_required():
    require_special_tokens(small())
    with pytest.raises(
        ModelError,
        match=r"no pad token.*Set model\.pad_token \(from Python, tokenizer\.pad_token\), for instance to the end",
    ):
        require_special_tokens(small(pad=None))
    with pytest.raises(ModelError, match=r"no end token.*Set tokenizer\.eos_token"):
        require_special_tokens(small(eos=None))
    with pytest.raises(ModelError, match="no end token"):
        encode_completion(small(eos=None, template=None), "a", "b")


def test_chat_needs_a_template():
    with pytest.raises(ModelError, match=r"no chat template.*turn the messages into strings"):
        encode_prompt(small(template=None), CHAT_A)
    with pytest.raises(ModelError, match=r"the chat template does not close .* print '<end>'"):
        encode_completion(small(template="{% for m in messages %}{{ m.content }}{% endfor %}"), CHAT_A, "b")


def test_a_template_that_changes_the_prompt_is_refused():
    template = "{{ messages | length }}" + CHATML
    tokenizer = small(
        template=template.replace("{{ messages | length }}", "{% if messages | length > 1 %}a{% endif %}")
    )
    with pytest.raises(ModelError, match="prints the prompt differently"):
        encode_completion(tokenizer, CHAT_A, "b")


def test_a_conversation_that_the_template_refuses():
    tokenizer = small(template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="refuses this conversation: roles must alternate"):
        encode_prompt(tokenizer, CHAT_A, where="a.jsonl, line 2")


def test_characters_that_the_tokenizer_cannot_spell_are_named():
    tokenizer = character_tokenizer("abc>")
    with pytest.raises(DataError, match="no token for '1é', and none for what is unknown; got 'aé1>'"):
        encode_prompt(tokenizer, "aé1>")
    with pytest.raises(DataError, match="no token for '1'"):
        encode_completion(tokenizer, "a>", "1")


def test_too_long_prompts_are_named_and_never_cut():
    assert encode_prompt(small(), "abab", max_length=4) == [A, B, A, B]
    with pytest.raises(DataError, match=r"a\.jsonl, line 7: the prompt 'abab' has 4 tokens; expected at most 3"):
        encode_prompt(small(), "abab", max_length=3, where="a.jsonl, line 7")
    prompts = [Prompt("ab", source=f"a.jsonl, line {line}") for line in range(1, 9)]
    with pytest.raises(DataError, match=r"8 of 8 prompts cannot be used:\n  a\.jsonl, line 1: (.|\n)*and 3 more"):
        encode_prompts(small(), prompts, max_length=1)
    with pytest.raises(DataError, match=r"^a\.jsonl, line 1: the prompt"):
        encode_prompts(small(), prompts[:1], max_length=1)
    assert encode_prompts(small(), prompts[:2]) == [[A, B], [A, B]]
