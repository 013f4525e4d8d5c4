"""CartPole PPO, ours against Stable-Baselines3: equal hyperparameters, environment, budget, one thread, taking turns.

    python benchmarks/classic.py                    # writes benchmarks/results/classic.{md,json}
    python benchmarks/classic.py --steps 20000 --repetitions 3

Both sides: CartPole-v1, 4 environments x 128 steps, minibatches of 128, 4 epochs, separate 2x64 tanh networks with
orthogonal weights, Adam 2.5e-4 (epsilon 1e-5), clip 0.2, gradient norm 0.5, discount 0.99, lambda 0.95, advantages
standardized per minibatch, no value clip, no entropy bonus. Stable-Baselines3 runs twice: over `make_vec_env`, as its
users call it, and over a plain `DummyVecEnv`, its fastest form (it has no use for CartPole's own vector form, which
resets on the next step). Ours runs through the loop that users run, files and final checkpoint included.

Time is wall time of the training call, after one warm-up of each side. A step is one that the policy acted in: our
vector environment's reset steps are not counted. Returns are greedy means over 20 episodes after training, one seed per
repetition.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and NumPy read it

import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from classic_rl.collector import CollectSteps
from classic_rl.environments import EnvironmentConfig
from classic_rl.episodes import make_collector
from classic_rl.evaluation import evaluate
from classic_rl.policy import ActorCritic
from rlhf.core.algorithm import AlgorithmConfig, Clipped, Gae, SquaredValueLoss
from rlhf.training.environment import describe_environment
from rlhf.training.learner import Learner
from rlhf.training.loop import optimize_policy
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig
from rlhf.training.update_config import UpdateConfig

ENVIRONMENT, NUM_ENVS, LENGTH, MINIBATCH, EPOCHS = "CartPole-v1", 4, 128, 128, 4
LEARNING_RATE, CLIP, GRADIENT_NORM, DISCOUNT, LAMBDA = 2.5e-4, 0.2, 0.5, 0.99, 0.95
RESULTS = Path(__file__).parent / "results"

Trial = tuple[float, float]
"""(environment steps per second, greedy mean return)."""


def ours(steps: int, seed: int) -> Trial:
    """Train and judge with this project."""
    environment = EnvironmentConfig(id=ENVIRONMENT, num_envs=NUM_ENVS)
    algorithm = AlgorithmConfig(
        advantages=Gae(discount=DISCOUNT, gae_lambda=LAMBDA, standardize="minibatch"),
        surrogate=Clipped(clip_low=CLIP, clip_high=CLIP),
        # Ours is coefficient x 1/2 (V - R)^2, Stable-Baselines3's vf_coef x (V - R)^2 with vf_coef 0.5.
        value_loss=SquaredValueLoss(coefficient=1.0),
        epochs=EPOCHS,
        minibatches=NUM_ENVS * LENGTH // MINIBATCH,
    )
    update = UpdateConfig(
        learning_rate=LEARNING_RATE,
        optimizer="adam",
        max_grad_norm=GRADIENT_NORM,
        shuffle="actions",
        flatten_parameters=True,
    )
    spaces = gymnasium.make(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as folder:
        settings = RunConfig(directory=str(Path(folder) / "run"), seed=seed, log_every=10**9, progress_bar=False)
        started = time.perf_counter()
        policy = ActorCritic(spaces.observation_space, spaces.action_space, seed=seed)
        learner = Learner(policy, algorithm, update, seed=seed)
        collector = make_collector(CollectSteps(steps=LENGTH), policy, environment, algorithm, seed=seed)
        iterations = -(-steps // (NUM_ENVS * LENGTH))
        optimize_policy(collector, learner, Run(settings, resolved=algorithm, iterations=iterations, recipe="classic"))
        seconds = time.perf_counter() - started
    return collector.total_env_steps / seconds, evaluate(policy, environment)["return_mean"]


def stable_baselines(make: Callable[[int], VecEnv]) -> Callable[[int, int], Trial]:
    """Return a trial of Stable-Baselines3 over the environments that `make(seed)` makes."""

    def trial(steps: int, seed: int) -> Trial:
        started = time.perf_counter()
        model = PPO(
            "MlpPolicy",
            make(seed),
            learning_rate=LEARNING_RATE,
            n_steps=LENGTH,
            batch_size=MINIBATCH,
            n_epochs=EPOCHS,
            gamma=DISCOUNT,
            gae_lambda=LAMBDA,
            clip_range=CLIP,
            ent_coef=0.0,
            vf_coef=0.5,
            max_grad_norm=GRADIENT_NORM,
            seed=seed,
            device="cpu",
        )
        model.learn(total_timesteps=steps)
        seconds = time.perf_counter() - started
        judge = make_vec_env(ENVIRONMENT, n_envs=20, seed=1_000_000)
        returns, _ = evaluate_policy(model, judge, n_eval_episodes=20, deterministic=True)
        return model.num_timesteps / seconds, float(returns)

    return trial


SIDES: dict[str, Callable[[int, int], Trial]] = {
    "ours": ours,
    "SB3 make_vec_env": stable_baselines(lambda seed: make_vec_env(ENVIRONMENT, n_envs=NUM_ENVS, seed=seed)),
    "SB3 DummyVecEnv": stable_baselines(lambda _: DummyVecEnv([lambda: gymnasium.make(ENVIRONMENT)] * NUM_ENVS)),
}


def compare(steps: int, repetitions: int) -> dict[str, list[Trial]]:
    """Let the sides take turns."""
    trials: dict[str, list[Trial]] = {name: [] for name in SIDES}
    for repetition in range(-1, repetitions):
        for name, trial in SIDES.items():
            if repetition < 0:
                trial(2 * NUM_ENVS * LENGTH, 0)  # warm-up: imports, allocator, branch caches
                continue
            trials[name].append(trial(steps, repetition))
            speed, returns = trials[name][-1]
            print(f"repetition {repetition}  {name:<17} {speed:8.0f} env-steps/s  return {returns:6.1f}", flush=True)
    return trials


def table(trials: dict[str, list[Trial]], steps: int) -> str:
    """Markdown with medians, ratios of medians and returns."""
    from stable_baselines3 import __version__ as version

    speeds = {name: [speed for speed, _ in rows] for name, rows in trials.items()}
    lines = [
        f"# CartPole-v1 PPO against Stable-Baselines3 {version}, one thread, {steps:,} steps per run",
        "",
        "Written by `python benchmarks/classic.py`; the hyperparameters stand in that file.",
        "",
        "| side | env-steps/s, median (min to max) | ours / this | greedy return, mean over seeds | per seed |",
        "|---|---|---|---|---|",
    ]
    for name, rows in trials.items():
        returns = [value for _, value in rows]
        ratio = median(mine / theirs for mine, theirs in zip(speeds["ours"], speeds[name], strict=True))
        lines.append(
            f"| {name} | {median(speeds[name]):,.0f} ({min(speeds[name]):,.0f} to {max(speeds[name]):,.0f}) "
            f"| {ratio:.2f} | {mean(returns):.1f} | {', '.join(f'{value:.0f}' for value in returns)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50_000, help="environment steps per run")
    parser.add_argument("--repetitions", type=int, default=5, help="runs of each side, one seed each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trials = compare(arguments.steps, arguments.repetitions)
    text = table(trials, arguments.steps)
    print(f"\n{text}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "classic.md").write_text(text, encoding="utf-8")
    record = {"steps": arguments.steps, "trials": trials, "environment": describe_environment()}
    (arguments.output / "classic.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
