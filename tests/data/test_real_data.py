"""Published data sets are read by configuration alone; the row counts are those of the sets' own READMEs."""

from pathlib import Path

import pytest

from rlhf.data.loading import DataConfig, load_demonstrations, load_prompts, load_rankings
from rlhf.errors import DataError

DATA = (Path(__file__).resolve().parents[2] / ".." / "shared" / "data").resolve()
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the shared data sets are not here")

RESPONSES = {"columns": {"completions": "responses"}}
INSTRUCTION = "{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}"
ALPACA = {"derive": {"prompt": INSTRUCTION}, "columns": {"completion": "output"}}
WORD_PROBLEM = {"columns": {"prompt": "sQuestion"}, "derive": {"answer": "lSolutions[0]"}}
PANDALM = {
    "derive": {
        "prompt": INSTRUCTION,
        # Six of its answers are the JSON values true and false.
        "completions": "[response1 | string, response2 | string]",
        "scores": "[[annotator1, annotator2, annotator3].count(1), [annotator1, annotator2, annotator3].count(2)]",
    },
    "tied": "keep",
}


def source(path, **settings):
    return DataConfig(path=str(DATA / path), **settings)


@pytest.mark.parametrize(
    ("path", "settings", "rows", "sizes"),
    [
        ("rankings/alpaca_eval_k4.jsonl.gz", RESPONSES, 805, {4: 805}),
        ("rankings/alpaca_eval_k16.jsonl.gz", RESPONSES, 805, {14: 2, 15: 22, 16: 781}),
        ("rankings/oasst1_en_ranked.jsonl", RESPONSES, 212, {2: 57, 3: 117, 4: 27, 5: 3, 6: 6, 8: 1, 9: 1}),
        ("rankings/oasst1_zh_ranked.jsonl", RESPONSES, 775, {2: 434, 3: 263, 4: 63, 5: 12, 6: 1, 8: 1, 10: 1}),
        ("hh-rlhf/helpful-base.test.jsonl.gz", {"tied": "keep"}, 2354, {2: 2354}),
        ("hh-rlhf/helpful-rejection-sampled.test.jsonl.gz", {"tied": "keep"}, 2749, {2: 2749}),
        ("pairs/dpo_en_demo.json", {"columns": {"prompt": "conversations"}}, 300, {2: 300}),
        ("pairs/hhh_pairs.jsonl", {}, 221, {2: 221}),
        ("pairs/pandalm_testset.json", PANDALM, 999, {2: 999}),
    ],
)
def test_rankings(path, settings, rows, sizes):
    rankings = load_rankings(source(path, **settings))
    assert len(rankings) == rows
    counted = [len(ranking.completions) for ranking in rankings]
    assert {size: counted.count(size) for size in set(counted)} == sizes


def test_best_first_files_are_ranked_as_they_stand():
    # The README: responses are best first, scores do not increase; the K=4 file has no ties.
    for ranking in load_rankings(source("rankings/alpaca_eval_k4.jsonl.gz", **RESPONSES)):
        assert ranking.ranks == (0, 1, 2, 3)
    by_order = load_rankings(source("rankings/oasst1_en_ranked.jsonl", order="best_first", **RESPONSES))
    assert by_order == load_rankings(source("rankings/oasst1_en_ranked.jsonl", **RESPONSES))


def test_rank_by_logit_gap():
    # The README advises it for the K=16 file, where many scores lie near 0; the K=4 file was made with gaps >= 0.7 nat.
    logits = {"derive": {"scores": "scores | map('logit') | list"}, "bad_rows": "drop", **RESPONSES}
    with pytest.warns(UserWarning, match="scores: cannot be derived"):  # a few scores are 0 or 1, with infinite logits
        kept = load_rankings(source("rankings/alpaca_eval_k4.jsonl.gz", min_score_gap=0.69, **logits))
    assert len(kept) >= 790
    assert all(ranking.ranks == (0, 1, 2, 3) for ranking in kept)
    with pytest.warns(UserWarning, match="scores: cannot be derived"):
        tied = load_rankings(source("rankings/alpaca_eval_k16.jsonl.gz", min_score_gap=0.7, tied="keep", **logits))
    assert max(max(ranking.ranks) for ranking in tied) < 15


