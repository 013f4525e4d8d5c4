"""The command line, as a user meets it: what it prints, where, and how it exits."""

import doctest
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rlhf import __version__, markdown
from rlhf.cli import app
from rlhf.commands import tables
from rlhf.commands.explaining import explain_config
from rlhf.commands.recipes import recipes_folder
from rlhf.commands.running import threads_each
from rlhf.commands.tables import make_table
from rlhf.config import Config, load_config
from rlhf.core.presets import AlgorithmChoice
from rlhf.errors import DataError, UserError

ROOT = Path(__file__).resolve().parents[1]

RECIPE = '''
"""A recipe that writes down what it was given."""
import json, os, time
from pathlib import Path
from rlhf.cli import launch
from rlhf.config import Config
from rlhf.config import Config, load_config
from rlhf.core.presets import AlgorithmChoice
from rlhf.errors import DataError

class RunConfig(Config):
    seed: int = 0
    directory: str | None = None

class ToyConfig(Config):
    run: RunConfig = RunConfig()
    x: float = 1.0
    end: str = "well"
    bad_seed: int = -1

CONFIG = ToyConfig

def main(config):
    # One write: processes share a pipe, and the launcher starts them without buffers.
    line = f"name: {os.environ['RLHF_CONFIG_NAME']} rank: {os.environ.get('RANK')} x: {config.x}"
    os.write(1, (line + "\\n").encode())
    if config.end == "user error" or config.run.seed == config.bad_seed:
        raise DataError("no field `prompt`", where="a.jsonl:3")
    if config.end == "crash":
        raise RuntimeError("boom")
    if config.end == "never":
        Path("started").touch()
        time.sleep(60)
    folder = Path(config.run.directory or "out")
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"evaluation/return_mean": config.x + config.run.seed}
    summary = {"metrics": metrics, "seed": config.run.seed, "seconds": 2.0, "versions": {},
               "recipe": "toy", "config_name": os.environ["RLHF_CONFIG_NAME"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    return {}

if __name__ == "__main__":
    launch(__file__)
'''  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a recipe of the user's own, as `rlhf cp` leaves one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLHF_CONFIG_NAME", raising=False)
    (tmp_path / "toy.py").write_text(RECIPE, encoding="utf-8")
    configs = tmp_path / "configs" / "toy"
    configs.mkdir(parents=True)
    (configs / "first.yaml").write_text("# The first of two.\nx: 2\n", encoding="utf-8")
    (configs / "second.yaml").write_text("# The second of two.\nx: 3\n", encoding="utf-8")
    return tmp_path


