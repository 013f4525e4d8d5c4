"""The evaluation configs of published sets: every row is read, every gold answer accepted, a wrong one refused."""

import importlib.util
from fractions import Fraction
from itertools import permutations
from pathlib import Path

import pytest

from rlhf.commands.recipes import find_config, find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.data.loading import load_prompts
from rlhf.lm.sources import make_reward
from rlhf.rewards.protocol import score_completions
from rlhf.rewards.verifiable import gold_number

ROOT = Path(__file__).resolve().parents[2]
DATA = (ROOT / ".." / "shared" / "data").resolve()
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the shared data sets are not here")
ROWS = {  # the sets' own READMEs
    "gsm8k": 1319,
    "svamp": 1000,
    "mawps": 2065,
    "multiarith": 600,
    "addsub": 395,
    "singleeq": 508,
    "aqua": 254,
    "aqua_dev": 254,
    "aqua_cot": 2728,
    "last_letters": 500,
    "countdown": 256,
    "game24": 1362,
    "math500": 500,
}
NUMBERS = ("gsm8k", "svamp", "mawps", "multiarith", "addsub", "singleeq")
CHOICES = ("aqua", "aqua_dev", "aqua_cot")


@pytest.fixture
def load(monkeypatch):
    """Prompts of a config and a function that scores completions by one of its rewards."""
    monkeypatch.chdir(ROOT)
    recipe = find_recipe("evaluate")

    def load(name):
        config = load_config(import_recipe(recipe).CONFIG, find_config(recipe, name))
        prompts = load_prompts(config.data)

        def score(reward, completions):
            columns = {key: [prompt.columns[key] for prompt in prompts] for key in prompts[0].columns}
            return score_completions(
                make_reward(config.rewards[reward]),
                prompts=[prompt.prompt for prompt in prompts],
                completions=[[{"role": "assistant", "content": text}] for text in completions],
                columns=columns,
            ).tolist()

        return prompts, score

    return load


def test_every_set_has_a_config():
    shipped = set(find_recipe("evaluate").configs) - {"stories", "stories_animal"}
    assert shipped == set(ROWS)
    sources = "".join((ROOT / "recipes/configs/evaluate" / f"{name}.yaml").read_text() for name in ROWS)
    files = {path.name for path in (DATA / "math").iterdir()} - {"README.md"}
    assert [name for name in sorted(files) if name not in sources] == []


@pytest.mark.parametrize("name", ROWS)
def test_every_row_becomes_a_prompt(load, name):
    prompts, _ = load(name)
    assert len(prompts) == ROWS[name]
    assert all([message["role"] for message in prompt.prompt] == ["system", "user"] for prompt in prompts)


@pytest.mark.parametrize("name", NUMBERS)
def test_gold_numbers_are_right_and_others_wrong(load, name):
    prompts, score = load(name)
    golds = [gold_number(prompt.columns["answer"]) for prompt in prompts]
    assert None not in golds
    told = [float(gold) for gold in golds]
    assert score("strict", [f"so\n#### {gold}" for gold in told]) == [1.0] * len(golds)
    assert score("lenient", [f"It is {gold}." for gold in told]) == [1.0] * len(golds)
    assert score("strict", [f"It is {gold}." for gold in told]) == [0.0] * len(golds)
    for wrong in (1, -1, 10):
        assert score("strict", [f"#### {gold + wrong}" for gold in told]) == [0.0] * len(golds)
        assert score("lenient", [f"It is {gold + wrong}." for gold in told]) == [0.0] * len(golds)


def test_worked_solutions_of_gsm8k_are_right(load):
    prompts, score = load("gsm8k")
    solutions = [prompt.columns["answer"] for prompt in prompts]
    assert score("strict", solutions) == score("lenient", solutions) == [1.0] * 1319


