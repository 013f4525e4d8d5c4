"""Two processes over gloo give the weights of one process that holds all rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scenarios import SCENARIOS, credited, train

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What both processes of every scenario ended with."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "two_processes.py"), str(folder)],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        name: [torch.load(folder / f"{name}_{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in [*SCENARIOS, "run", "credited"]
    } | {"folder": folder}


def _environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_give_the_weights_of_one(outcomes, name):
    expected, _ = train(SCENARIOS[name], rank=None)
    first, second = outcomes[name]
    for key, weights in expected.items():
        torch.testing.assert_close(first["weights"][key], weights, rtol=1e-4, atol=2e-5)
        assert torch.equal(first["weights"][key], second["weights"][key]), f"{key} differs between the processes"


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_report_the_metrics_of_one(outcomes, name):
    _, expected = train(SCENARIOS[name], rank=None)
    first, second = (outcome["metrics"] for outcome in outcomes[name])
    assert first.keys() == second.keys() == expected.keys()
    assert first == pytest.approx(second, nan_ok=True)
    assert first == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)


def test_the_early_stop_happened(outcomes):
    assert 0 < outcomes["gym_early_stop"][0]["metrics"]["epochs_run"] < 8


def test_credit_is_assigned_over_all_processes(outcomes):
    whole = credited(rank=None)
    first, second = outcomes["credited"]
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, atol=1e-5, rtol=1e-4)
    advantages, imitation = first
    assert abs(advantages[advantages != 0].mean()) > 0.01, "each process by itself would have a mean of 0"
    alone = 0.1 * (advantages != 0).sum() / (imitation != 0).sum()
    assert abs(imitation.max() / alone - 1) > 0.01, "each process by itself would count its own successes"


def test_a_run_of_two_processes_resumes_bit_by_bit(outcomes):
    for outcome in outcomes["run"]:
        assert outcome["refused"], "both processes refuse a directory that is taken"
        for name, weights in outcome["whole"].items():
            assert torch.equal(weights, outcome["parts"][name]), name
    assert [outcome["collected"] for outcome in outcomes["run"]] == [5, 5]


def test_only_the_main_process_writes(outcomes):
    for name in ("whole", "parts"):
        folder = outcomes["folder"] / name
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5]
        assert records[0]["rows"] == 12, "6 rows from each process"
        assert json.loads((folder / "environment.json").read_text())["processes"] == 2
