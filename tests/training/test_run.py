"""The run directory, exact resumption, and runs that end badly."""

import json
import platform
import signal
import socket
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import tracking
from accelerate.tracking import GeneralTracker
from small_worlds import ActorCritic, GuessingGame

from rlhf.config import Config, load_config
from rlhf.core.presets import ALGORITHMS
from rlhf.core.types import Rollout
from rlhf.errors import ConfigError, TrainingError
from rlhf.training import Learner, Run, RunConfig, UpdateConfig, optimize_policy
from rlhf.training.run_config import lowest_is_best

ROOT = Path(__file__).resolve().parents[2]


class Recipe(Config):
    run: RunConfig = RunConfig()
    iterations: int = 6


class Trainer:
    """What a recipe wires together."""

    def __init__(self, directory, *, iterations=6, preset="ppo", flatten=False, evaluate=None, collector=None, **run):
        settings = RunConfig(directory=str(directory), **run)
        recipe = Recipe(run=settings, iterations=iterations)
        self.run = Run(settings, resolved=recipe, iterations=iterations, recipe="guessing")
        self.policy = ActorCritic()
        update = UpdateConfig(learning_rate=1e-2, flatten_parameters=flatten, learning_rate_schedule="linear")
        self.learner = Learner(self.policy, ALGORITHMS[preset].model_copy(update={"minibatches": 2}), update)
        self.collector = (collector or GuessingGame)(self.policy)
        self.run.evaluate = evaluate

    def train(self):
        return optimize_policy(self.collector, self.learner, self.run)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(record):
    return {key: value for key, value in record.items() if "seconds" not in key}


def stop_after(iterations):
    class Stopping(GuessingGame):
        def collect(self):
            if self.collected == iterations:
                raise KeyboardInterrupt
            return super().collect()

    return Stopping


def test_the_directory_tells_the_whole_run(tmp_path):
    trainer = Trainer(tmp_path, seed=4, evaluate=lambda: {"score": 0.25})
    metrics = trainer.train()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints"}
    assert load_config(Recipe, tmp_path / "config.yaml").run == trainer.run.config
    records = lines(tmp_path / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["learning_rate"] for record in records] == pytest.approx([0.01 * (1 - i / 6) for i in range(6)])
    assert {"rollout/return_mean", "approx_kl", "time/collect_seconds"} <= records[0].keys()
    assert "evaluation/score" not in records[0]
    assert records[-1]["evaluation/score"] == 0.25
    assert [sample["iteration"] for sample in lines(tmp_path / "samples.jsonl")] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metrics"] == metrics
    assert summary["metrics"]["evaluation/score"] == 0.25
    assert summary["seed"] == 4
    assert summary["iterations"] == 6
    assert summary["recipe"] == "guessing"
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["seconds"] > 0


def test_the_environment_names_no_machine(tmp_path):
    Trainer(tmp_path)
    text = (tmp_path / "environment.json").read_text()
    environment = json.loads(text)
    assert environment["versions"]["python"] == platform.python_version()
    assert environment["torch_threads"] == torch.get_num_threads()
    assert socket.gethostname() not in text
    assert str(ROOT) not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"


def test_the_default_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_CONFIG_NAME", "fast")
    run = Run(RunConfig(seed=3), resolved=Recipe(), iterations=1, recipe="guessing")
    assert run.directory == Path("runs/guessing/fast/seed_3")
    assert (tmp_path / run.directory / "config.yaml").exists()


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("preset", ["ppo", "ppo_kl"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(tmp_path, preset, flatten):
    whole = Trainer(tmp_path / "whole", preset=preset, flatten=flatten)
    whole.train()
    settings = {"preset": preset, "flatten": flatten, "checkpoint_every": 2}
    with pytest.raises(KeyboardInterrupt):
        Trainer(tmp_path / "parts", collector=stop_after(5), **settings).train()
    assert len(lines(tmp_path / "parts" / "metrics.jsonl")) == 5, "the fifth iteration is not in a checkpoint"
    resumed = Trainer(tmp_path / "parts", resume=True, **settings)
    assert resumed.run.completed == 4
    resumed.train()
    assert resumed.collector.collected == 6
    for name, tensor in whole.policy.state_dict().items():
        assert torch.equal(tensor, resumed.policy.state_dict()[name]), name
    for name in ("metrics", "samples"):
        expected = [timeless(line) for line in lines(tmp_path / "whole" / f"{name}.jsonl")]
        assert [timeless(line) for line in lines(tmp_path / "parts" / f"{name}.jsonl")] == expected


def test_a_finished_run_resumes_to_its_own_summary(tmp_path):
    metrics = Trainer(tmp_path, evaluate=lambda: {"score": 1.0}).train()
    again = Trainer(tmp_path, resume=True, evaluate=lambda: {"score": 1.0}).train()
    assert timeless(again) == timeless(metrics)


def test_resuming_without_a_checkpoint_starts_over_and_says_so(tmp_path, capsys):
    trainer = Trainer(tmp_path / "new", resume=True)
    assert "no checkpoint in" in capsys.readouterr().out
    assert trainer.run.completed == 0


def test_changed_settings_are_kept_beside_each_other_and_said(tmp_path, capsys):
    Trainer(tmp_path, iterations=2).train()
    Trainer(tmp_path, iterations=3, resume=True).train()
    assert "settings differ from those the run was started with: iterations" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "config_before_1.yaml").read_text())["iterations"] == 2
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["iterations"] == 3
    assert len(lines(tmp_path / "metrics.jsonl")) == 3


