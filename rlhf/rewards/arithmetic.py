"""Checking an arithmetic expression that somebody else wrote, without running it."""

from __future__ import annotations

import ast
import operator
import re
from collections import Counter
from fractions import Fraction

from rlhf.rewards.extraction import boxed_content

_MAX_LENGTH = 200
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
# Signs of typeset text: times, middle dot, divided by, minus, en dash.
_SPELLINGS = {
    "\u00d7": "*",
    "\u00b7": "*",
    "\u00f7": "/",
    "\u2212": "-",
    "\u2013": "-",
    "[": "(",
    "]": ")",
    r"\times": "*",
    r"\cdot": "*",
    r"\div": "/",
}


def evaluate_arithmetic(expression: str) -> tuple[Fraction, list[int]] | None:
    """Evaluate whole numbers joined by + - * / and parentheses, exactly.

    The text is parsed, never executed; names, calls, powers, decimals and every other spelling of a number are
    refused.

    Args:
        expression: At most 200 characters.

    Returns:
        The value and the numbers used, or None where the text is no such expression or divides by zero.

    Example:
        >>> evaluate_arithmetic("(100 - 93) * 30 / 7")
        (Fraction(30, 1), [100, 93, 30, 7])
        >>> evaluate_arithmetic("9**9") is None
        True
    """
    if len(expression) > _MAX_LENGTH or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        return None
    used: list[int] = []
    try:
        value = _evaluate(ast.parse(expression.strip(), mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value, used


def _evaluate(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _evaluate(node.operand, used)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left = _evaluate(node.left, used)
        return _OPERATIONS[type(node.op)](left, _evaluate(node.right, used))
    raise ValueError(f"not arithmetic: {type(node).__name__}")


def find_expression(text: str) -> str | None:
    """Return the expression that a completion proposes: in its last <answer>, else its last box, else its last line.

    What follows an equals sign is left out, and other spellings of the operators are replaced.

    Example:
        >>> find_expression("Let me think. <answer>(3 + 1) × 6 = 24</answer>")
        '(3 + 1) * 6'
    """
    tagged = re.findall(r"<answer>(.*?)</answer>", text, flags=re.DOTALL)
    lines = text.strip().splitlines()
    proposed = tagged[-1] if tagged else boxed_content(text) or (lines[-1].rpartition(":")[2] if lines else "")
    expression = proposed.partition("=")[0]
    for spelling, meaning in _SPELLINGS.items():
        expression = expression.replace(spelling, meaning)
    return expression.strip().strip("$`*.").strip() or None


def is_allowed_use(used: list[int], given: list[int], *, every: bool) -> bool:
    """True where each given number is used exactly once (`every`), or at most once, and no other number is."""
    left_over, taken = Counter(given), Counter(used)
    left_over.subtract(taken)
    return all(count == 0 for count in left_over.values()) if every else all(count >= 0 for count in left_over.values())
