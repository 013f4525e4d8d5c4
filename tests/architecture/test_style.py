"""The limits of CONTRIBUTING.md that no linter checks."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(file for folder in ("rlhf", "classic_rl", "reward_models") for file in (ROOT / folder).rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
FUNCTION_LINES, FILE_LINES, RECIPE_LINES = 60, 500, 75

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def docstring_lines(node: ast.AST) -> set[int]:
    """Lines of the docstrings of a module and of everything in it, and of attribute docstrings."""
    return {
        line
        for inner in ast.walk(node)
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) and isinstance(inner.value.value, str)
        for line in range(inner.lineno, (inner.end_lineno or inner.lineno) + 1)
    }


def functions_in(tree: ast.AST) -> Iterator[FunctionNode]:
    for node in ast.walk(tree):
        if isinstance(node, FunctionNode):
            yield node


@pytest.mark.parametrize("file", [*SOURCES, *RECIPES], ids=name_of)
def test_files_and_functions_are_short(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= FILE_LINES
    tree = parse(file)
    told = docstring_lines(tree)
    for function in functions_in(tree):
        lines = set(range(function.lineno, (function.end_lineno or function.lineno) + 1)) - told
        assert len(lines) <= FUNCTION_LINES, f"{function.name} has {len(lines)} lines without its docstring"


@pytest.mark.parametrize("file", [*SOURCES, *RECIPES], ids=name_of)
def test_everything_public_has_a_docstring(file):
    tree = parse(file)
    assert ast.get_docstring(tree), "the module"
    for node in tree.body:
        if isinstance(node, FunctionNode | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("file", RECIPES, ids=name_of)
def test_recipes_are_short(file):
    """A recipe wires parts together; a part that grows belongs into a package."""
    told = docstring_lines(parse(file))
    lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
    code = [line for number, line in lines if number not in told and line.strip() and not line.strip().startswith("#")]
    assert len(code) <= RECIPE_LINES


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_arguments_are_keyword_only_after_the_fourth(file):
    """`gae(rewards, values, discount=0.99)`: from the fifth argument on, a call always says what it passes.

    Functions of modules only, since methods override those of libraries; decorated ones are called by libraries, too.
    """
    for function in parse(file).body:
        if isinstance(function, FunctionNode) and not function.decorator_list and not function.name.startswith("_"):
            positional = [argument.arg for argument in [*function.args.posonlyargs, *function.args.args]]
            assert len(positional) <= 4, f"{function.name}({', '.join(positional)}, ...)"
