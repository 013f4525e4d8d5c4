"""SAC and TD3, ours against Stable-Baselines3: equal settings, environment, steps, one thread, taking turns.

    python benchmarks/classic_continuous.py                       # about 4 minutes on a quiet core
    python benchmarks/classic_continuous.py --environments HalfCheetah-v5 --steps 100000 --evaluate-every 10000

Both sides: one environment, 2 x 256 ReLU units, Adam 3e-4, batches of 256, replay of 100,000, discount .99, targets'
rate .005, one update per step after 500 random steps; SAC with learnt temperature, TD3 with noise .1 and a delay of 2.
Each trains for `--turn` steps, then the other: whatever else the machine does falls on both. Time is CPU time
of acting, environment, storing and updating. Turns with random steps only are not counted. Ours runs through the loop
that users run (`classic_rl.off_policy.Player`); neither side logs, evaluates or saves inside a turn.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and NumPy read it

import gymnasium
import numpy as np
import stable_baselines3
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.noise import NormalActionNoise

from classic_rl.agents import make_agent
from classic_rl.environments import EnvironmentConfig
from classic_rl.evaluation import EvaluationConfig, evaluate_agent
from classic_rl.off_policy import OffPolicySchedule, Player
from classic_rl.sac import SACConfig
from classic_rl.td3 import TD3Config
from rlhf.training.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
START_STEPS, CAPACITY, EPISODES = 500, 100_000, 10
LEARNING_RATE, HIDDEN = 3e-4, [256, 256]


class Ours:
    """This project."""

    def __init__(self, algorithm: str, environment: str, *, steps: int, seed: int) -> None:
        settings: dict[str, Any] = {
            "learning_rate": LEARNING_RATE,
            "network": {"hidden_sizes": HIDDEN},
            "replay": {"capacity": CAPACITY},
        }
        config = SACConfig(**settings) if algorithm == "sac" else TD3Config(**settings)
        schedule = OffPolicySchedule(total_steps=steps, start_steps=START_STEPS)
        self.environment = EnvironmentConfig(id=environment, num_envs=1, vectorization="sync")
        self.agent = make_agent(config, environment=self.environment, schedule=schedule, seed=seed)
        self.player = Player(self.agent, self.environment, schedule, seed=seed)

    def train(self, steps: int) -> None:
        """Make `steps` more steps."""
        self.player.play_until(self.player.env_steps + steps)

    def judge(self) -> float:
        """Return the greedy mean return."""
        return evaluate_agent(self.agent, self.environment, EvaluationConfig(episodes=EPISODES))["return_mean"]


class StableBaselines3:
    """Stable-Baselines3, as its users call it."""

    def __init__(self, algorithm: str, environment: str, *, steps: int, seed: int) -> None:
        del steps
        single = Monitor(gymnasium.make(environment))
        self.environment, settings = environment, {}
        if algorithm == "td3":
            size = int(np.prod(single.action_space.shape))
            settings["action_noise"] = NormalActionNoise(np.zeros(size), 0.1 * np.ones(size))
        self.model = getattr(stable_baselines3, algorithm.upper())(
            "MlpPolicy",
            single,
            learning_rate=LEARNING_RATE,
            buffer_size=CAPACITY,
            learning_starts=START_STEPS,
            batch_size=256,
            policy_kwargs={"net_arch": HIDDEN},
            device="cpu",
            seed=seed,
            **settings,
        )

    def train(self, steps: int) -> None:
        """Make `steps` more steps."""
        self.model.learn(steps, reset_num_timesteps=False, log_interval=10**9)

    def judge(self) -> float:
        """Return the greedy mean return."""
        judged = Monitor(gymnasium.make(self.environment))
        return float(evaluate_policy(self.model, judged, n_eval_episodes=EPISODES)[0])


def race(algorithm: str, environment: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Let both sides take turns until the steps are made."""
    sides = {
        "ours": Ours(algorithm, environment, steps=arguments.steps, seed=arguments.seed),
        "stable_baselines3": StableBaselines3(algorithm, environment, steps=arguments.steps, seed=arguments.seed),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    returns: dict[str, list[tuple[int, float]]] = {name: [] for name in sides}
    made = 0
    while made < arguments.steps:
        for name, side in sides.items():
            started = time.thread_time()
            side.train(arguments.turn)
            if made >= START_STEPS:
                seconds[name].append(time.thread_time() - started)
        made += arguments.turn
        if arguments.evaluate_every and made % arguments.evaluate_every < arguments.turn:
            for name, side in sides.items():
                returns[name].append((made, side.judge()))
    milliseconds = {name: 1000 * median(values) / arguments.turn for name, values in seconds.items()}
    pairs = zip(seconds["stable_baselines3"], seconds["ours"], strict=True)
    return {
        "algorithm": algorithm,
        "environment": environment,
        "steps": made,
        "seed": arguments.seed,
        "ms_per_step": milliseconds,
        "speedup": median(theirs / own for theirs, own in pairs),
        "returns": returns,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| algorithm | environment | steps | ours, ms per step | Stable-Baselines3 | speedup | returns (both) |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        own, theirs = (row["ms_per_step"][name] for name in ("ours", "stable_baselines3"))
        last = [row["returns"][name][-1][1] if row["returns"][name] else None for name in row["ms_per_step"]]
        judged = "not judged" if None in last else " / ".join(f"{value:.0f}" for value in last)
        cells = [row["algorithm"], row["environment"], row["steps"], f"{own:.2f}", f"{theirs:.2f}"]
        lines.append("| " + " | ".join([*map(str, cells), f"{row['speedup']:.2f}", judged]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Race, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", nargs="+", default=["sac", "td3"])
    parser.add_argument("--environments", nargs="+", default=["Pendulum-v1", "HalfCheetah-v5"])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--turn", type=int, default=50, help="steps of one side before the other's turn")
    parser.add_argument("--evaluate-every", type=int, default=0, help="steps between greedy evaluations; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "classic_continuous")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for environment in arguments.environments:
        for algorithm in arguments.algorithms:
            rows.append(race(algorithm, environment, arguments))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    written = {"machine": describe_environment(), "rows": rows}
    arguments.output.with_suffix(".json").write_text(
        json.dumps(written, indent=2, default=str) + "\n", encoding="utf-8"
    )
    note = f"Command: `python benchmarks/classic_continuous.py --steps {arguments.steps} --seed {arguments.seed}`"
    arguments.output.with_suffix(".md").write_text(f"{table(rows)}\n\n{note}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
