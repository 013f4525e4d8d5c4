"""The README's Python blocks do what they say."""

import re
from pathlib import Path

import pytest

import rlhf.lm.fine_tuning

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = ["README.md", "CONTRIBUTING.md", "recipes/README.md", "classic_rl/README.md", "rlhf/lm/README.md"]
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_policy_of_ones_own_learns_its_reward():
    variables = {}
    exec(BLOCKS[0], variables)
    assert variables["policy"].logits.softmax(-1)[7] > 0.9


def test_the_language_model_block_is_a_valid_config(monkeypatch):
    seen = []
    monkeypatch.setattr(rlhf.lm.fine_tuning, "fine_tune", lambda config, *, recipe: seen.append(config))
    exec(BLOCKS[1], {})
    assert seen[0].algorithm.advantages.type == "group_relative"
    assert seen[0].collector.group_size == 8


def test_the_table_names_every_preset_and_says_which_are_for_language_models_only():
    from rlhf.core.presets import ALGORITHMS

    pattern = r"^\| `([a-z0-9_+]+)`( \(language models only\))? \|"
    rows = re.findall(pattern, README.read_text(encoding="utf-8"), flags=re.M)
    assert [name for name, _ in rows] == list(ALGORITHMS)
    only = {name for name, note in rows if note}
    assert only == {name for name, row in ALGORITHMS.items() if row.language_only}


def test_the_table_of_algorithms_is_the_codes():
    """Tables in other libraries' documentation say what their code does not do (prime-rl, open-instruct)."""
    from rlhf.commands.algorithms import algorithm_table

    assert algorithm_table() in README.read_text(encoding="utf-8"), "paste: python -m rlhf.commands.algorithms"


def test_the_files_and_configs_that_the_readme_names_exist():
    from rlhf.commands.recipes import find_recipe

    text = README.read_text(encoding="utf-8")
    paths = set(re.findall(r"`((?:tests|recipes|rlhf|benchmarks|classic_rl)/[\w/.]+)`", text))
    paths |= set(re.findall(r"\]\(([\w/.]+)\)", text))
    assert len(paths) > 15
    assert [path for path in sorted(paths) if not (README.parent / path).exists()] == []
    named = re.findall(r"^rlhf (?:run|explain|show-batch) (\w+)(?: --config (\w+)(?!\S))?", text, flags=re.M)
    assert len(named) > 5
    for recipe, config in named:
        assert not config or config in find_recipe(recipe).configs, (recipe, config)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(
        re.findall(r"`(tests/[\w/.-]+|(?:benchmarks|recipes|rlhf|classic_rl|reward_models)/[\w/.-]+\.\w+)`", text)
    )
    assert named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