def rlhf(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "rlhf.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | (env or {}), timeout=120)


# --- rlhf run -----------------------------------------------------------------------------------------------------


def test_run_with_a_config_and_overrides(folder):
    result = rlhf("run", "toy.py", "--config", "first", "x=1e-3", "run.directory=here")
    assert result.returncode == 0, result.stderr
    assert "name: first rank: None x: 0.001" in result.stdout
    assert (folder / "here" / "summary.json").is_file()


def test_run_without_a_config_uses_the_defaults(folder):
    assert "name: default rank: None x: 1.0" in rlhf("run", "toy.py").stdout


def test_run_uses_default_yaml_where_there_is_one(folder):
    (folder / "configs" / "toy" / "default.yaml").write_text("x: 7\n")
    assert "name: default rank: None x: 7.0" in rlhf("run", "./toy.py").stdout


def test_a_config_may_be_a_path(folder):
    (folder / "mine.yaml").write_text("x: 9\n")
    assert "name: mine rank: None x: 9.0" in rlhf("run", "toy.py", "--config", "mine.yaml").stdout


def test_a_recipe_file_runs_itself(folder):
    result = subprocess.run(
        [sys.executable, "toy.py", "--config", "second", "x=4"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "name: second rank: None x: 4.0" in result.stdout
    assert result.stdout.count("name:") == 1


def test_a_recipe_may_import_its_neighbours(folder):
    (folder / "my_reward.py").write_text("VALUE = 42\n")
    (folder / "toy.py").write_text(RECIPE.replace("import json,", "import my_reward, json,"))
    assert rlhf("run", str(folder / "toy.py")).returncode == 0


def test_a_user_error_is_one_sentence_and_exit_code_2(folder):
    result = rlhf("run", "toy.py", "end=user error")
    assert result.returncode == 2
    assert result.stderr == "error: a.jsonl:3: no field `prompt`\n"


def test_the_traceback_is_there_when_asked_for(folder):
    result = rlhf("run", "toy.py", "end=user error", "--traceback")
    assert result.returncode == 2
    assert "Traceback (most recent call last)" in result.stderr
    assert "in main" in result.stderr


def test_a_crash_of_ours_shows_its_traceback(folder):
    result = rlhf("run", "toy.py", "end=crash")
    assert result.returncode == 1
    assert "RuntimeError: boom" in result.stderr
    assert "in main" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["toi.py"], "toi.py: no such recipe file. `rlhf ls` lists the recipes that are shipped."),
        (["toy.py", "--config", "frst"], "recipe 'toy' has no config named 'frst'. Did you mean 'first'?"),
        (["toy.py", "--config", "other.yaml"], "other.yaml: no such config file"),
        (["toy.py", "--config", "first", "xx=1"], "first.yaml with overrides: xx: unknown key; did you mean 'x'?"),
        (["toy.py", "x=much"], "overrides: x: got 'much', expected a valid number"),
        (["toy.py", "x"], "not an override; got 'x'; expected a.b.c=value"),
        (["toy.py", "--seeds", "0,a"], "--seeds is not a list of integers; got '0,a'"),
        (["toy.py", "--seeds", "0,0"], "--seeds names a seed twice"),
        (["toy.py", "--processes", "2", "x=much"], "overrides: x: got 'much', expected a valid number"),
        (["empty.py"], "not a recipe: there is no CONFIG"),
        (["no_such_recipe"], "no recipe named 'no_such_recipe'"),
    ],
)
def test_mistakes_on_the_command_line(folder, arguments, sentence):
    (folder / "empty.py").write_text('"""Nothing."""\n')
    result = CliRunner().invoke(app, ["run", *arguments])
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_defaults_that_do_not_suffice_name_the_configs(folder):
    (folder / "toy.py").write_text(RECIPE.replace("x: float = 1.0", "x: float"))
    result = CliRunner().invoke(app, ["run", "toy.py"])
    assert result.exit_code == 2
    assert result.stderr == (
        "error: config: x: this key is required. Or start from one of its configs with --config: first, second.\n"
    )


