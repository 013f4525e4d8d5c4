"""Finding the answer in a completion: numbers, GSM8K's `####` line, choices, and what stands in a box."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

# The minus sign of typeset text, U+2212.
_MINUS = "\u2212"

# Longer digit strings are noise, and converting them takes quadratic time.
_MAX_NUMBER_LENGTH = 60

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
# A minus between two operands ("20-2", "20 - 2") subtracts; it is the number's only where it touches the number and no
# operand touches it.
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}%])[-+{_MINUS}])?(?:[$€£]\s?[-{_MINUS}]?)?(?:{_DIGITS})")
_GSM8K = re.compile(rf"####\s*([-+{_MINUS}]?\s?[$€£]?\s?[-{_MINUS}]?(?:{_DIGITS}))")


def parse_number(text: str) -> Fraction | None:
    """Read a text that is one number, exactly: currency, percent sign, thousands commas and a final point are ignored.

    Example:
        >>> parse_number("-$1,234.50"), parse_number("3/4"), parse_number("two")
        (Fraction(-2469, 2), Fraction(3, 4), None)
    """
    cleaned = re.sub(r"[$€£%\s]|\\", "", text.replace(_MINUS, "-"))
    cleaned = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", cleaned).removesuffix(".")
    if not cleaned or len(cleaned) > _MAX_NUMBER_LENGTH:
        return None
    if re.fullmatch(r"[-+]?[0-9]+/[0-9]*[1-9][0-9]*", cleaned):
        return Fraction(cleaned)
    if re.fullmatch(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]{1,2})?", cleaned):
        return Fraction(Decimal(cleaned))
    return None


def last_number(text: str) -> Fraction | None:
    """Return the last number written in a text, or None.

    Example:
        >>> last_number("It costs 3 x $4.50 = $13.50.")
        Fraction(27, 2)
        >>> last_number("20-2")
        Fraction(2, 1)
    """
    found = [match.group() for match in _NUMBER.finditer(text)]
    return parse_number(found[-1]) if found else None


def gsm8k_answer(text: str) -> Fraction | None:
    """Return the number after the last `####`, or None.

    Source: the extraction of openai/grade-school-math, `dataset.py`, with a currency sign allowed.
    """
    found = _GSM8K.findall(text)
    return parse_number(found[-1]) if found else None


def lenient_number(text: str) -> Fraction | None:
    """Return the number after the last `####`, and where there is none the last number of the text, or None.

    Example:
        >>> lenient_number("9 + 9 is #### 18, in 2 steps"), lenient_number("It is 18.")
        (Fraction(18, 1), Fraction(18, 1))
    """
    strict = gsm8k_answer(text)
    return strict if strict is not None else last_number(text)


def boxed_content(text: str) -> str | None:
    r"""Return what stands in the last \boxed{...}, with nested braces, or None.

    Example:
        >>> boxed_content(r"so \boxed{\frac{1}{2}}.")
        '\\frac{1}{2}'
    """
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len(r"\boxed"), len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
            if depth == 0:
                return text[start + len(r"\boxed{") : position]
    return None


def chosen_letter(text: str, *, letters: str = "ABCDE") -> str | None:
    """Return the letter of a multiple-choice answer, or None where none is clearly named.

    Looked for, in this order: the last box, the last "answer is (B)" or "Answer: B", a last line that begins with the
    letter ("B) 12", "(B)" or "B" alone).

    Example:
        >>> chosen_letter("Either A or C. The answer is (C).")
        'C'
        >>> chosen_letter("A good question!") is None
        True
    """
    letter = f"[{re.escape(letters)}]"
    boxed = boxed_content(text)
    if boxed is not None:
        found = re.fullmatch(rf"\s*(?:\\(?:text|mathrm|textbf)\{{)?\(?({letter})\)?[.:]?\}}?\s*", boxed)
        return found.group(1) if found else None
    named = re.findall(rf"(?i:\b(?:answer|choice|option))\s*(?i:is|:|=)?\s*:?\s*[*_]*\(?({letter})(?![\w'])", text)
    if named:
        return named[-1]
    lines = text.strip().splitlines()
    found = re.match(rf"[*_]*(?:\(({letter})\)|({letter})(?:[).:]|[*_]*$))", lines[-1].strip()) if lines else None
    return (found.group(1) or found.group(2)) if found else None
