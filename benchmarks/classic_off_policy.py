"""DQN, ours against Stable-Baselines3: equal hyperparameters, environment, budget, one thread, taking turns.

    python benchmarks/classic_off_policy.py         # writes benchmarks/results/classic_off_policy.{md,json}
    python benchmarks/classic_off_policy.py --config dqn_acrobot --steps 20000 --repetitions 3

Both sides take their hyperparameters from a config of `recipes/configs/off_policy`: one environment, a 2-layer ReLU
network with torch's initial weights, Adam with epsilon 1e-8, Huber loss, gradient norm 10, hard target copies, uniform
replay. Ours runs through the loop that users run, metrics, files and final checkpoint included. Two clocks are shown:
CPU time of the process, which other work on the machine disturbs least, and wall time. Returns are greedy means over 20
episodes after training, one seed per repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and NumPy read it

import gymnasium
from stable_baselines3 import DQN
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from classic_rl.agents import make_agent
from classic_rl.evaluation import evaluate_agent
from classic_rl.off_policy import learn_off_policy
from classic_rl.threads import limit_threads
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.training.environment import describe_environment
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig

ROOT = Path(__file__).parent.parent
SIDES = ("ours", "SB3")


class Trial(NamedTuple):
    """One training run."""

    cpu_speed: float
    """Environment steps per second of CPU time."""
    wall_speed: float
    """Environment steps per second of wall time."""
    greedy_return: float
    """Mean over 20 episodes after training."""


def ours(config: Any, seed: int) -> Trial:
    """Train and judge with this project."""
    with tempfile.TemporaryDirectory() as folder:
        settings = RunConfig(directory=f"{folder}/run", seed=seed, log_every=10**9, progress_bar=False)
        started = time.process_time(), time.perf_counter()
        agent = make_agent(config.agent, environment=config.environment, schedule=config.schedule, seed=seed)
        run = Run(settings, resolved=config, iterations=config.schedule.iterations, recipe="off_policy")
        learn_off_policy(agent, config.environment, config.schedule, run)
        seconds = time.process_time() - started[0], time.perf_counter() - started[1]
    steps = config.schedule.total_steps
    return Trial(steps / seconds[0], steps / seconds[1], evaluate_agent(agent, config.environment)["return_mean"])


def stable_baselines(config: Any, seed: int) -> Trial:
    """Train and judge with Stable-Baselines3's DQN in its fastest form, over a plain `DummyVecEnv`."""
    agent, schedule = config.agent, config.schedule
    started = time.process_time(), time.perf_counter()
    model = DQN(
        "MlpPolicy",
        DummyVecEnv([lambda: gymnasium.make(config.environment.id)]),
        learning_rate=agent.optimizer.learning_rate,
        buffer_size=agent.replay.capacity,
        learning_starts=schedule.start_steps,
        batch_size=agent.batch_size,
        gamma=agent.discount,
        train_freq=schedule.train_every,
        gradient_steps=schedule.updates_per_train or -1,
        target_update_interval=agent.target.every_steps,
        exploration_fraction=agent.exploration.fraction,
        exploration_final_eps=agent.exploration.final,
        policy_kwargs={"net_arch": agent.network.hidden_sizes},
        seed=seed,
        device="cpu",
    )
    model.learn(total_timesteps=schedule.total_steps)
    seconds = time.process_time() - started[0], time.perf_counter() - started[1]
    judge = make_vec_env(config.environment.id, n_envs=20, seed=1_000_000)
    returns, _ = evaluate_policy(model, judge, n_eval_episodes=20, deterministic=True)
    return Trial(schedule.total_steps / seconds[0], schedule.total_steps / seconds[1], float(returns))


def compare(load: Any, steps: int | None, repetitions: int) -> dict[str, list[Trial]]:
    """Let the sides take turns, after one short warm-up each."""
    trials: dict[str, list[Trial]] = {side: [] for side in SIDES}
    for repetition in range(-1, repetitions):
        overrides = ["schedule.total_steps=2000"] if repetition < 0 else []
        overrides += [f"schedule.total_steps={steps}"] if steps and repetition >= 0 else []
        config = load(overrides)
        for side in SIDES:
            trial = (ours if side == "ours" else stable_baselines)(config, max(0, repetition))
            if repetition >= 0:
                trials[side].append(trial)
                print(
                    f"repetition {repetition}  {side:<4}  {trial.cpu_speed:7.0f} steps/s of CPU  "
                    f"{trial.wall_speed:7.0f} steps/s  return {trial.greedy_return:7.1f}",
                    flush=True,
                )
    return trials


def table(trials: dict[str, list[Trial]], name: str, steps: int) -> str:
    """Markdown with medians, ratios of pairs and returns."""
    from stable_baselines3 import __version__ as version

    lines = [
        f"# {name} against Stable-Baselines3 {version}, one thread, {steps:,} steps per run",
        "",
        f"Written by `python benchmarks/classic_off_policy.py --config {name} --steps {steps}`.",
        "",
        "| side | steps/s of CPU, median | ours / this | steps/s of wall time | ours / this | greedy return | each |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, rows in trials.items():
        cpu = median(mine.cpu_speed / row.cpu_speed for mine, row in zip(trials["ours"], rows, strict=True))
        wall = median(mine.wall_speed / row.wall_speed for mine, row in zip(trials["ours"], rows, strict=True))
        returns = [row.greedy_return for row in rows]
        lines.append(
            f"| {side} | {median(row.cpu_speed for row in rows):,.0f} | {cpu:.2f} "
            f"| {median(row.wall_speed for row in rows):,.0f} | {wall:.2f} "
            f"| {mean(returns):.1f} | {', '.join(f'{value:.0f}' for value in returns)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="dqn_cartpole", help="a config of recipes/configs/off_policy, agent dqn")
    parser.add_argument("--steps", type=int, default=None, help="environment steps per run; default: the config's")
    parser.add_argument("--repetitions", type=int, default=3, help="runs of each side, one seed each")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    arguments = parser.parse_args()
    limit_threads(1)
    schema = import_recipe(find_recipe("off_policy")).CONFIG
    file = ROOT / "recipes" / "configs" / "off_policy" / f"{arguments.config}.yaml"

    def load(overrides: list[str]) -> Any:
        return load_config(schema, file, overrides)

    trials = compare(load, arguments.steps, arguments.repetitions)
    steps = arguments.steps or load([]).schedule.total_steps
    text = table(trials, arguments.config, steps)
    print(f"\n{text}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    name = "classic_off_policy" if arguments.config == "dqn_cartpole" else f"classic_off_policy_{arguments.config}"
    (arguments.output / f"{name}.md").write_text(text, encoding="utf-8")
    record = {"config": arguments.config, "steps": steps, "trials": trials, "environment": describe_environment()}
    (arguments.output / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