def test_an_interrupted_run_says_that_checkpoints_are_kept(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.cli", "run", "toy.py", "end=never"],
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests are a shell's background job, SIGINT is ignored and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(folder / "started")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr == "interrupted; the checkpoints written so far are kept.\n"


# --- several processes --------------------------------------------------------------------------------------------


def test_processes_run_the_same_file_with_ranks(folder):
    result = rlhf("run", "toy.py", "--config", "first", "x=5", "--processes", "2")
    assert result.returncode == 0, result.stderr
    assert sorted(re.findall(r"name: first rank: (\d) x: 5.0", result.stdout)) == ["0", "1"]


def test_a_user_error_in_a_process_is_exit_code_2_without_the_launchers_report(folder):
    result = rlhf("run", "toy.py", "--processes", "2", "end=user error")
    assert result.returncode == 2
    lines = set(result.stderr.splitlines())
    # The launcher ends the others as soon as one has failed, so that the second may not come to speak.
    assert lines
    assert lines <= {f"[process {rank}] error: a.jsonl:3: no field `prompt`" for rank in (0, 1)}


def test_processes_inside_a_launcher_are_refused(folder):
    result = rlhf("run", "toy.py", "--processes", "2", env={"WORLD_SIZE": "2", "RANK": "0"})
    assert result.returncode == 2
    assert "--processes inside a distributed launch" in result.stderr


# --- several seeds ------------------------------------------------------------------------------------------------


def test_seeds_end_with_a_table(folder):
    result = rlhf("run", "toy.py", "--config", "first", "--seeds", "0,1,2", "--jobs", "2")
    assert result.returncode == 0, result.stderr
    # Returns are x + seed = 2, 3, 4: mean 3, sample standard deviation 1.
    assert result.stdout.splitlines()[-3:] == [
        "| recipe | config | return_mean | seconds | seeds |",
        "| --- | --- | --- | --- | --- |",
        "| toy | first | 3 ± 1 (3) | 2 ± 0 (3) | 0, 1, 2 |",
    ]
    runs = folder / "runs" / "toy" / "first"
    assert (runs / "seed_1" / "summary.json").is_file()
    assert "name: first" in (runs / "seed_1.log").read_text()


def test_a_failing_seed_fails_the_whole_and_shows_its_end(folder):
    result = rlhf("run", "toy.py", "--seeds", "0,1", "--jobs", "2", "bad_seed=1", "run.directory=here")
    assert result.returncode == 2
    assert "seed 0: finished" in result.stdout
    assert "seed 1: failed with exit code 2" in result.stdout
    assert "| error: a.jsonl:3: no field `prompt`" in result.stderr
    assert "| toy | default | 1 | 2 | 0 |" in result.stdout
    assert (folder / "here" / "seed_0" / "summary.json").is_file()


def test_a_crashing_seed_is_exit_code_1(folder):
    assert rlhf("run", "toy.py", "--seeds", "0", "end=crash").returncode == 1


def test_no_seed_outlives_the_command(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf.cli", "run", "toy.py", "--seeds", "0", "end=never"], stdout=subprocess.DEVNULL
    )
    wait_for(folder / "started")
    process.terminate()
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert (
        "interrupted; the checkpoints written so far are kept."
        in (folder / "runs" / "toy" / "default" / "seed_0.log").read_text()
    )


def test_threads_are_shared():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads_each(1) == cores
    assert threads_each(10_000) == 1


# --- rlhf ls, cp, version, help -----------------------------------------------------------------------------------


def test_ls_shows_every_recipe_and_config():
    output = CliRunner().invoke(app, ["ls"]).stdout
    for file in recipes_folder().glob("*.py"):
        assert re.search(rf"^{file.stem}: \w", output, re.MULTILINE)
    for file in recipes_folder().glob("configs/*/*.yaml"):
        assert re.search(rf"^  {file.stem} +\w", output, re.MULTILINE)


def test_cp_makes_a_recipe_of_ones_own(tmp_path, monkeypatch):
    recipes = sorted(recipes_folder().glob("*.py"))
    if not recipes:
        pytest.skip("no recipes yet")
    name = recipes[0].stem
    first = CliRunner().invoke(app, ["cp", name, str(tmp_path)])
    assert first.exit_code == 0, first.stderr
    assert (tmp_path / f"{name}.py").read_bytes() == recipes[0].read_bytes()
    copies = {file.name for file in tmp_path.glob(f"configs/{name}/*")}
    assert copies == {file.name for file in recipes_folder().glob(f"configs/{name}/*")}
    second = CliRunner().invoke(app, ["cp", name, str(tmp_path)])
    assert second.exit_code == 2
    assert "the file exists already" in second.stderr


def test_version():
    assert CliRunner().invoke(app, ["version"]).stdout == f"rlhf-toolkit {__version__}\n"


def test_help_names_every_verb():
    output = CliRunner().invoke(app, ["--help"]).stdout
    assert all(
        re.search(rf"^  {verb} ", output, re.MULTILINE) for verb in ("ls", "cp", "run", "explain", "table", "version")
    )


def test_an_unknown_verb_or_option_is_exit_code_2():
    assert CliRunner().invoke(app, ["rnu"]).exit_code == 2
    assert CliRunner().invoke(app, ["run", "toy", "--sedes", "1"]).exit_code == 2


# --- rlhf explain -------------------------------------------------------------------------------------------------


def test_explain_shows_every_setting_with_its_meaning(folder):
    text = RECIPE.replace("    x: float = 1.0\n", '    x: float = 1.0\n    """What is added."""\n')
    (folder / "toy.py").write_text(text, encoding="utf-8")
    result = rlhf("explain", "toy.py", "--config", "first", "run.seed=3")
    assert result.returncode == 0, result.stderr
    assert "# What is added.\nx: 2.0\n" in result.stdout
    (folder / "mine.yaml").write_text(result.stdout)
    assert yaml.safe_load(result.stdout) == {
        "run": {"seed": 3, "directory": None},
        "x": 2.0,
        "end": "well",
        "bad_seed": -1,
    }


def test_explain_writes_a_file_that_run_reads_back(tmp_path):
    class Group(Config):
        """A group."""

        names: list[str] = ["no", "1e-3"]
        """Names; see above."""

    class Whole(Config):
        """A whole."""

        algorithm: AlgorithmChoice = "ppo_rlhf"
        group: Group = Group()
        groups: list[Group] = [Group(), Group(names=[])]
        optional: Group | None = None

    file = tmp_path / "whole.yaml"
    file.write_text(explain_config(Whole()), encoding="utf-8")
    assert load_config(Whole, file) == Whole()


# --- rlhf table ---------------------------------------------------------------------------------------------------


def write_run(folder: Path, *, seed: int, metrics: dict[str, float], config: dict | None = None, seconds: float = 1.0):
    folder.mkdir(parents=True)
    summary = {"metrics": metrics, "seed": seed, "seconds": seconds, "recipe": "grpo", "config_name": "digits"}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"run": {"seed": seed, "directory": str(folder)}} | (config or {}))
    )