def test_dialogues_share_all_but_the_last_turn():
    rankings = load_rankings(source("hh-rlhf/helpful-base.test.jsonl.gz", tied="keep"))
    assert all(str(ranking.prompt).endswith("\n\nAssistant:") for ranking in rankings)
    # Counted with a split at the last "Assistant:" of each text: 9 of 2354 dialogues part before their last turn.
    assert sum(any("\n\nAssistant:" in str(text) for text in ranking.completions) for ranking in rankings) == 9
    with pytest.raises(DataError, match="2 of 2354 rows are bad"):  # chosen and rejected are the same text
        load_rankings(source("hh-rlhf/helpful-base.test.jsonl.gz"))


@pytest.mark.parametrize(
    ("path", "settings", "rows"),
    [
        ("alpaca/alpaca_en_demo.json", ALPACA, 999),
        (
            "alpaca/seed_tasks.jsonl",
            {"derive": {"prompt": "{{ instruction }}\n{{ instances[0].input }}", "completion": "instances[0].output"}},
            175,
        ),
        ("gsm8k/train.jsonl", {"columns": {"prompt": "question", "completion": "answer"}}, 7473),
        ("math/aqua_cot_train.json", ALPACA, 2728),
    ],
)
def test_demonstrations(path, settings, rows):
    assert len(load_demonstrations(source(path, **settings))) == rows


@pytest.mark.parametrize(
    ("path", "rows", "empty"),
    [
        ("alpaca/alpaca_5000.json", 5000, 2),
        ("alpaca/code_alpaca_2k.json", 2017, 2),
        ("gsm8k_cot_sft/math_data.json.gz", 3260, 3),
    ],
)
def test_demonstrations_with_empty_answers_are_named(path, rows, empty):
    with pytest.raises(DataError, match=rf"{empty} of {rows} rows are bad:\n  line .*completion: is empty"):
        load_demonstrations(source(path, **ALPACA))
    with pytest.warns(UserWarning, match=f"{empty} of {rows} rows are bad"):
        assert len(load_demonstrations(source(path, bad_rows="drop", **ALPACA))) == rows - empty


@pytest.mark.parametrize(
    ("path", "settings", "rows"),
    [
        ("gsm8k/test.jsonl", {"columns": {"prompt": "question"}, "chat": True}, 1319),
        ("math/svamp.json", {"derive": {"prompt": "{{ Body }} {{ Question }}"}, "columns": {"answer": "Answer"}}, 1000),
        ("math/mawps.jsonl", {"columns": {"prompt": "input", "answer": "target"}}, 2065),
        ("math/aqua_test.jsonl", {"derive": {"prompt": "{{ question }}\n{{ options | join('\n') }}"}}, 254),
        ("math/aqua_dev.jsonl", {"derive": {"prompt": "{{ question }}\n{{ options | join('\n') }}"}}, 254),
        ("math/math500.jsonl", {"columns": {"prompt": "problem"}}, 500),
        ("math/multiarith.json", WORD_PROBLEM, 600),
        ("math/addsub.json", WORD_PROBLEM, 395),
        ("math/singleeq.json", WORD_PROBLEM, 508),
        ("math/last_letters.json", {"records_at": "examples", "columns": {"prompt": "question"}}, 500),
        ("math/game24.csv", {"columns": {"prompt": "Puzzles"}}, 1362),
        ("math/countdown_cd3_test.jsonl", {"derive": {"prompt": "Make {{ output }} from {{ input }}."}}, 256),
        ("text/tinystories_1000.json.gz", {"derive": {"prompt": "{{ text.split()[:8] | join(' ') }}"}}, 1000),
    ],
)
def test_prompts(path, settings, rows):
    assert len(load_prompts(source(path, **settings))) == rows


def test_plain_text():
    # 32,032 line ends and no end of line after the last name.
    assert len(load_prompts(source("text/names.txt", format="text"))) == 32033
    stories = load_demonstrations(source("text/tinystories_2M.txt.gz", format="text", separator="<|endoftext|>"))
    assert stories[1].completion.startswith("Once upon a time, there was a little car named Beep.")
