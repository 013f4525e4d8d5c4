"""Reward functions found by name, and one clear error for every way to miss."""

import subprocess
import sys

import pytest

from rlhf.errors import RewardError
from rlhf.rewards.loading import load_reward

FILE = """
import dataclasses

def length(completions, scale=1.0, **columns):
    return [scale * len(text) for text in completions]

def make(factor):
    return lambda completions, **columns: [factor] * len(completions)

@dataclasses.dataclass
class Constant:
    value: float = 3.0
    def __call__(self, completions, **columns):
        return [self.value] * len(completions)

number = 7
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(FILE)
    return str(path)


def test_functions_factories_and_classes(file):
    assert load_reward(f"{file}:length")(completions=["ab"]) == [2]
    assert load_reward(f"{file}:length", arguments={"scale": 2})(completions=["ab"]) == [4]
    assert load_reward(f"{file}:make", arguments={"factor": 5})(completions=["ab"]) == [5]
    assert load_reward(f"{file}:Constant")(completions=["ab"]) == [3]
    assert load_reward(f"{file}:Constant", arguments={"value": 9})(completions=["ab"]) == [9]


def test_modules_and_the_working_directory(file, monkeypatch, tmp_path):
    assert load_reward("rlhf.rewards:exact_match")(completions=["a"], answer=["a"]) == [1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert load_reward("my_rewards:length")(completions=["ab"]) == [2]
    assert str(tmp_path) not in sys.path
    del sys.modules["my_rewards"]


@pytest.mark.parametrize(
    ("spec", "arguments", "reason"),
    [
        ("length", None, "not the name of a reward function; got 'length'"),
        ("{file}:", None, "not the name of a reward function"),
        ("{file}:lenght", None, "there is no 'lenght'. Did you mean 'length'"),
        ("{file}:zzz", None, "There are: .*length"),
        ("{file}:number", None, "is no function; got 'int'"),
        ("{file}:length", {"scall": 2}, "cannot be made: .*scall"),
        ("{file}:Constant", {"vallue": 2}, "cannot be made: .*vallue"),
        ("nowhere/none.py:length", None, "none.py: no such file of a reward function"),
        ("no_such_module:length", None, "cannot import the module: ModuleNotFoundError"),
    ],
)
def test_refusals(file, spec, arguments, reason):
    with pytest.raises(RewardError, match=reason):
        load_reward(spec.format(file=file), arguments=arguments)


def test_a_file_that_fails_to_import(tmp_path):
    (tmp_path / "bad.py").write_text("def length(:\n")
    with pytest.raises(RewardError, match=r"bad\.py: cannot import the file: SyntaxError"):
        load_reward(f"{tmp_path / 'bad.py'}:length")


def test_a_file_may_import_its_neighbour(tmp_path):
    (tmp_path / "neighbour_of_a_reward.py").write_text("SCORE = 4.0\n")
    text = "from neighbour_of_a_reward import SCORE\n\ndef score(completions, **columns):\n    return [SCORE]\n"
    (tmp_path / "file.py").write_text(text)
    assert load_reward(f"{tmp_path / 'file.py'}:score")(completions=["ab"]) == [4]
    assert str(tmp_path) not in sys.path


def test_the_package_is_light():
    code = (
        "import sys, rlhf.rewards, rlhf.rewards.math_worker;"
        "print([name for name in ('torch', 'transformers', 'datasets', 'trl') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
