"""Dialogues in one text become chat messages; on Anthropic's own files every answer is the one a plain split finds."""

import gzip
import json
from pathlib import Path

import pytest

from rlhf.data.dialogues import split_dialogue
from rlhf.data.loading import DataConfig, load_prompts, load_rankings
from rlhf.errors import DataError

HH = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "hh-rlhf"


def test_what_was_said_may_have_blank_lines_and_name_the_speakers():
    text = "\n\nHuman: Write:\n\nHumans: all\n\nAssistant: Assistant: no turn of its own\n\nDone"
    assert [message["content"] for message in split_dialogue(text)] == [
        "Write:\n\nHumans: all",
        "Assistant: no turn of its own\n\nDone",
    ]


@pytest.mark.parametrize("text", ["", "Hello", "Hi\n\nHuman: there", "\n\nHuman:\n\nAssistant: Yes"])
def test_other_texts_and_empty_turns_are_refused(text):
    with pytest.raises(DataError, match="dialogue"):
        split_dialogue(text)


@pytest.mark.skipif(not HH.exists(), reason="the shared data are not here")
@pytest.mark.filterwarnings("ignore:.*(dropped|one tie)")
@pytest.mark.parametrize("name", ["helpful-base", "helpful-rejection-sampled"])
def test_anthropics_files_as_chats(name):
    file = HH / f"{name}.test.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    chats = {"derive": {"chosen": "chosen | dialogue", "rejected": "rejected | dialogue"}}
    rankings = load_rankings(DataConfig(path=str(file), tied="drop", bad_rows="drop", **chats))
    answers = {(row["chosen"].rpartition("\n\nAssistant:")[2].strip()) for row in rows}
    assert len(rows) - len(rankings) <= 32
    assert all(ranking.completions[0][-1]["content"] in answers for ranking in rankings)
    prompts = load_prompts(
        DataConfig(path=str(file), derive={"prompt": "(chosen | dialogue)[:-1]"}, keep=[], bad_rows="drop")
    )
    assert len(rows) - len(prompts) <= 1
    asked = {row["chosen"].rpartition("\n\nAssistant:")[0].rpartition("\n\nHuman:")[2].strip() for row in rows}
    unusual = [prompt for prompt in prompts if prompt.prompt[-1]["content"] not in asked]
    assert len(unusual) <= 2  # two turns of the assistant's in a row
