"""Classic control against Stable-Baselines3 and CleanRL: equal environment, hyperparameters, steps; one thread each.

    python benchmarks/classic.py                                  # every case, three seeds: about half an hour
    python benchmarks/classic.py ppo_cartpole --seeds 0 1 2 3 4
    python benchmarks/classic.py --cleanrl cleanrl-0.4.8/cleanrl  # with CleanRL's scripts; classic_cleanrl.py says how

The cases stand in `classic_cases.py`, each a recipe's config. The sides of a case take turns, seed by seed, after one
short warm-up. Stable-Baselines3 runs over a plain `DummyVecEnv`, its fastest form, and where that makes a difference
also over `make_vec_env`, as its users call it. Ours runs through the loop that users run, files and final checkpoint
included. A step is one that the policy acted in: the reset steps of our vector environments are not counted.

Results are kept in benchmarks/results/classic.json trial by trial; a further call adds its seeds, or replaces them, and
writes classic.md from all of them. Two clocks are kept: CPU time of the process, which other work on the machine
disturbs least, and wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and NumPy read it

import stable_baselines3
from classic_cases import CASES, Case, Trial, ours, plain, stable_baselines, steps_of, usual

from classic_rl.environments import make_environments
from classic_rl.threads import limit_threads
from rlhf.training.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
SIDES = {"ours": "ours", "plain": "SB3 DummyVecEnv", "usual": "SB3 make_vec_env", "cleanrl": "CleanRL"}


def sides_of(case: Case, folder: Path | None) -> list[str]:
    """Who takes part."""
    sides = ["ours"]
    if case.with_sb3:
        sides += ["plain", "usual"] if case.recipe == "on_policy" else ["plain"]
    return [*sides, "cleanrl"] if case.cleanrl is not None and folder is not None else sides


def run_side(side: str, case: Case, config: Any, seed: int, folder: Path | None) -> Trial:
    """One trial."""
    steps = steps_of(case, config)
    match side:
        case "ours":
            return ours(case, config, seed)
        case "cleanrl":
            return cleanrl(case, config.environment.id, steps=steps, seed=seed, folder=folder)
    return stable_baselines(case, config, seed, make=plain if side == "plain" else usual, total_steps=steps)


def cleanrl(case: Case, identifier: str, *, steps: int, seed: int, folder: Path | None) -> Trial:
    """One trial of a CleanRL script in a process of its own."""
    assert folder is not None
    assert case.cleanrl is not None
    script, *arguments = case.cleanrl.split()
    command = [sys.executable, str(Path(__file__).with_name("classic_cleanrl.py")), str((folder / script).resolve())]
    command += ["--gym-id", identifier, "--total-timesteps", str(steps), "--seed", str(seed + 1), "--cuda", "False"]
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [*command, *arguments], cwd=elsewhere, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    return Trial(**json.loads(done.stdout.decode().splitlines()[-1]))


def compare(name: str, arguments: argparse.Namespace, record: dict[str, Any]) -> Iterator[int]:
    """Let the sides of a case take turns, and keep what comes out; yields each seed when all have run."""
    case = CASES[name]
    sides = sides_of(case, arguments.cleanrl)
    if not arguments.no_warm_up:
        warm = case.load(steps=2000)
        for side in sides:
            if side != "cleanrl":
                run_side(side, case, warm, 0, arguments.cleanrl)
    config = case.load(steps=arguments.steps)
    for seed in arguments.seeds:
        trials = {side: run_side(side, case, config, seed, arguments.cleanrl) for side in sides}
        for side, trial in trials.items():
            record.setdefault(name, {}).setdefault(side, {})[str(seed)] = trial._asdict()
            speed, cpu = trial.steps / trial.wall_seconds, trial.steps / trial.cpu_seconds
            print(
                f"{name:<22} seed {seed}  {SIDES[side]:<17} {speed:8.0f} steps/s {cpu:8.0f} of CPU  "
                f"return {trial.greedy_return:8.1f}",
                flush=True,
            )
        yield seed


def row(name: str, side: str, record: dict[str, Any]) -> str:
    """One line of the table: medians over seeds, and of the ratios of the same seed's runs."""
    trials, ours_by_seed = record[name][side], record[name]["ours"]
    speed = {seed: one["steps"] / one["wall_seconds"] for seed, one in trials.items()}
    cells = [f"{median(speed.values()):,.0f}"]
    for clock in ("cpu_seconds", "wall_seconds"):
        ratios = [
            (trials[seed][clock] / trials[seed]["steps"]) / (own[clock] / own["steps"])
            for seed, own in ours_by_seed.items()
            if seed in trials
        ]
        cells.append("1" if side == "ours" else f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    returns = [one["greedy_return"] for one in trials.values()]
    cells += [f"{mean(returns):.1f}", ", ".join(f"{value:.0f}" for value in returns)]
    steps = next(iter(trials.values()))["steps"]
    target = f"{CASES[name].target:g}" if side != "ours" else ""
    return f"| {name} | {steps:,} | {SIDES[side]} | " + " | ".join(cells) + f" | {target} |"


def table(record: dict[str, Any]) -> str:
    """Markdown of everything measured so far."""
    lines = [
        f"# Classic control against Stable-Baselines3 {stable_baselines3.__version__} and CleanRL 0.4.8, one thread",
        "",
        "Written by `python benchmarks/classic.py CASE --seeds ...`; the hyperparameters stand in `classic_cases.py`.",
        "",
        "| case | steps | side | steps/s | theirs / ours, CPU time | theirs / ours, wall time | greedy return | each "
        "| wanted |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in CASES:
        lines += [row(name, side, record) for side in SIDES if side in record.get(name, {})]
    return "\n".join(lines) + "\n"


def time_environment(case: Case, *, steps: int = 20_000) -> float:
    """Microseconds of CPU time that a step of one environment takes alone, with random actions, as ours steps it."""
    environments = make_environments(case.load(steps=None).environment)
    environments.reset(seed=0)
    environments.action_space.seed(0)
    actions = [environments.action_space.sample() for _ in range(steps // environments.num_envs)]
    started = time.process_time()
    for action in actions:
        environments.step(action)
    seconds = time.process_time() - started
    environments.close()
    return seconds / (len(actions) * environments.num_envs) * 1e6


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="which; all by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run of each side per seed")
    parser.add_argument("--steps", type=int, default=None, help="environment steps per run instead of the case's own")
    parser.add_argument("--cleanrl", type=Path, default=None, help="folder of CleanRL's scripts")
    parser.add_argument("--no-warm-up", action="store_true", help="skip the short first run of each side")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--environment-alone", action="store_true", help="only time the environments' own steps")
    arguments = parser.parse_args()
    limit_threads(1)
    if arguments.environment_alone:
        for name in arguments.cases or CASES:
            print(f"{name:<22} {time_environment(CASES[name]):.1f} us of CPU time a step of the environment alone")
        return
    file = arguments.output / "classic.json"
    written = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    record = written.get("cases", {})
    for name in arguments.cases or CASES:
        for _ in compare(name, arguments, record):
            arguments.output.mkdir(parents=True, exist_ok=True)
            kept = {"environment": describe_environment(), "cases": record}
            file.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
            (arguments.output / "classic.md").write_text(table(record), encoding="utf-8")
    print(f"\n{table(record)}")


if __name__ == "__main__":
    main()
