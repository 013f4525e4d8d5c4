"""Right answers are accepted, wrong ones refused, on cases written by hand and on every row of published sets."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.errors import RewardError
from rlhf.rewards.arithmetic import evaluate_arithmetic, find_expression
from rlhf.rewards.extraction import boxed_content, chosen_letter, gsm8k_answer, last_number, parse_number
from rlhf.rewards.verifiable import (
    contains_word,
    countdown,
    exact_match,
    gold_number,
    gsm8k_lenient,
    gsm8k_strict,
    multiple_choice,
    number_equal,
    regex_format,
)

DATA = (Path(__file__).resolve().parents[2] / ".." / "shared" / "data").resolve()
shared = pytest.mark.skipif(not DATA.exists(), reason="the shared data sets are not here")


def read(path):
    text = (DATA / path).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()] if path.endswith(".jsonl") else json.loads(text)


def one(reward, completion, **settings):
    columns = {
        name: [value] if name in ("answer", "word", "numbers", "target") else value for name, value in settings.items()
    }
    return reward([completion], **columns)[0]


# --- words --------------------------------------------------------------------------------------------------------


def test_exact_match():
    assert exact_match([" abc\n", "ab c", "ABC"], answer=["abc"] * 3) == [1, 0, 0]
    assert one(exact_match, "ABC", answer="abc", ignore_case=True) == 1
    assert one(exact_match, [{"role": "assistant", "content": "7"}], answer=7) == 1


def test_contains_word():
    assert contains_word(["The Cat.", "concat", "cat-like"], word=["cat"] * 3) == [1, 0, 1]
    assert one(contains_word, "a cat and a dog", word=["dog", "cat"]) == 1
    assert one(contains_word, "a cat", word=["dog", "cat"]) == 0
    assert one(contains_word, "The Cat", word="cat", ignore_case=False) == 0
    assert one(contains_word, "c++ code", word="c++") == 1
    assert one(contains_word, "x", word="") is None
    assert one(contains_word, "x", word=None) is None


def test_regex_format():
    pattern = r"<think>.*</think>\s*<answer>.*</answer>\s*"
    assert one(regex_format, "<think>a\nb</think>\n<answer>4</answer>", pattern=pattern) == 1
    assert one(regex_format, "So: <think>a</think><answer>4</answer>", pattern=pattern) == 0
    with pytest.raises(RewardError, match=r"regex_format: not a regular expression: .*got '\('"):
        one(regex_format, "x", pattern="(")


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("the answer is **D**", "D"),
        (r"thus \boxed{A}", "A"),
        (r"thus \boxed{\text{(E)}}", "E"),
        ("B", "B"),
        ("(C) 12", "C"),
        ("First A) then\nB) 30 miles", "B"),
        ("The answer is A. No, the answer is B.", "B"),
        ("The final answer: (C).", "C"),
        ("The answer is definitely 4", None),
        ("A car drives 30 miles", None),
        (r"The answer is B, \boxed{12}", None),
        ("", None),
        ("F", None),
    ],
)
def test_chosen_letter(text, letter):
    assert chosen_letter(text) == letter


def test_multiple_choice():
    assert multiple_choice(["B", "B", "B", "B"], answer=["B", "(B)", 1, 0]) == [1, 1, 1, 0]
    assert multiple_choice(["B", "B", "B"], answer=["none", 7, None]) == [None, None, None]
    assert one(multiple_choice, "G", answer="G", letters="ABCDEFG") == 1


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("-3", -3),
        ("\u22123", -3),
        ("1,234,567", 1234567),
        ("$1,234.50", Fraction("1234.5")),
        (r"\$18", 18),
        ("50%", 50),
        ("3.", 3),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("1e3", 1000),
        ("18.0", 18),
        ("0.1", Fraction(1, 10)),
        ("12,34", None),
        ("3/0", None),
        ("abc", None),
        ("", None),
        ("1_000", None),
        ("inf", None),
        ("nan", None),
        ("9" * 100_000, None),
    ],
)
def test_parse_number(text, number):
    assert parse_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The total is $1,234.50.", Fraction("1234.5")),
        ("He pays 30% of 50, so 15.", 15),
        ("It fell to -4 degrees", -4),
        ("-$5", -5),
        ("$-5", -5),
        ("20-2", 2),
        ("(3)-2", 2),
        ("= 16 - 3", 3),
        ("from 5 to .75", Fraction(3, 4)),
        (r"\boxed{18}", 18),
        ("3 apples, 4 pears, none left", 4),
        ("no number", None),
        ("x2", 2),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 9\n#### 18", 18),
        ("#### -1,018", -1018),
        ("####18.50", Fraction("18.5")),
        ("#### $18", 18),
        ("#### 18 dollars", 18),
        ("#### 3\nno, #### 4", 4),
        ("#### eighteen", None),
        ("18", None),
    ],
)
def test_gsm8k_answer(text, number):
    assert gsm8k_answer(text) == number


def test_strict_and_lenient():
    texts = ["... #### 18", "It is 18.", "It is 17.", "#### 18\nLet me check 3 times.", "nothing"]
    assert gsm8k_strict(texts, answer=["18"] * 5) == [1, 0, 0, 1, 0]
    assert gsm8k_lenient(texts, answer=["18"] * 5) == [1, 1, 0, 1, 0]


@pytest.mark.parametrize(("gold", "number"), [("a #### 1,018", 1018), (18, 18), (0.1, Fraction(1, 10)), ("6", 6)])
def test_gold_answers_of_every_spelling(gold, number):
    assert gold_number(gold) == number


def test_gold_answers_that_are_none_give_none():
    assert gsm8k_strict(["#### 1"] * 4, answer=[None, "many", "#### many", True]) == [None] * 4


def test_number_equal():
    assert number_equal(["3.14", "3.2", "none"], answer=[3.14159] * 3, tolerance=0.01) == [1, 0, 0]
    assert one(number_equal, "0.1", answer=0.1) == 1


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{}.0", "{}.00"]))
def test_a_number_is_found_however_it_is_spelled(number, spelling):
    assert last_number(f"The answer is {spelling.format(number)}.") == number
    assert gsm8k_answer(f"#### {spelling.format(number)}") == number


@shared
@pytest.mark.parametrize(("path", "rows"), [("gsm8k/test.jsonl", 1319), ("gsm8k/train.jsonl", 7473)])
def test_gsm8k_accepts_every_gold_solution_and_refuses_wrong_numbers(path, rows):
    answers = [row["answer"] for row in read(path)]
    # Independent of the code under test: the official files end in "#### " and the number, with commas.
    golds = [int(answer.rsplit("#### ", 1)[1].replace(",", "")) for answer in answers]
    assert len(answers) == rows
    assert gsm8k_strict(answers, answer=answers) == [1.0] * rows
    assert gsm8k_lenient([f"So it is ${gold:,}." for gold in golds], answer=answers) == [1.0] * rows
    for wrong in (lambda gold: gold + 1, lambda gold: -gold - 1, lambda gold: gold * 10 + 1):
        assert gsm8k_strict([f"#### {wrong(gold)}" for gold in golds], answer=answers) == [0.0] * rows
        assert gsm8k_lenient([f"It is {wrong(gold)}." for gold in golds], answer=golds) == [0.0] * rows


@shared
@pytest.mark.parametrize(
    ("path", "answer", "rows"),
    [
        ("math/svamp.json", lambda row: row["Answer"], 1000),
        ("math/mawps.jsonl", lambda row: row["target"], 2065),
        ("math/multiarith.json", lambda row: row["lSolutions"][0], 600),
        ("math/addsub.json", lambda row: row["lSolutions"][0], 395),
        ("math/singleeq.json", lambda row: row["lSolutions"][0], 508),
    ],
)
def test_word_problems(path, answer, rows):
    golds = [answer(row) for row in read(path)]
    assert number_equal([f"The answer is {gold}." for gold in golds], answer=golds) == [1.0] * rows
    assert number_equal([f"The answer is {float(gold) + 1}." for gold in golds], answer=golds) == [0.0] * rows


@shared
@pytest.mark.parametrize("path", ["math/aqua_test.jsonl", "math/aqua_dev.jsonl"])
def test_aqua(path):
    golds = [row["correct"] for row in read(path)]
    wrong = [chr((ord(gold) - ord("A") + 1) % 5 + ord("A")) for gold in golds]
    assert multiple_choice([f"The answer is ({gold})." for gold in golds], answer=golds) == [1.0] * 254
    assert multiple_choice([f"The answer is ({letter})." for letter in wrong], answer=golds) == [0.0] * 254


@shared
def test_every_worked_aqua_solution_names_its_letter():
    for row in read("math/aqua_cot_train.json"):
        # The set's own form: every solution ends in "The final answer: (C)."
        assert chosen_letter(row["output"]) == row["output"].rsplit("(", 1)[1][0]


# --- boxes and expressions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{7}", "7"),
        (r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{open", None),
        ("7", None),
    ],
)
def test_boxed_content(text, content):
    assert boxed_content(text) == content


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("1/3*3", 1),
        ("-2+5", 3),
        ("8/(3-8/3)", 24),
        ("1/0", None),
        ("2**3", None),
        ("7//2", None),
        ("7%4", None),
        ("1.5+1", None),
        ("1e3", None),
        ("0x10", None),
        ("1_0", None),
        ("010+1", None),
        ("abs(1)", None),
        ("__import__('os')", None),
        ("1 2", None),
        ("1,2", None),
        ("", None),
        ("(" * 99 + "1" + ")" * 99, 1),
        ("(" * 150 + "1" + ")" * 150, None),
    ],
)
def test_evaluate_arithmetic(expression, value):
    result = evaluate_arithmetic(expression)
    assert (result[0] if result else None) == value


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        ("<answer> (1 + 2) × 3 </answer>", "(1 + 2) * 3"),
        ("<answer>1</answer> no <answer>2 = 2</answer>", "2"),
        (r"\boxed{6 \div 2 \times 3}", "6 / 2 * 3"),
        ("I try.\nAnswer: 3*8 = 24", "3*8"),
        ("$3 \u2212 1$", "3 - 1"),
        ("", None),
    ],
)
def test_find_expression(text, expression):
    assert find_expression(text) == expression


def test_countdown():
    def score(expression, **settings):
        return one(countdown, f"<answer>{expression}</answer>", numbers=[30, 100, 93], target=37, **settings)

    assert score("100 - 93 + 30") == 1
    assert score("100 - 93 + 30 = 37") == 1
    assert score("100 - 93 + 29") == 0
    assert score("37") == 0
    assert score("100 - 63") == 0
    assert score("100 - 93 + 30 + 30 - 30") == 0
    assert score("nonsense") == 0
    assert one(countdown, "100-93", numbers="30,100,93", target="7") == 0
    assert one(countdown, "100-93", numbers="30,100,93", target="7", use="some") == 1
    assert one(countdown, "3*8", numbers="3 8", target=24) == 1
    assert one(countdown, "3*3", numbers=[3, 8], target=9, use="some") == 0
    assert one(countdown, "1", numbers="", target=1) is None
    assert one(countdown, "1", numbers=[1], target=None) is None


def solve(numbers, target):
    """Every way to join the numbers two by two: an expression for the target, written out, or None."""
    if len(numbers) == 1:
        return numbers[0][1] if numbers[0][0] == target else None
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = [numbers[k] for k in range(len(numbers)) if k not in (i, j)]
        (a, left), (b, right) = numbers[i], numbers[j]
        joined = [(a + b, "+"), (a - b, "-"), (a * b, "*"), *([(a / b, "/")] if b else [])]
        for value, sign in joined:
            found = solve([*rest, (value, f"({left} {sign} {right})")], target)
            if found:
                return found
    return None


@shared
def test_countdown_set():
    rows = read("math/countdown_cd3_test.jsonl")
    numbers, targets = [row["input"] for row in rows], [row["output"] for row in rows]
    solved = [
        solve([(Fraction(number), number) for number in row["input"].split(",")], int(row["output"])) for row in rows
    ]
    assert countdown(solved, numbers=numbers, target=targets) == [1.0] * 256
    assert countdown(solved, numbers=numbers, target=[int(target) + 1 for target in targets]) == [0.0] * 256
    # The same expression with one number replaced by the sum that it equals uses numbers that were not given.
    cheats = [f"{target} + 0" for target in targets]
    assert countdown(cheats, numbers=numbers, target=targets) == [0.0] * 256
