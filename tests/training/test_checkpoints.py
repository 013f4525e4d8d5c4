"""Checkpoints: what goes in comes out, and a crash leaves the last one whole."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.errors import TrainingError
from rlhf.training.checkpoints import CheckpointStore


class Custom:
    pass


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep=2)


def names(store):
    return [path.name for path in store.all()]


def test_states_come_back_as_they_were(store):
    generator = np.random.default_rng(3).bit_generator.state  # holds 128-bit integers
    state = {
        "weights": {"a.b": torch.randn(2, 3), "half": torch.ones(2, dtype=torch.bfloat16)},
        "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
        "empty": np.zeros((0, 4), dtype=np.float32),
        "flags": np.array([True, False]),
        "scalar": np.float32(0.5),
        "nested": [1, (2.5, None, "x"), {"y": True, 3: -1}],
        "generator": generator,
    }
    path = store.save(7, {"thing": state})
    back = store.load(path, "thing")
    assert torch.equal(back["weights"]["a.b"], state["weights"]["a.b"])
    assert back["weights"]["half"].dtype == torch.bfloat16
    for key in ("array", "empty", "flags"):
        np.testing.assert_array_equal(back[key], state[key])
        assert back[key].dtype == state[key].dtype
    assert back["scalar"] == 0.5
    assert back["nested"] == state["nested"]
    assert back["generator"] == generator


def test_an_object_that_could_not_be_read_back_is_refused_before_anything_is_written(store):
    with pytest.raises(TrainingError, match=r"collector\['environments'\]\[1\]: .*got 'Custom'"):
        store.save(1, {"collector": {"environments": [1, Custom()]}})
    assert not store.directory.exists()


def test_a_file_that_would_run_code_is_refused(store):
    path = store.save(1, {"thing": 1})
    torch.save(Custom(), path / "thing.pt")
    with pytest.raises(TrainingError, match="not readable as a checkpoint"):
        store.load(path, "thing")


def test_a_missing_state_is_named(store):
    path = store.save(1, {"learner": 1, "collector": 2})
    with pytest.raises(TrainingError, match="no state of 'replay'; got 'collector, learner'"):
        store.load(path, "replay")


def test_the_latest_and_the_best_stay(store):
    for iteration in range(1, 8):
        path = store.save(iteration, {"x": iteration})
        if iteration == 3:
            store.mark_best(path, metric="evaluation/score", value=0.5)
    assert names(store) == ["iteration_000003", "iteration_000006", "iteration_000007"]
    assert store.latest().name == "iteration_000007"
    assert store.load(store.best(), "x") == 3
    store.mark_best(store.latest(), metric="evaluation/score", value=0.6)
    assert names(store) == ["iteration_000006", "iteration_000007"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to die alone")
def test_a_crash_while_writing_leaves_the_last_one_whole(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"x": torch.ones(3)})
    child = os.fork()
    if child == 0:  # the power fails when everything is written and nothing is named yet
        monkeypatch.setattr(Path, "rename", lambda *_: os._exit(9))
        store.save(2, {"x": torch.zeros(3)})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 9
    assert list(tmp_path.glob(".writing_*")), "the crash happened in the middle"
    assert names(store) == ["iteration_000001"]
    assert torch.equal(store.load(store.latest(), "x"), torch.ones(3))
    store.save(2, {"x": torch.zeros(3)})
    assert names(store) == ["iteration_000002"]
    assert not list(tmp_path.glob(".writing_*"))


def test_a_crash_before_the_pointer_moved_still_finds_a_whole_checkpoint(store):
    store.save(1, {"x": 1})
    store.save(2, {"x": 2})
    (store.directory / "latest").write_text("iteration_000001\n")
    assert store.load(store.latest(), "x") == 1
    (store.directory / "latest").unlink()
    assert store.load(store.latest(), "x") == 2


def test_a_full_disk_keeps_the_earlier_checkpoint(store, monkeypatch):
    store.save(1, {"x": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rlhf.training.checkpoints.torch.save", full)
    with pytest.raises(TrainingError, match="could not be written: No space left on device"):
        store.save(2, {"x": 2})
    assert names(store) == ["iteration_000001"]
    assert store.load(store.latest(), "x") == 1


def test_no_checkpoint_yet(store):
    assert store.latest() is None
    assert store.best() is None
    assert store.all() == []
