"""Every file format and every form of record, and one clear error for every bad line."""

import csv
import gzip
import json

import pytest

from rlhf.config import load_config
from rlhf.data.loading import DataConfig, load_demonstrations, load_prompts, load_rankings, split_holdout
from rlhf.data.records import Demonstration, Prompt, Ranking
from rlhf.errors import ConfigError, DataError

ROWS = [{"prompt": "2+2?", "answer": 4}, {"prompt": "3+3?", "answer": 6}]
PROMPTS = [Prompt("2+2?", {"answer": 4}), Prompt("3+3?", {"answer": 6})]


def write(path, text):
    data = text.encode() if isinstance(text, str) else text
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def rankings(tmp_path, *rows, **settings):
    return load_rankings(DataConfig(path=write(tmp_path / "r.jsonl", lines(*rows)), **settings))


# --- formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", lines(*ROWS)),
        ("a.jsonl", lines(*ROWS).rstrip("\n")),
        ("a.jsonl", lines(*ROWS).replace("\n", "\r\n") + "\n \n"),
        ("a.jsonl", "\ufeff" + lines(*ROWS)),
        ("a.jsonl.gz", lines(*ROWS)),
        ("a.ndjson", lines(*ROWS)),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json.gz", json.dumps(ROWS)),
        ("a.json", lines(*ROWS)),
    ],
)
def test_json_formats_give_the_same_prompts(tmp_path, name, text):
    assert load_prompts(DataConfig(path=write(tmp_path / name, text))) == PROMPTS


def test_csv(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "answer"], ['say "hi",\nplease', "4"], ["x", ""]])
    loaded = load_prompts(DataConfig(path=str(path)))
    assert loaded == [Prompt('say "hi",\nplease', {"answer": "4"}), Prompt("x", {"answer": ""})]
    # The first row spans lines 2 and 3, so the second begins on line 4.
    assert [prompt.source for prompt in loaded] == [f"{path}, line 2", f"{path}, line 4"]


def test_text_only_when_asked(tmp_path):
    path = write(tmp_path / "a.txt", "one\ntwo words\n")
    with pytest.raises(DataError, match="format: text"):
        load_prompts(DataConfig(path=path))
    assert load_prompts(DataConfig(path=path, format="text")) == [Prompt("one"), Prompt("two words")]
    assert load_demonstrations(DataConfig(path=path, format="text"))[1] == Demonstration("", "two words")


def test_text_pieces(tmp_path):
    path = write(tmp_path / "a.txt", "\nOne day\nit rained.\n<|end|>\n\nTwo.\n<|end|>\n")
    loaded = load_prompts(DataConfig(path=path, format="text", separator="<|end|>"))
    assert loaded == [Prompt("One day\nit rained."), Prompt("Two.")]
    assert [prompt.source.rpartition(" ")[2] for prompt in loaded] == ["2", "6"]


def test_separators_that_json_allows_inside_strings(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    assert load_prompts(DataConfig(path=path)) == [Prompt("a\u2028b\x85c")]


def test_nested_json_and_plain_strings(tmp_path):
    path = write(tmp_path / "a.json", json.dumps({"data": {"rows": ROWS}}))
    assert load_prompts(DataConfig(path=path, records_at="data.rows")) == PROMPTS
    path = write(tmp_path / "b.json", json.dumps(["Once", "Twice"]))
    assert load_prompts(DataConfig(path=path)) == [Prompt("Once"), Prompt("Twice")]


def test_datasets_folders_and_parquet(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "splits")
    dataset.to_parquet(tmp_path / "a.parquet")
    assert load_prompts(DataConfig(path=str(tmp_path / "plain"))) == PROMPTS
    assert load_prompts(DataConfig(path=str(tmp_path / "splits"), split="test")) == PROMPTS[1:]
    assert load_prompts(DataConfig(path=str(tmp_path / "a.parquet"))) == PROMPTS
    with pytest.raises(DataError, match=r"no split 'dev'.*expected train or test"):
        load_prompts(DataConfig(path=str(tmp_path / "splits"), split="dev"))


def test_hub_ids_go_through_load_dataset(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path, name, *, split):
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_prompts(DataConfig(path="openai/gsm8k", name="main", split="test")) == PROMPTS
    assert asked == [("openai/gsm8k", "main", "test")]


def test_offset_and_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(*({"prompt": str(number)} for number in range(10))))
    loaded = load_prompts(DataConfig(path=path, offset=3, limit=2))
    assert [prompt.prompt for prompt in loaded] == ["3", "4"]
    with pytest.raises(DataError, match="no row is left"):
        load_prompts(DataConfig(path=path, offset=10))