@pytest.mark.parametrize(("file", "rows"), [("test", 1319), ("train", 7473)])
def test_every_row_of_gsm8k_is_judged_by_its_own_number(file, rows, load, monkeypatch):
    """Both files, the one that is trained on too: the worked solution is right, and wrong with its number changed."""
    config = load_config(import_recipe(find_recipe("evaluate")).CONFIG, find_config(find_recipe("evaluate"), "gsm8k"))
    prompts = load_prompts(config.data.model_copy(update={"path": str(DATA / "gsm8k" / f"{file}.jsonl")}))
    assert len(prompts) == rows
    answers = [prompt.columns["answer"] for prompt in prompts]
    # Independently of our parser: what follows the marks, without the thousands' commas.
    golds = [int(answer.rsplit("#### ", 1)[1].replace(",", "")) for answer in answers]
    assert [gold_number(answer) for answer in answers] == golds
    for reward in ("strict", "lenient"):
        judge = make_reward(config.rewards[reward])
        assert judge(completions=answers, answer=answers) == [1.0] * rows
        for wrong in (1, -1, 1000):
            changed = [
                f"{answer.rsplit('#### ', 1)[0]}#### {gold + wrong}"
                for answer, gold in zip(answers, golds, strict=True)
            ]
            assert judge(completions=changed, answer=answers) == [0.0] * rows


@pytest.mark.parametrize("name", CHOICES)
def test_right_letters_are_right_and_others_wrong(load, name):
    prompts, score = load(name)
    golds = [prompt.columns["answer"] for prompt in prompts]
    assert set(golds) == set("ABCDE")
    assert score("right_letter", [f"The answer is ({gold})." for gold in golds]) == [1.0] * len(golds)
    others = ["ABCDE"[("ABCDE".index(gold) + 1) % 5] for gold in golds]
    assert score("right_letter", [f"The answer is ({letter})." for letter in others]) == [0.0] * len(golds)
    if name == "aqua_cot":
        assert score("right_letter", [prompt.columns["output"] for prompt in prompts]) == [1.0] * len(golds)


def test_last_letters(load):
    prompts, score = load("last_letters")
    golds = [prompt.columns["answer"] for prompt in prompts]
    # Independently: the last letter of each word between the quotation marks. The set itself takes names of two words,
    # such as "Juan Carlos", for one in 15 rows.
    words = [prompt.prompt[-1]["content"].split('"')[1].split() for prompt in prompts]
    same = [gold == "".join(word[-1] for word in row) for gold, row in zip(golds, words, strict=True)]
    assert same.count(False) == 15
    assert all(len(row) == 5 for row, agrees in zip(words, same, strict=True) if not agrees)
    assert score("exact", golds) == [1.0] * 500
    assert score("contained", [f"The letters are {gold}." for gold in golds]) == [1.0] * 500
    assert score("exact", [gold[::-1] + "x" for gold in golds]) == [0.0] * 500
    assert score("contained", [f"{gold}x" for gold in golds]) == [0.0] * 500


def solutions(numbers, target):
    """An expression of exactly these numbers for the target, found by joining two at a time."""
    stack = [[(Fraction(number), str(number)) for number in numbers]]
    while stack:
        terms = stack.pop()
        if len(terms) == 1:
            if terms[0][0] == target:
                return terms[0][1]
            continue
        for i, j in permutations(range(len(terms)), 2):
            (a, left), (b, right) = terms[i], terms[j]
            rest = [term for k, term in enumerate(terms) if k not in (i, j)]
            joined = [(a - b, "-")] + ([(a / b, "/")] if b else []) + ([(a + b, "+"), (a * b, "*")] if i < j else [])
            stack += [[*rest, (value, f"({left} {sign} {right})")] for value, sign in joined]
    return None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["countdown", "game24"])
def test_found_expressions_are_right_and_changed_ones_wrong(load, name):
    """Every row is solved by search."""
    prompts, score = load(name)
    golds = []
    for prompt in prompts:
        numbers = [int(part) for part in str(prompt.columns["numbers"]).replace(",", " ").split()]
        golds.append(solutions(numbers, int(prompt.columns["target"])))
    assert None not in golds
    assert score("solved", [f"<answer>{gold}</answer>" for gold in golds]) == [1.0] * len(golds)
    assert score("solved", [f"<answer>{gold} + 1 - 1</answer>" for gold in golds]) == [0.0] * len(golds)
    assert score("solved", [f"<answer>{prompt.columns['target']}</answer>" for prompt in prompts]) == [0.0] * len(golds)


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs the extra `reasoning`")
@pytest.mark.slow
def test_math500_solutions_are_right(load):
    """Boxed golds against a wrong number are in test_boxed_math, row by row."""
    prompts, score = load("math500")
    assert score("boxed", [prompt.columns["solution"] for prompt in prompts]) == [1.0] * 500