def test_table_groups_seeds_and_keeps_settings_apart(tmp_path):
    for seed, (first, second) in enumerate([(0.5, 0.8), (0.7, 0.9)]):
        write_run(tmp_path / f"a{seed}", seed=seed, metrics={"evaluation/accuracy": first}, config={"epochs": 1})
        write_run(tmp_path / f"b{seed}", seed=seed, metrics={"evaluation/accuracy": second}, config={"epochs": 2})
    # Sample standard deviations: |0.7 - 0.5| / sqrt 2 = 0.1414, |0.9 - 0.8| / sqrt 2 = 0.0707.
    assert make_table([tmp_path]).splitlines()[2:] == [
        "| grpo | digits (epochs=1) | 0.6 ± 0.141 (2) | 1 ± 0 (2) | 0, 1 |",
        "| grpo | digits (epochs=2) | 0.85 ± 0.0707 (2) | 1 ± 0 (2) | 0, 1 |",
    ]


def test_table_counts_a_run_once_though_named_twice(tmp_path):
    write_run(tmp_path / "a", seed=0, metrics={"evaluation/accuracy": 0.5})
    assert make_table([tmp_path, tmp_path / "a"]).splitlines()[2:] == ["| grpo | digits | 0.5 | 1 | 0 |"]


def test_table_shows_the_metrics_asked_for(tmp_path):
    write_run(tmp_path / "a", seed=0, metrics={"evaluation/accuracy": 0.5, "kl": 1234.5})
    write_run(tmp_path / "b", seed=1, metrics={"evaluation/accuracy": float("nan")})
    result = CliRunner().invoke(app, ["table", str(tmp_path), "--metric", "kl", "--metric", "accuracy"])
    assert result.exit_code == 0
    # Not every run has kl: n says so. A mean with NaN in it is NaN, and no spread is made up.
    assert result.stdout.splitlines()[2] == "| grpo | digits | 1234 (1) | nan (2) | 1 ± 0 (2) | 0, 1 |"


def test_table_reads_null_as_not_a_number(tmp_path):
    write_run(tmp_path / "a", seed=0, metrics={"explained_variance": None, "kl": 2.0})
    assert (
        make_table([tmp_path], metrics=["kl", "explained_variance"])
        .splitlines()[2]
        .startswith("| grpo | digits | 2 | nan |")
    )