# --- columns ------------------------------------------------------------------------------------------------------


def test_columns_are_renamed_and_derived(tmp_path):
    row = {"q": "How many?", "Body": "Two cats.", "options": ["A)1", "B)2"], "n": 3, "empty": ""}
    path = write(tmp_path / "a.jsonl", lines(row))
    data = DataConfig(
        path=path,
        columns={"question": "q"},
        derive={
            "prompt": "{{ Body }} {{ q }}{% if empty %} {{ empty }}{% endif %}\n{{ options | join('\n') }}",
            "doubled": "[n, n * 2]",
        },
        keep=["question", "doubled"],
    )
    assert load_prompts(data) == [Prompt("Two cats. How many?\nA)1\nB)2", {"question": "How many?", "doubled": [3, 6]})]


def test_columns_that_some_rows_lack_are_none(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}))
    assert [prompt.columns for prompt in load_prompts(DataConfig(path=path))] == [
        {"x": 1, "y": None},
        {"x": None, "y": 2},
    ]


def test_column_names_of_the_reward_call_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"prompt": "a", "completions": ["x"], "answer": "x"}))
    with pytest.raises(DataError, match="'completions' has a name that reward functions are called with"):
        load_prompts(DataConfig(path=path))
    assert load_prompts(DataConfig(path=path, keep=["answer"])) == [Prompt("a", {"answer": "x"})]


@pytest.mark.parametrize(
    ("settings", "error", "reason"),
    [
        (
            {"columns": {"prompt": "promt"}},
            DataError,
            r"line 1: prompt: there is no column 'promt'.*Did you mean 'prompt'",
        ),
        (
            {"derive": {"prompt": "{{ nothing }}"}},
            DataError,
            "line 1: prompt: cannot be derived: 'nothing' is undefined",
        ),
        ({"derive": {"prompt": "nothing"}}, DataError, "line 1: prompt: cannot be derived"),
        ({"derive": {"prompt": "{{ a "}}, ConfigError, r"data.derive.prompt: not a Jinja template"),
        ({"derive": {"prompt": "x"}, "columns": {"prompt": "y"}}, ConfigError, "both `columns` and `derive`"),
        ({"keep": ["nothing"]}, ConfigError, "no column 'nothing' to keep"),
        ({"system": "Be brief."}, DataError, "line 1: prompt: a string has no room for a system message"),
    ],
)
def test_settings_that_do_not_fit_the_data(tmp_path, settings, error, reason):
    path = write(tmp_path / "a.jsonl", lines({"prompt": "Hi", "answer": 1}))
    with pytest.raises(error, match=reason):
        load_prompts(DataConfig(path=path, **settings))


def test_templates_cannot_reach_into_python(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"prompt": "Hi"}))
    with pytest.raises(DataError, match="cannot be derived"):
        load_prompts(DataConfig(path=path, derive={"prompt": "{{ ''.__class__.__mro__[1].__subclasses__() }}"}))


def test_strings_become_chat(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"prompt": "Hi", "completion": "Hello"}))
    settings = DataConfig(path=path, chat=True, system="Be brief.")
    assert load_demonstrations(settings) == [
        Demonstration(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            [{"role": "assistant", "content": "Hello"}],
        )
    ]


