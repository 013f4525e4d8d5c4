"""Finding recipes and their configs, in the checkout or in the installed package."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import rlhf
from rlhf.errors import ConfigError, UserError

CONFIG_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Recipe:
    """A recipe's script and the folder of its configs.

    Args:
        file: The script; its name without `.py` is the recipe's name.
        configs: Config name to YAML file, in alphabetical order.
    """

    file: Path
    configs: dict[str, Path]

    @property
    def name(self) -> str:
        """The name that `rlhf run` takes."""
        return self.file.stem

    @property
    def summary(self) -> str:
        """The first line of the script's docstring."""
        docstring = ast.get_docstring(ast.parse(self.file.read_text(encoding="utf-8")))
        return docstring.splitlines()[0] if docstring else ""


def recipes_folder() -> Path:
    """The checkout's `recipes/` when rlhf runs from one, else the copy inside the installed package."""
    package = Path(rlhf.__file__).resolve().parent
    checkout = package.parent
    for folder in ([checkout / "recipes"] if (checkout / "pyproject.toml").is_file() else []) + [package / "_recipes"]:
        if folder.is_dir():
            return folder
    raise UserError("no recipes are installed", where=str(package), remedy="Reinstall rlhf-toolkit.")


def list_recipes() -> list[Recipe]:
    """Every shipped recipe, by name."""
    return [_recipe(file) for file in sorted(recipes_folder().glob("*.py")) if not file.name.startswith("_")]


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or the script at that path.

    Raises:
        UserError: There is none; the message names the nearest one.
    """
    if name.endswith(".py") or "/" in name:
        file = Path(name)
        if not file.is_file():
            raise UserError("no such recipe file", where=name, remedy="`rlhf ls` lists the recipes that are shipped.")
        return _recipe(file.resolve())
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    if name not in recipes:
        raise UserError(f"no recipe named {name!r}", remedy=nearest_name(name, recipes))
    return recipes[name]


def find_config(recipe: Recipe, config: str | None) -> Path | None:
    """The YAML file that `--config` means: a name among the recipe's configs, or a path.

    Args:
        recipe: The recipe to run.
        config: What the user gave; None stands for `default.yaml` where there is one, else the class's defaults.

    Raises:
        ConfigError: There is none; the message names the nearest one.
    """
    if config is None:
        return recipe.configs.get("default")
    if config in recipe.configs:
        return recipe.configs[config]
    if config.endswith(CONFIG_SUFFIXES) or "/" in config:
        if not Path(config).is_file():
            raise ConfigError(
                "no such config file", where=config, remedy=nearest_name(Path(config).stem, recipe.configs)
            )
        return Path(config)
    raise ConfigError(
        f"recipe {recipe.name!r} has no config named {config!r}", remedy=nearest_name(config, recipe.configs)
    )


def import_recipe(recipe: Recipe) -> ModuleType:
    """Execute the recipe's file, as `python FILE` would, and return it with its `CONFIG` and `main`.

    Raises:
        UserError: The file is not a recipe.
    """
    running = sys.modules["__main__"]
    started_by_file = getattr(running, "__file__", None)
    if started_by_file is not None and Path(started_by_file).resolve() == recipe.file:
        module = running
    else:
        module = _execute(recipe.file)
    for attribute, meaning in (("CONFIG", "its config class"), ("main", "a function that takes the config")):
        if not hasattr(module, attribute):
            raise UserError(f"not a recipe: there is no {attribute}", where=str(recipe.file), expected=meaning)
    return module


def config_summary(file: Path) -> str:
    """The text of the YAML file's first line, where it is a comment."""
    with file.open(encoding="utf-8") as lines:
        first = lines.readline()
    return first.lstrip("# ").strip() if first.startswith("#") else ""


def copy_recipe(recipe: Recipe, folder: Path) -> list[Path]:
    """Copy the script and its configs into `folder`, as `NAME.py` and `configs/NAME/*.yaml`.

    Returns:
        The files written.

    Raises:
        UserError: One of them exists already; nothing is overwritten.
    """
    copies = {recipe.file: folder / recipe.file.name}
    copies |= {file: folder / "configs" / recipe.name / file.name for file in recipe.configs.values()}
    for target in copies.values():
        if target.exists():
            raise UserError("the file exists already", where=str(target), remedy="Copy into another folder.")
    for source, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return list(copies.values())


def nearest_name(name: str, known: Iterable[str]) -> str:
    """A remedy: the known name nearest to `name`, and all of them."""
    known = sorted(known)
    if not known:
        return "There are none."
    nearest = difflib.get_close_matches(name, known, n=1)
    return (f"Did you mean {nearest[0]!r}? " if nearest else "") + f"There are: {', '.join(known)}."


def _recipe(file: Path) -> Recipe:
    folder = file.parent / "configs" / file.stem
    files = sorted(path for path in folder.glob("*") if path.suffix in CONFIG_SUFFIXES)
    return Recipe(file=file, configs={path.stem: path for path in files})


def _execute(file: Path) -> ModuleType:
    # Modules beside a copied recipe can be imported, as they can be when Python runs the file itself.
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    name = f"rlhf_recipe_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # pydantic looks the annotations of the recipe's config class up in sys.modules.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