def test_table_columns_of_one_iteration_and_of_each_seed(tmp_path):
    for seed, (before, after) in enumerate([(0.1, 0.8), (0.3, 0.9)]):
        run = tmp_path / f"run{seed}"
        write_run(run, seed=seed, metrics={"evaluation/accuracy": after}, config={"algorithm": {"preset": "grpo"}})
        (run / "metrics.jsonl").write_text(json.dumps({"iteration": 0, "evaluation/accuracy": before}) + "\n")
    columns = ["before=accuracy@0", "after=accuracy", "seeds' values=accuracy@each"]
    assert make_table([tmp_path], metrics=columns, row="algorithm.preset").splitlines() == [
        "| preset | before | after | seeds' values | seconds | seeds |",
        "| --- | --- | --- | --- | --- | --- |",
        "| grpo | 0.2 ± 0.141 (2) | 0.85 ± 0.0707 (2) | 0.8, 0.9 | 1 ± 0 (2) | 0, 1 |",
    ]
    assert make_table([tmp_path], metrics=["accuracy"], row="seed").splitlines()[2:] == [
        "| 0 | 0.8 | 1 |",
        "| 1 | 0.9 | 1 |",
    ]
    assert make_table([tmp_path], metrics=["accuracy"], row="config").splitlines()[2].startswith("| digits | 0.85")
    assert make_table([tmp_path], metrics=["accuracy"], row="preset=folder").splitlines()[::2][:2] == [
        "| preset | accuracy | seconds | seeds |",
        f"| {tmp_path.name} | 0.85 ± 0.0707 (2) | 1 ± 0 (2) | 0, 1 |",
    ]
    with pytest.raises(UserError, match="no run has this metric"):
        make_table([tmp_path], metrics=["accuracy@7"])
    with pytest.raises(UserError, match="not a column"):
        make_table([tmp_path], metrics=["accuracy@late"])
    with pytest.raises(UserError, match="no such setting"):
        make_table([tmp_path], row="algorithm.name")


def test_table_names_the_metrics_it_has_no_room_for(tmp_path):
    write_run(tmp_path / "a", seed=0, metrics={f"evaluation/metric_{i}": float(i) for i in range(8)})
    assert make_table([tmp_path]).splitlines()[-1] == (
        "Not shown: evaluation/metric_6, evaluation/metric_7; choose with --metric."
    )


def test_tables_of_a_markdown_file_are_written_from_their_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "a", seed=0, metrics={"evaluation/accuracy": 0.5})
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n<!-- rlhf table runs/* --metric accuracy -->\nold\n<!-- end of table -->\ntext\n"
        "<!-- rlhf table elsewhere/* -->\nkept\n<!-- end of table -->\n"
    )
    result = CliRunner().invoke(app, ["table", "--update", "page.md"])
    assert result.exit_code == 0
    assert page.read_text() == (
        "# Page\n<!-- rlhf table runs/* --metric accuracy -->\n"
        "| recipe | config | accuracy | seconds | seeds |\n| --- | --- | --- | --- | --- |\n"
        "| grpo | digits | 0.5 | 1 | 0 |\n<!-- end of table -->\ntext\n"
        "<!-- rlhf table elsewhere/* -->\nkept\n<!-- end of table -->\n"
    )
    assert "kept, no such runs here: elsewhere/*" in result.stdout
    page.write_text("<!-- rlhf table runs/* --metrics accuracy -->\n<!-- end of table -->\n")
    assert CliRunner().invoke(app, ["table", "--update", "page.md"]).exit_code == 2


@pytest.mark.parametrize("module", [markdown, tables])
def test_doctests(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_table_of_nothing(tmp_path):
    with pytest.raises(UserError, match="no finished run in this folder"):
        make_table([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        make_table([tmp_path / "nowhere"])


def test_table_of_a_broken_summary_names_the_file(tmp_path):
    (tmp_path / "summary.json").write_text('{"metrics": ')
    with pytest.raises(DataError, match=r"summary\.json: not the summary of a run"):
        make_table([tmp_path])


def test_table_of_an_unknown_metric(tmp_path):
    write_run(tmp_path / "a", seed=0, metrics={"evaluation/accuracy": 0.5})
    with pytest.raises(UserError, match="no run has this metric; got 'evaluation/loss'; expected one of"):
        make_table([tmp_path], metrics=["loss"])


def wait_for(file: Path, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.05)
