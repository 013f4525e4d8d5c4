"""Every setting says what it does, and something reads it; every shipped config loads."""

import ast
import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from rlhf.commands.recipes import config_summary, import_recipe, list_recipes
from rlhf.config import Config, load_config

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    file for folder in ("rlhf", "classic_rl", "reward_models", "recipes") for file in (ROOT / folder).rglob("*.py")
)
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}
SHIPPED = [(recipe, name) for recipe in list_recipes() for name in recipe.configs]


def config_classes() -> list[tuple[Path, ast.ClassDef]]:
    """Every class derived from Config, directly or not."""
    classes = [
        (file, node) for file, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]
    names, before = {"Config"}, 0
    while len(names) > before:
        before = len(names)
        names |= {node.name for _, node in classes if names & {getattr(b, "id", "") for b in node.bases}}
    return [(file, node) for file, node in classes if node.name in names - {"Config"}]


def fields_of(node: ast.ClassDef) -> list[str]:
    """Names of the fields; `type` only tells the branches of a union apart."""
    names = [s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
    return [name for name in names if name != "type" and not name.startswith("_")]


def untold_fields(node: ast.ClassDef) -> list[str]:
    """Values without a docstring that the class's docstring does not name either; groups are told by their class."""
    untold = []
    for statement, following in itertools.pairwise([*node.body, None]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            name = statement.target.id
            told = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            told = told or re.search(rf"\b{name}\b", ast.get_docstring(node) or "") is not None
            group = re.search(r"\b(?!Literal|None|Any|Path)[A-Z]", ast.unparse(statement.annotation))
            if name != "type" and not told and not group:
                untold.append(name)
    return untold


def names_read(tree: ast.AST) -> Counter[str]:
    """How often each name is read: as an attribute, in a match pattern, or through getattr."""
    read: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            read[node.attr] += 1
        elif isinstance(node, ast.MatchClass):
            read.update(node.kwd_attrs)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            read.update(a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))
    return read


READ = sum((names_read(tree) for tree in TREES.values()), Counter())
CLASSES = config_classes()


def class_name(value) -> str | None:
    return value.name if isinstance(value, ast.ClassDef) else value.stem if isinstance(value, Path) else None


def test_configs_are_found():
    assert {"AlgorithmConfig", "UpdateConfig", "ModelConfig"} <= {node.name for _, node in CLASSES}


@pytest.mark.parametrize(("file", "node"), CLASSES, ids=class_name)
def test_every_field_is_told(file, node):
    untold = untold_fields(node)
    assert not untold, f"{file.relative_to(ROOT)}: {node.name}: {', '.join(untold)}"


@pytest.mark.parametrize(("file", "node"), CLASSES, ids=class_name)
def test_every_field_is_read(file, node):
    outside = READ - names_read(node)
    unread = [name for name in fields_of(node) if outside[name] == 0]
    assert not unread, f"{file.relative_to(ROOT)}: {node.name}: {', '.join(unread)}"


@pytest.mark.parametrize(("recipe", "name"), SHIPPED, ids=lambda value: getattr(value, "name", value))
def test_every_shipped_config_loads(recipe, name):
    config = load_config(import_recipe(recipe).CONFIG, recipe.configs[name])
    assert isinstance(config, Config)
    assert hasattr(config, "run")


@pytest.mark.parametrize(("recipe", "name"), SHIPPED, ids=lambda value: getattr(value, "name", value))
def test_every_shipped_config_says_what_it_is(recipe, name):
    """`rlhf ls` shows the comment in the first line."""
    assert len(config_summary(recipe.configs[name])) > 10


@pytest.mark.parametrize("recipe", list_recipes(), ids=lambda recipe: recipe.name)
def test_every_recipe_is_one(recipe):
    module = import_recipe(recipe)
    assert issubclass(module.CONFIG, Config)
    assert callable(module.main)
    assert recipe.summary
    assert "launch(__file__)" in recipe.file.read_text(encoding="utf-8")