def test_messages(tmp_path):
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    path = write(tmp_path / "a.jsonl", lines({"messages": turns}))
    assert load_demonstrations(DataConfig(path=path)) == [Demonstration(turns[:3], [turns[3]])]
    assert load_demonstrations(DataConfig(path=path, assistant_turns="all")) == [
        Demonstration(turns[:1], [turns[1]]),
        Demonstration(turns[:3], [turns[3]]),
    ]
    path = write(tmp_path / "b.jsonl", lines({"messages": turns[:3]}))
    with pytest.raises(DataError, match="line 1: messages: the last turn is not the assistant's; got 'user'"):
        load_demonstrations(DataConfig(path=path))


# --- rankings -----------------------------------------------------------------------------------------------------


def test_rankings_by_ranks_scores_or_order(tmp_path):
    base = {"prompt": "p", "completions": ["a", "b", "c"]}
    assert rankings(tmp_path, {**base, "ranks": [2, 0, 0]}) == [Ranking("p", ("a", "b", "c"), (1, 0, 0))]
    # Ranks that count from 1, or skip one after a tie, say the same order.
    assert rankings(tmp_path, {**base, "ranks": [3, 1, 1.0]})[0].ranks == (1, 0, 0)
    scored = rankings(tmp_path, {**base, "scores": [0.5, 2, 1]})
    assert scored == [Ranking("p", ("a", "b", "c"), (2, 0, 1), (0.5, 2.0, 1.0))]
    assert rankings(tmp_path, {**base, "scores": [0.5, 2, 1]}, min_score_gap=0.75)[0].ranks == (1, 0, 1)
    assert rankings(tmp_path, base, order="best_first")[0].ranks == (0, 1, 2)
    renamed = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 0]}
    assert rankings(tmp_path, renamed, columns={"completions": "responses"})[0].completions == ("a", "b")


def test_completions_after_a_chat_prompt_are_messages(tmp_path):
    prompt = [{"role": "user", "content": "Hi"}]
    ranking = rankings(tmp_path, {"prompt": prompt, "completions": ["a", "b"], "ranks": [0, 1]})[0]
    assert ranking.completions == ([{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}])


def test_pairs(tmp_path):
    assert rankings(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}) == [Ranking("p", ("a", "b"), (0, 1))]
    user, good, bad = (
        {"role": role, "content": text} for role, text in [("user", "Hi"), ("assistant", "Hello"), ("assistant", "No")]
    )
    expected = [Ranking([user], ([good], [bad]), (0, 1))]
    # TRL's implicit prompt, UltraFeedback's repeated prompt, and the explicit one.
    assert rankings(tmp_path, {"chosen": [user, good], "rejected": [user, bad]}) == expected
    assert rankings(tmp_path, {"prompt": "Hi", "chosen": [user, good], "rejected": [user, bad]}) == expected
    assert rankings(tmp_path, {"prompt": [user], "chosen": [good], "rejected": [bad]}) == expected
    assert rankings(tmp_path, {"prompt": [user], "chosen": "Hello", "rejected": "No"}) == expected


