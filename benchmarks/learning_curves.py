"""Learning curves of Stable-Baselines3 beside ours: equal environment, hyperparameters, steps, and one way to count.

    rlhf run off_policy --config sac_halfcheetah --seeds 0,1,2 schedule.total_steps=100000 evaluation.episodes=20
    python benchmarks/learning_curves.py sac_halfcheetah --steps 100000 --seeds 0 1 2

The second command trains Stable-Baselines3 with the numbers of the recipe's config, keeps what it measures in
benchmarks/results/learning_curves.json, and writes learning_curves.md from that and from the runs of the first. Both
sides: mean return of the training episodes that ended within each tenth of the steps, exploration included, and the
greedy return of the final policy over 20 episodes. One thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and NumPy read it

import gymnasium
import torch
from classic_cases import CASES, EPISODES, sb3_off_policy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor

RESULTS = Path(__file__).parent / "results"
TENTHS = 10


def train_theirs(config: Any, *, seed: int) -> dict[str, Any]:
    """Train Stable-Baselines3; returns its curve, its greedy return and its CPU seconds."""
    kind, settings = sb3_off_policy(config)
    identifier, steps = config.environment.id, config.schedule.total_steps
    monitor = Monitor(gymnasium.make(identifier))
    started = time.process_time()
    model = kind("MlpPolicy", monitor, seed=seed, device="cpu", **settings)
    model.learn(total_timesteps=steps)
    seconds = time.process_time() - started
    judge = make_vec_env(identifier, n_envs=1, seed=1_000_000, env_kwargs={"render_mode": None})
    greedy, _ = evaluate_policy(model, judge, n_eval_episodes=EPISODES, deterministic=True)
    returns, lengths = monitor.get_episode_rewards(), monitor.get_episode_lengths()
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    curve = [
        [one for one, end in zip(returns, ends, strict=True) if steps * k < end * TENTHS <= steps * (k + 1)]
        for k in range(TENTHS)
    ]
    return {"curve": [mean(part) if part else None for part in curve], "greedy": float(greedy), "cpu_seconds": seconds}


def read_ours(directory: Path, *, steps: int) -> dict[str, Any] | None:
    """The same of a finished run of `rlhf run off_policy`; None where there is none of so many steps."""
    if not (directory / "summary.json").exists():
        return None
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    if lines[-1]["rollout/total_env_steps"] != steps:
        return None
    sums = [[0.0, 0.0] for _ in range(TENTHS)]
    for line in lines:
        part = sums[min(TENTHS - 1, int((line["rollout/total_env_steps"] - 1) * TENTHS / steps))]
        part[0] += line.get("rollout/return_mean", 0.0) * line["rollout/episodes"]
        part[1] += line["rollout/episodes"]
    greedy = lines[-1]["evaluation/return_mean"]
    return {"curve": [total / count if count else None for total, count in sums], "greedy": greedy}


def report(kept: dict[str, Any], runs: Path) -> str:
    """Write every comparison as a table of curves."""
    text = ["# Learning curves beside Stable-Baselines3's", "", "Written by `python benchmarks/learning_curves.py`."]
    text += ["", "Mean return of the training episodes in each tenth of the steps, over seeds (standard deviation)."]
    for name, entry in kept.items():
        steps, theirs = entry["steps"], list(entry["seeds"].values())
        ours = [read_ours(folder, steps=steps) for folder in sorted((runs / "off_policy" / name).glob("seed_*"))]
        text += ["", f"## {name}, {steps:,} steps", ""]
        header = [f"to {steps * (k + 1) // TENTHS // 1000}k" for k in range(TENTHS)]
        text += ["| side | seeds | " + " | ".join(header) + " | greedy, each seed |", "|" + "---|" * (TENTHS + 3)]
        for side, trials in (("ours", [one for one in ours if one]), ("Stable-Baselines3", theirs)):
            cells = [_summary([one["curve"][k] for one in trials]) for k in range(TENTHS)]
            each = ", ".join(f"{one['greedy']:.0f}" for one in trials)
            text.append(f"| {side} | {len(trials)} | " + " | ".join(cells) + f" | {each} |")
    return "\n".join(text) + "\n"


def _summary(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{mean(known):.0f}" + (f" ({stdev(known):.0f})" if len(known) > 1 else "")


def main() -> None:
    """Train their side for the cases and seeds asked for; results of others are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[[], *(name for name in CASES if CASES[name].with_sb3)])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where our runs lie")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = RESULTS / "learning_curves.json"
    for name in arguments.cases:
        case = CASES[name]
        config = type(case)(case.recipe, case.config, case.target).load(steps=arguments.steps)  # without its overrides
        for seed in arguments.seeds:
            measured = train_theirs(config, seed=seed)
            kept = json.loads(file.read_text()) if file.exists() else {}  # another process may have written
            entry = kept.get(name, {})
            if entry.get("steps") != arguments.steps:
                entry = {"steps": arguments.steps, "seeds": {}}
            entry["seeds"][str(seed)] = measured
            file.write_text(json.dumps(kept | {name: entry}, indent=1))
            print(name, seed, measured, flush=True)
    kept = json.loads(file.read_text()) if file.exists() else {}
    (RESULTS / "learning_curves.md").write_text(report(kept, arguments.runs))


if __name__ == "__main__":
    main()