def test_the_baseline_is_recorded_as_iteration_0_once(tmp_path):
    trainer = Trainer(tmp_path, evaluate_every=3, evaluate=lambda: {"score": 0.25})
    trainer.train()
    records = lines(tmp_path / "metrics.jsonl")
    assert [record["iteration"] for record in records] == [0, 1, 2, 3, 4, 5, 6]
    assert [record["iteration"] for record in records if "evaluation/score" in record] == [0, 3, 6]
    Trainer(tmp_path, evaluate_every=3, resume=True, evaluate=lambda: {"score": 0.25}).train()
    assert len(lines(tmp_path / "metrics.jsonl")) == 7


def test_evaluating_does_not_change_the_run(tmp_path):
    def evaluate():
        return {"noise": torch.randn(3).sum().item()}

    often = Trainer(tmp_path / "often", evaluate=evaluate, evaluate_every=1)
    often.train()
    never = Trainer(tmp_path / "never")
    never.train()
    assert all(torch.equal(a, b) for a, b in zip(often.policy.parameters(), never.policy.parameters(), strict=True))
    assert all("evaluation/noise" in record for record in lines(tmp_path / "often" / "metrics.jsonl"))


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "settings", "lowest"),
    [
        ("loss", {}, True),
        ("evaluation/perplexity", {}, True),
        ("return_mean", {}, False),
        ("loss", {"best_is": "highest"}, False),
        ("return_mean", {"best_is": "lowest"}, True),
    ],
)
def test_less_of_a_loss_is_better_and_more_of_the_rest(metric, settings, lowest):
    assert lowest_is_best(RunConfig(best_metric=metric, **settings)) is lowest


@pytest.mark.parametrize(("best_is", "iteration"), [("highest", 3), ("lowest", 5)])
def test_the_best_checkpoint_stays_and_can_be_restored(tmp_path, best_is, iteration):
    scores = {0: 1.0, 1: 0.5, 2: 0.6, 3: 0.9, 4: 0.2, 5: 0.1, 6: 0.4}  # 0 is before learning, without a checkpoint
    trainer = Trainer(
        tmp_path, evaluate_every=1, checkpoint_every=1, keep_checkpoints=1, best_metric="score", best_is=best_is
    )
    seen = {}

    def evaluate():
        seen[len(seen)] = trainer.policy.actor[0].bias.detach().clone()
        return {"score": scores[len(seen) - 1]}

    trainer.run.evaluate = evaluate
    trainer.train()
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("iteration_*"))
    assert kept == [f"iteration_{iteration:06d}", "iteration_000006"]
    assert trainer.run.restore_best("learner").name == f"iteration_{iteration:06d}"
    assert torch.equal(trainer.policy.actor[0].bias, seen[iteration])


def test_an_unknown_best_metric_is_named(tmp_path):
    with pytest.raises(TrainingError, match="no such metric; got 'reward'; expected evaluation/score"):
        Trainer(tmp_path, evaluate=lambda: {"score": 1.0}, best_metric="reward").train()


# --- refusals and stops ---------------------------------------------------------------------------------------------


def test_an_earlier_run_is_not_overwritten(tmp_path):
    Trainer(tmp_path).train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"holds an earlier run.*run\.resume=true.*run\.overwrite=true"):
        Trainer(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_overwriting_removes_what_runs_write_and_nothing_else(tmp_path):
    Trainer(tmp_path).train()
    (tmp_path / "notes.txt").write_text("mine")
    Trainer(tmp_path, overwrite=True, iterations=2).train()
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_model_made_before_the_iterations_serves_a_resumed_run_alone(tmp_path):
    """A run that starts over may have other settings; one that was cut off while it wrote has no tokenizer yet."""
    folder = tmp_path / "sft"
    folder.mkdir()
    Trainer(tmp_path).train()
    for resumed, written, expected in [(True, "config.json", False), (True, "both", True), (False, "both", False)]:
        for name in ("config.json", *(["tokenizer_config.json"] if written == "both" else [])):
            folder.mkdir(exist_ok=True)
            (folder / name).write_text("{}")
        run = Trainer(tmp_path, resume=resumed, overwrite=not resumed).run
        assert run.finds_model(folder) == expected
        assert folder.exists() == expected


def test_starting_over_repeats_the_cells_of_an_experiment(tmp_path):
    Trainer(tmp_path).train()
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "a.json").write_text("{}")
    Trainer(tmp_path, resume=True)
    assert (tmp_path / "cells" / "a.json").exists()
    Trainer(tmp_path, overwrite=True)
    assert not (tmp_path / "cells").exists()