def test_dialogues_as_text_are_split_where_the_last_shared_answer_begins(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
    row = {"chosen": start + " Because.", "rejected": start + " But why?"}
    assert rankings(tmp_path, row) == [Ranking(start, (" Because.", " But why?"), (0, 1))]
    row = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
    assert rankings(tmp_path, row) == [Ranking("The sky is", (" blue.", " black."), (0, 1))]
    with pytest.raises(DataError, match="line 1: prompt: is missing, and chosen and rejected do not begin alike"):
        rankings(tmp_path, {"chosen": "Yes.", "rejected": "No."})


def test_ties_are_refused_kept_or_dropped(tmp_path):
    tie, order = {"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=r"line 2: ranks: every completion is tied.*`tied: keep`"):
        rankings(tmp_path, order, tie)
    assert [ranking.tied for ranking in rankings(tmp_path, order, tie, tied="keep")] == [False, True]
    with pytest.warns(UserWarning, match="1 rankings are one tie and were dropped"):
        assert len(rankings(tmp_path, order, tie, tied="drop")) == 1


BASE = {"prompt": "p", "completions": ["a", "b"]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("", "the line is empty"),
        ("{not json", "is not JSON: .* at column 2"),
        ("[1]", "is no JSON object"),
        ({"completions": ["a", "b"], "ranks": [0, 1]}, r"prompt: is missing.*columns: \{prompt: "),
        ({**BASE, "prompt": None, "ranks": [0, 1]}, "prompt: is null"),
        ({**BASE, "prompt": 7, "ranks": [0, 1]}, "prompt: is no text; got 7"),
        ({**BASE, "prompt": "", "ranks": [0, 1]}, "prompt: is empty"),
        ({"prompt": "p", "ranks": [0, 1]}, "completions: is missing"),
        ({**BASE, "completions": "ab", "ranks": [0, 1]}, "completions: is no list"),
        ({**BASE, "completions": ["a"], "ranks": [0]}, "completions: a ranking needs at least two"),
        ({**BASE, "completions": ["a", 3], "ranks": [0, 1]}, r"completions\[1\]: is no text"),
        ({**BASE, "ranks": [0]}, "ranks: wrong length; got 1; expected 2"),
        ({**BASE, "ranks": "01"}, "ranks: is no list"),
        ({**BASE, "ranks": [0, "1"]}, r"ranks\[1\]: is no number"),
        ({**BASE, "ranks": [0, True]}, r"ranks\[1\]: is no number"),
        ({**BASE, "ranks": [0, 0.5]}, r"ranks\[1\]: is no whole number.*columns: \{scores: ranks\}"),
        ({**BASE, "scores": [1.0, float("nan")]}, r"scores\[1\]: is not finite"),
        ({**BASE, "scores": [1.0, float("inf")]}, r"scores\[1\]: is not finite"),
        ({**BASE, "scores": [1.0]}, "scores: wrong length"),
        ({**BASE, "scores": [1.0, None]}, r"scores\[1\]: is no number"),
        (BASE, r"ranks: nothing orders the completions.*order: best_first"),
        ({**BASE, "ranks": [0, 1], "scores": [0.1, 0.9]}, "completion 1 has a worse rank but a higher score"),
        ({**BASE, "ranks": [0, 0]}, "every completion is tied"),
        ({"prompt": "p", "chosen": "a"}, "rejected: is missing"),
        ({"prompt": "p", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]}, "of different kinds"),
    ],
)
def test_every_bad_line_is_named(tmp_path, row, reason):
    good = {**BASE, "ranks": [1, 0]}
    with pytest.raises(DataError, match=rf"r\.jsonl, line 2: .*{reason}"):
        rankings(tmp_path, good, row, good)


def test_many_bad_lines_are_counted(tmp_path):
    rows = [{"prompt": ""}] * 7 + [{"prompt": "good"}]
    path = write(tmp_path / "a.jsonl", lines(*rows))
    with pytest.raises(DataError) as caught:
        load_prompts(DataConfig(path=path))
    message = str(caught.value)
    assert "7 of 8 rows are bad" in message
    assert "line 5: prompt: is empty" in message
    assert "line 6" not in message
    assert "and 2 more" in message
    with pytest.warns(UserWarning, match="7 of 8 rows are bad"):
        assert load_prompts(DataConfig(path=path, bad_rows="drop")) == [Prompt("good")]


def test_a_source_of_bad_rows_only_is_refused_even_when_dropping(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"prompt": ""}))
    with pytest.raises(DataError, match="line 1: prompt: is empty"):
        load_prompts(DataConfig(path=path, bad_rows="drop"))


