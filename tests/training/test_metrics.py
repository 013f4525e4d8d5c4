"""Records in files and on the console."""

import doctest
import json
import math

import numpy as np
import pytest
import torch

from rlhf.errors import TrainingError
from rlhf.training import batching, metrics, schedules
from rlhf.training.metrics import ConsoleLog, JsonLines, flatten_settings, headline


@pytest.mark.parametrize("module", [batching, metrics, schedules])
def test_examples_in_docstrings(module):
    outcome = doctest.testmod(module, extraglobs={"torch": torch})
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_records_come_back(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    assert lines.read() == []
    lines.write([{"iteration": 1, "é": "ü", "bad": math.inf, "numpy": np.float32(0.5), "tensor": torch.tensor([1, 2])}])
    lines.write([{"iteration": 2}, {"iteration": 3}])
    assert lines.read()[0] == {"iteration": 1, "é": "ü", "bad": None, "numpy": 0.5, "tensor": [1, 2]}
    lines.keep_until(2)
    assert [record["iteration"] for record in lines.read()] == [1, 2]


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"iteration": 1}\n{"iteration": 2}\n{"iterat')
    lines = JsonLines(path)
    assert len(lines.read()) == 2
    lines.keep_until(2)
    lines.write([{"iteration": 3}])
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_record_that_is_not_json_is_refused_whole(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl")
    with pytest.raises(TrainingError, match=r"m\.jsonl: not writable as JSON"):
        lines.write([{"iteration": 1}, {"thing": object()}])
    assert not lines.path.exists()


def test_the_headline_keeps_room_for_training_beside_many_evaluations():
    numbers = {f"evaluation/score_{index}": 0.0 for index in range(9)} | {"approx_kl": 0.125, "entropy": 2.0}
    assert headline(numbers).endswith("approx_kl 0.125  entropy 2")
    assert headline({"anything": 3.0}) == "anything 3"


def test_other_processes_print_nothing(capsys):
    console = ConsoleLog(total=3, enabled=False, bar=True, every=1, name="run")
    console.start(completed=0)
    console.iteration(1, {"x": 1.0})
    console.say("hello")
    console.stop()
    assert capsys.readouterr().out == ""


def test_settings_are_flat_for_trackers():
    settings = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": None, "f": True}
    assert flatten_settings(settings) == {"a.b": 1, "a.c.d": "[1, 2]", "e": "None", "f": True}
