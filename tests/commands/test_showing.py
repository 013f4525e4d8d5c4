"""`rlhf show-batch`: what the model is shown, and what of it is learned."""

import json

import pytest

from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.commands.showing import mark_tokens, show_batch
from rlhf.config import Config, validate
from rlhf.data.records import Demonstration
from rlhf.errors import UserError
from rlhf.lm.loading import character_tokenizer
from rlhf.lm.sft import SftConfig
from rlhf.lm.sft_preview import ShownRow, preview_sft

MODEL = {"config": {"model_type": "llama", "hidden_size": 16}}
TOKENIZER = character_tokenizer("abc>")
A, B, ARROW, END = 3, 4, 6, 2


def shown(recipe: str, **settings) -> str:
    module = import_recipe(find_recipe(recipe))
    return "\n".join(show_batch(validate(module.CONFIG, {"model": MODEL, **settings}), rows=2, colour=False))


def test_the_completion_and_its_end_token_are_marked():
    task = {"name": "sort_letters", "word_length": 3, "letters": 5, "train": 10, "held_out": 4}
    text = shown("sft", demonstrations={"task": task}, training={"batch_size": 2})
    rows = [line for line in text.splitlines() if ">" in line and "«" in line]
    assert len(rows) == 2
    for row in rows:
        prompt, answer = row.split(">", 1)
        assert answer == f"«{''.join(sorted(prompt))}<eos>»"
    # 3 letters and ">" against 3 letters and the end: half of the tokens.
    assert "10 demonstrations (0 dropped as too long), 4 held out; 50.0% of the tokens are learned" in text
    assert "the end token is learned in 100.0% of the rows" in text


def test_colours_tell_learned_and_special_tokens_apart():
    row = ShownRow([A, END, B, END], [False, False, True, True], [0])
    assert mark_tokens(TOKENIZER, row, colour=True) == (
        "\x1b[90ma\x1b[0m\x1b[33m<eos>\x1b[0m\x1b[32mb\x1b[0m\x1b[1;92m<eos>\x1b[0m"
    )


def test_packed_demonstrations_are_kept_apart_and_padding_is_counted():
    demonstrations = [Demonstration("ab>", "a"), Demonstration("a>", "b")]  # 5 and 4 tokens
    config = SftConfig(batch_size=2, max_length=16, packing=True)
    packed = preview_sft(TOKENIZER, demonstrations, config=config)
    assert [sorted(row.starts) for row in packed.rows] in ([[0, 5]], [[0, 4]])
    padded = preview_sft(TOKENIZER, demonstrations, config=config.model_copy(update={"packing": False}))
    assert sorted(len(row.input_ids) for row in padded.rows) == [4, 5]
    assert padded.padding == pytest.approx(1 / 10)
    assert padded.learned_tokens == pytest.approx(4 / 9)


def test_prompts_are_shown_with_the_columns_that_the_reward_gets(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"{word}>", "answer": word}) + "\n" for word in ("ab", "c", "cc")))
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    text = shown(
        "grpo",
        model={"path": str(tmp_path), "tokenizer": str(tmp_path / "tokenizer")},
        prompts={"data": {"path": str(file)}, "held_out": 1},
        reward={"function": "x.py:f"},
        iterations=1,
    )
    assert "--- prompt 1: " in text
    assert text.count("  answer: ") == 2
    assert "2 prompts, 1 held out" in text


def test_evaluation_shows_the_prompts_that_it_answers(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "ab>"}\n{"prompt": "c>"}\n{"prompt": "cc>"}\n')
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    model = {"path": str(tmp_path), "tokenizer": str(tmp_path / "tokenizer")}
    assert "--- 3 prompts; tokens:" in shown("evaluate", model=model, data={"path": str(file)})
    split = shown("evaluate", model=model, prompts={"data": {"path": str(file)}, "held_out": 1})
    assert "--- 1 prompts; tokens:" in split


def test_a_recipe_without_texts_is_refused():
    with pytest.raises(UserError, match="no batches of text"):
        show_batch(Config())
    with pytest.raises(UserError, match="no batches of text"):
        shown("evaluate", texts={"path": "x.jsonl"})