@pytest.mark.parametrize(
    ("name", "content", "settings", "reason"),
    [
        ("a.jsonl", "", {}, "the file is empty"),
        ("a.jsonl", "\n\n", {}, "the file is empty"),
        ("a.json", "", {}, "the file is empty"),
        ("a.json", "[]", {}, "the JSON array is empty"),
        ("a.json", '[{"prompt": "a"}, {"prompt": }]', {}, "line 1, item 2: is not JSON"),
        ("a.json", '[\n{"prompt": "a"},\n{"prompt": "b"}', {}, "comma|not JSON"),
        ("a.json", '[{"prompt": "a"} {"prompt": "b"}]', {}, "a comma too many or too few"),
        ("a.json", '[{"prompt": "a"},]', {}, "a comma too many or too few"),
        ("a.json", '[{"prompt": "a"}] x', {}, "something follows"),
        ("a.json", '{"rows": 3}', {"records_at": "rows"}, "rows: is no list of rows"),
        ("a.json", '{"rows": 3}', {"records_at": "data"}, "nothing stands at 'data'"),
        ("a.csv", "", {}, "the file is empty"),
        ("a.csv", "prompt,completion\n", {}, "there is no row; expected one or more"),
        ("a.csv", "prompt,prompt\na,b\n", {}, "line 1: two columns have the same name"),
        ("a.csv", "prompt,x\na,b\na\n", {}, "line 3: wrong number of cells; got 1; expected 2"),
        ("a.csv", "prompt,x\n\na,b\n", {}, "line 2: the line is empty"),
        ("a.csv", 'prompt,x\n"a,b\n', {}, "line 2: is not CSV"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', {}, "line 2: is not UTF-8"),
        ("a.csv", b"prompt\na\n\xff\n", {}, "line 3: is not UTF-8"),
        ("a.txt", "a\n\nb\n", {"format": "text"}, "line 2: the line is empty"),
        ("a.txt", " \n", {"format": "text"}, "the file is empty"),
        ("a.jsonl", "[" * 100_000, {}, "line 1: is nested too deeply|line 1: is not JSON"),
    ],
)
def test_broken_files(tmp_path, name, content, settings, reason):
    with pytest.raises(DataError, match=reason):
        load_prompts(DataConfig(path=write(tmp_path / name, content), **settings))


def test_missing_and_broken_sources(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.jsonl: no such file or folder"):
        load_prompts(DataConfig(path=str(tmp_path / "nothing.jsonl")))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines(*ROWS).encode())[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        load_prompts(DataConfig(path=str(tmp_path / "cut.jsonl.gz")))
    (tmp_path / "no.jsonl.gz").write_text("plain")
    with pytest.raises(DataError, match="cannot be read"):
        load_prompts(DataConfig(path=str(tmp_path / "no.jsonl.gz")))
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="`datasets` cannot load it"):
        load_prompts(DataConfig(path=str(tmp_path / "folder")))


def test_settings_come_from_yaml(tmp_path):
    (tmp_path / "data.yaml").write_text("path: a.jsonl\ncolumns:\n  completions: responses\norder: best_first\n")
    data = load_config(DataConfig, tmp_path / "data.yaml")
    assert (data.columns, data.order) == ({"completions": "responses"}, "best_first")
    with pytest.raises(ConfigError, match="did you mean 'columns'"):
        load_config(DataConfig, tmp_path / "data.yaml", ["colums.prompt=x"])


# --- holding out --------------------------------------------------------------------------------------------------


def test_split_holdout():
    records = [Prompt(str(number)) for number in range(100)]
    train, held_out = split_holdout(records, fraction=0.2, seed=1)
    assert (len(train), len(held_out)) == (80, 20)
    assert sorted([*train, *held_out], key=lambda record: int(record.prompt)) == records
    assert split_holdout(records, fraction=0.2, seed=1) == (train, held_out)
    assert split_holdout(records, fraction=0.2, seed=2)[1] != held_out
    assert len(split_holdout(records, count=7)[1]) == 7


def test_split_holdout_keeps_a_prompt_on_one_side():
    records = [Demonstration(str(number // 4), f"answer {number}") for number in range(40)]
    train, held_out = split_holdout(records, count=10)
    assert not {record.prompt for record in train} & {record.prompt for record in held_out}
    assert len(held_out) == 8  # ten prompts of four records: two fit into ten


@pytest.mark.parametrize(
    "settings", [{}, {"fraction": 0.5, "count": 1}, {"fraction": 0.0}, {"count": 4}, {"count": -1}]
)
def test_split_holdout_refuses(settings):
    with pytest.raises(ConfigError, match="held_out"):
        split_holdout([Prompt(str(number)) for number in range(4)], **settings)
