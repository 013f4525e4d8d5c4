"""Who may import whom: the contracts of pyproject.toml, and what really gets loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("rlhf", "classic_rl", "reward_models")
LANGUAGE_LIBRARIES = ("transformers", "trl", "peft", "datasets")


def loaded_by(statement: str) -> set[str]:
    """Top-level packages in sys.modules after `statement` ran in a fresh interpreter."""
    script = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(result.stdout.splitlines()[-1].split())


def python_files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def imported_names(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return names


def test_import_contracts():
    # In a process of its own: import-linter reconfigures logging, which would silence our loggers for later tests.
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_core_loads_torch_and_pydantic_only():
    modules = " ".join(f"import rlhf.core.{file.stem};" for file in (ROOT / "rlhf/core").glob("[a-z]*.py"))
    loaded = loaded_by(f"import rlhf.core; {modules}")
    assert {"torch", "pydantic"} <= loaded
    assert loaded.isdisjoint({*LANGUAGE_LIBRARIES, "gymnasium", "accelerate", "matplotlib", "typer"})


def test_a_gym_user_loads_no_language_library():
    modules = [file.relative_to(ROOT).with_suffix("") for file in python_files("classic_rl")]
    names = [".".join(module.parts).removesuffix(".__init__") for module in modules]
    loaded = loaded_by("; ".join(f"import {name}" for name in names))
    assert "gymnasium" in loaded
    # accelerate looks for peft and transformers with find_spec only, which loads neither.
    assert loaded.isdisjoint({"transformers", "trl", "peft", "datasets"})


@pytest.mark.parametrize("package", PACKAGES)
def test_package_roots_are_light(package):
    assert loaded_by(f"import {package}").isdisjoint({"torch", "pydantic", "gymnasium", *LANGUAGE_LIBRARIES})


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["version"], ["ls"]])
def test_answers_at_once(arguments):
    """Time depends on the machine; what is loaded does not. Without these, --help takes about 0.2 s."""
    call = "from rlhf.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass"
    heavy = {"torch", "numpy", "accelerate", "gymnasium", "matplotlib", *LANGUAGE_LIBRARIES}
    assert loaded_by(f"sys.argv = {['rlhf', *arguments]!r}\n{call}").isdisjoint(heavy)


def test_nothing_imports_recipes_tests_or_benchmarks():
    outside = {"recipes", "tests", "benchmarks"}
    recipes = {file.stem for file in python_files("recipes")}
    for file in python_files(*PACKAGES, "recipes"):
        roots = {name.partition(".")[0] for name in imported_names(file)}
        assert roots.isdisjoint(outside | recipes), file


def test_no_star_imports_and_no_drawers():
    for file in python_files(*PACKAGES, "recipes", "benchmarks"):
        assert file.stem not in {"utils", "helpers", "misc", "common"}, file
        assert "import *" not in file.read_text(encoding="utf-8"), file
