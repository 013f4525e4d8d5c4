"""Rewards that can be checked: 1 where the completion is right, 0 where not, None where the gold answer is unusable.

Each takes TRL's arguments; what it compares with comes from a column of the data (`columns: {answer: ...}` in the data
settings gives a file's column that name). Settings are keyword arguments, bound by `load_reward(..., arguments=...)`.
`BoxedMath`, which needs math-verify, is in `boxed_math.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from rlhf.errors import RewardError
from rlhf.rewards.arithmetic import evaluate_arithmetic, find_expression, is_allowed_use
from rlhf.rewards.extraction import chosen_letter, gsm8k_answer, last_number, lenient_number, parse_number
from rlhf.rewards.protocol import Text, text_of

Answers = Sequence[Any]


# --- words --------------------------------------------------------------------------------------------------------


def exact_match(
    completions: Sequence[Text], answer: Answers, *, ignore_case: bool = False, **columns: Any
) -> list[float]:
    r"""1 where the completion is the answer, surrounding space aside.

    Example:
        >>> exact_match([" abc\n", "abcd"], answer=["abc", "abc"])
        [1.0, 0.0]
    """

    def same(completion: Text, gold: Any) -> bool:
        written, expected = text_of(completion).strip(), str(gold).strip()
        return written.casefold() == expected.casefold() if ignore_case else written == expected

    return [float(same(completion, gold)) for completion, gold in zip(completions, answer, strict=True)]


def contains_word(
    completions: Sequence[Text], word: Sequence[str | Sequence[str]], *, ignore_case: bool = True, **columns: Any
) -> list[float | None]:
    """1 where the completion has the word, or each word of a list, as a whole word. None where no word is given.

    Example:
        >>> contains_word(["The cat sat.", "Concatenate!"], word=["cat", "cat"])
        [1.0, 0.0]
    """
    flags = re.IGNORECASE if ignore_case else 0

    def has(text: str, one: str) -> bool:
        return re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text, flags) is not None

    scores: list[float | None] = []
    for completion, wanted in zip(completions, word, strict=True):
        words = [wanted] if isinstance(wanted, str) else list(wanted or [])
        text = text_of(completion)
        scores.append(float(all(has(text, one) for one in words)) if all(words) and words else None)
    return scores


def regex_format(completions: Sequence[Text], *, pattern: str, **columns: Any) -> list[float]:
    r"""1 where the whole completion matches a regular expression (a point also matches line ends); meant as a gate.

    Example:
        >>> regex_format(["<think>hm</think> 4", "4"], pattern=r"<think>.*</think>\s*\S+")
        [1.0, 0.0]
    """
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RewardError(f"not a regular expression: {error}", where="regex_format", got=pattern) from error
    return [float(compiled.fullmatch(text_of(completion)) is not None) for completion in completions]


def multiple_choice(
    completions: Sequence[Text], answer: Answers, *, letters: str = "ABCDE", **columns: Any
) -> list[float | None]:
    """1 where the completion clearly names the right letter (see `extraction.chosen_letter`).

    The gold answer is a letter, in parentheses or not, or the position of the choice, counted from 0.

    Example:
        >>> multiple_choice(["The answer is (B).", "A or B"], answer=["B", 1])
        [1.0, 0.0]
    """

    def gold_letter(gold: Any) -> str | None:
        if isinstance(gold, int) and not isinstance(gold, bool):
            return letters[gold] if 0 <= gold < len(letters) else None
        stripped = str(gold).strip(" ().")
        return stripped if len(stripped) == 1 and stripped in letters else None

    golds = [gold_letter(gold) for gold in answer]
    return [
        None if gold is None else float(chosen_letter(text_of(completion), letters=letters) == gold)
        for completion, gold in zip(completions, golds, strict=True)
    ]


# --- numbers ------------------------------------------------------------------------------------------------------


def gsm8k_strict(completions: Sequence[Text], answer: Answers, **columns: Any) -> list[float | None]:
    r"""1 where the number after the completion's last `####` is the gold number.

    The gold answer is a number or a worked solution that ends in `#### <number>`, as GSM8K has it.

    Example:
        >>> gsm8k_strict(["2 x 9 = 18\n#### 18", "It is 18."], answer=["... #### 18", "18"])
        [1.0, 0.0]
    """
    return _compare_numbers([gsm8k_answer(text_of(completion)) for completion in completions], answer)


def gsm8k_lenient(completions: Sequence[Text], answer: Answers, **columns: Any) -> list[float | None]:
    """As `gsm8k_strict`, but without a `####` line the completion's last number counts.

    The difference between the two is how much a model knows but does not say in the required form; report both.

    Example:
        >>> gsm8k_lenient(["It is $1,018.00.", "It is 17."], answer=["#### 1018", "#### 18"])
        [1.0, 0.0]
    """
    return _compare_numbers([lenient_number(text_of(completion)) for completion in completions], answer)


def number_equal(
    completions: Sequence[Text], answer: Answers, *, tolerance: float = 0.0, **columns: Any
) -> list[float | None]:
    """1 where the completion's last number differs from the gold number by at most `tolerance`.

    Example:
        >>> number_equal(["about 3.14", "3"], answer=[3.14159, 3.14159], tolerance=0.01)
        [1.0, 0.0]
    """
    return _compare_numbers([last_number(text_of(completion)) for completion in completions], answer, tolerance)


def _compare_numbers(found: Sequence[Fraction | None], answer: Answers, tolerance: float = 0.0) -> list[float | None]:
    scores: list[float | None] = []
    for number, gold in zip(found, map(gold_number, answer), strict=True):
        if gold is None:
            scores.append(None)
        else:
            scores.append(float(number is not None and abs(number - gold) <= Fraction(tolerance)))
    return scores


def gold_number(gold: Any) -> Fraction | None:
    r"""Read a gold answer: a number, its spelling, or a solution that ends in `#### <number>`; else None.

    Example:
        >>> gold_number("6 x 3 = 18\n#### 1,018"), gold_number(2.5), gold_number("many")
        (Fraction(1018, 1), Fraction(5, 2), None)
    """
    if isinstance(gold, str) and "####" in gold:
        return gsm8k_answer(gold)
    # A float goes through its shortest spelling: Fraction(0.1) is not 1/10.
    return None if gold is None or isinstance(gold, bool) else parse_number(str(gold))


def countdown(
    completions: Sequence[Text],
    numbers: Sequence[Sequence[int] | str],
    target: Answers,
    *,
    use: Literal["every", "some"] = "every",
    **columns: Any,
) -> list[float | None]:
    """1 where the completion proposes an expression of the given numbers that equals the target.

    Args:
        completions: The expression stands in <answer> tags, in a box, or on the last line.
        numbers: Per completion the given numbers: a list, or a text such as "30,100,93" or "1 1 4 6".
        target: Per completion the number to reach.
        use: `every` asks for each given number exactly once, `some` for each at most once.
        **columns: Unused.

    Returns:
        1, 0, or None where the given numbers or the target are none.

    Example:
        >>> countdown(["<answer>100 - 93 + 30</answer>", "100-93"], numbers=["30,100,93"] * 2, target=["37", 7])
        [1.0, 0.0]
    """
    scores: list[float | None] = []
    for completion, given, wanted in zip(completions, numbers, target, strict=True):
        allowed, goal = _whole_numbers(given), gold_number(wanted)
        if not allowed or goal is None:
            scores.append(None)
            continue
        expression = find_expression(text_of(completion))
        result = evaluate_arithmetic(expression) if expression is not None else None
        right = result is not None and result[0] == goal
        scores.append(float(right and is_allowed_use(result[1], allowed, every=use == "every")) if result else 0.0)
    return scores


def _whole_numbers(given: Sequence[int] | str) -> list[int]:
    parts = re.split(r"[\s,;]+", given.strip(" []()")) if isinstance(given, str) else given
    try:
        return [int(part) for part in parts]
    except (TypeError, ValueError):
        return []