def test_a_run_that_failed_before_its_first_iteration_may_be_started_again(tmp_path):
    Trainer(tmp_path)
    Trainer(tmp_path).train()
    assert len(lines(tmp_path / "metrics.jsonl")) == 6


def test_someone_elses_config_is_not_overwritten(tmp_path):
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(ConfigError, match=r"got 'config\.yaml'"):
        Trainer(tmp_path)


def test_resume_and_overwrite_contradict_each_other():
    with pytest.raises(ValueError, match="choose one"):
        RunConfig(resume=True, overwrite=True)


def test_trackers_get_every_number(tmp_path, monkeypatch):
    sent = []

    class Remembering(GeneralTracker):
        name, requires_logging_directory = "aim", True

        def __init__(self, run_name, logging_dir):
            super().__init__()
            sent.append((run_name, logging_dir))

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            sent.append(values)

        def log(self, values, step=None):
            sent.append((step, values))

        def finish(self):
            sent.append("finished")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "aim", Remembering)
    monkeypatch.setattr("rlhf.training.metrics.get_available_trackers", lambda: ["aim"])
    Trainer(tmp_path, trackers=["aim"], iterations=3, log_every=2).train()
    assert sent[0] == ("guessing", tmp_path / "trackers")
    assert sent[1]["run.log_every"] == 2
    assert [entry[0] for entry in sent[2:4]] == [2, 3]
    assert "approx_kl" in sent[2][1]
    assert sent[4:] == ["finished"]


@pytest.mark.parametrize(("name", "message"), [("tensorbord", "no such tracker"), ("aim", "not installed")])
def test_trackers_are_checked_before_training(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(tmp_path / "run", trackers=[name])
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_names_the_iteration_and_the_last_good_checkpoint(tmp_path):
    class Breaking(GuessingGame):
        def collect(self):
            rollout = super().collect()
            rewards = rollout.rewards * (torch.nan if self.collected == 3 else 1.0)
            return Rollout(**{**vars(rollout), "rewards": rewards})

    trainer = Trainer(tmp_path, collector=Breaking, checkpoint_every=1)
    with pytest.raises(
        TrainingError, match=r"iteration 3: .*policy loss.*not finite.*last good checkpoint is .*000002"
    ):
        trainer.train()
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert all(torch.isfinite(parameter).all() for parameter in trainer.policy.parameters())


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_stops_after_the_iteration_with_a_checkpoint(tmp_path, capsys, number, ending):
    class Interrupted(GuessingGame):
        def collect(self):
            if self.collected == 2:
                signal.raise_signal(number)
            return super().collect()

    whole = Trainer(tmp_path / "whole")
    whole.train()
    trainer = Trainer(tmp_path / "parts", collector=Interrupted)
    with pytest.raises(ending) as caught:
        trainer.train()
    if ending is SystemExit:
        assert caught.value.code == 128 + signal.SIGTERM
    printed = capsys.readouterr().out
    assert "stopping after this iteration, with a checkpoint" in printed
    assert "run.resume=true goes on from" in printed
    assert len(lines(tmp_path / "parts" / "metrics.jsonl")) == 3
    assert not (tmp_path / "parts" / "summary.json").exists()
    resumed = Trainer(tmp_path / "parts", resume=True)
    assert resumed.run.completed == 3
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True))


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Impatient(GuessingGame):
        def collect(self):
            if self.collected == 2:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            return super().collect()

    handler = signal.getsignal(signal.SIGINT)
    trainer = Trainer(tmp_path, collector=Impatient)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.run.completed == 2
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    assert signal.getsignal(signal.SIGINT) is handler


def test_an_exception_keeps_metrics_and_checkpoints(tmp_path):
    class Failing(GuessingGame):
        def collect(self):
            if self.collected == 3:
                raise RuntimeError("the environment broke")
            return super().collect()

    with pytest.raises(RuntimeError, match="the environment broke"):
        Trainer(tmp_path, collector=Failing, checkpoint_every=2).train()
    assert len(lines(tmp_path / "metrics.jsonl")) == 3
    assert Trainer(tmp_path, resume=True, checkpoint_every=2).run.completed == 2


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path):
    run = Run(RunConfig(directory=str(tmp_path)), resolved=Recipe(), iterations=1)
    for iteration in run.iterations():
        run.finish_iteration(iteration, None, {"explained_variance": float("nan"), "score": 1.0})
    run.finish(passed=3, note="hello")
    assert lines(tmp_path / "metrics.jsonl")[0]["explained_variance"] is None
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["metrics"] == {"explained_variance": None, "score": 1.0, "passed": 3}
    assert summary["note"] == "hello"


def test_the_console_has_plain_lines_where_there_is_no_terminal(tmp_path, capsys):
    Trainer(tmp_path, log_every=3).train()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed] == ["guessing 3/6", "guessing 6/6"]
    assert "return_mean" in printed[0]
