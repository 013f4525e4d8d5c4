"""What sb3-contrib's TRPO reaches with the settings of a recipe's config, judged as `rlhf run trpo` judges.

    pip install sb3-contrib
    python benchmarks/trpo_returns.py lunarlander lunarlandercontinuous --seeds 0 1 2

Prints the greedy return over 100 episodes and the mean of the last 100 training episodes; one thread.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import mean
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and NumPy read it

import torch
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecNormalize

from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs" / "trpo"
EPISODES = 100


def train(config: Any, *, seed: int) -> tuple[float, float]:
    """Train and judge one seed."""
    from sb3_contrib import TRPO  # pyright: ignore[reportMissingImports]

    algorithm, environment = config.algorithm, config.environment
    settings = {"env_kwargs": {"render_mode": None}}
    environments: Any = make_vec_env(environment.id, n_envs=environment.num_envs, seed=seed, **settings)
    if environment.normalize_observations:
        environments = VecNormalize(
            environments, norm_reward=environment.normalize_rewards, gamma=algorithm.advantages.discount
        )
    rollout = environment.num_envs * config.collect.steps
    model = TRPO(
        "MlpPolicy",
        environments,
        n_steps=config.collect.steps,
        gamma=algorithm.advantages.discount,
        gae_lambda=algorithm.advantages.gae_lambda,
        learning_rate=algorithm.critic.learning_rate,
        n_critic_updates=algorithm.critic.epochs,
        batch_size=rollout // algorithm.critic.minibatches,
        cg_damping=algorithm.damping,
        target_kl=algorithm.max_kl,
        seed=seed,
        device="cpu",
    )
    model.learn(config.iterations * rollout)
    judge: Any = make_vec_env(environment.id, n_envs=10, seed=1_000_000, **settings)
    if isinstance(environments, VecNormalize):
        judge = VecNormalize(judge, training=False, norm_reward=False)
        judge.obs_rms = environments.obs_rms
    greedy, _ = evaluate_policy(model, judge, n_eval_episodes=EPISODES, deterministic=True)
    return float(greedy), mean(episode["r"] for episode in model.ep_info_buffer)


def main() -> None:
    """Train every config with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", choices=sorted(file.stem for file in CONFIGS.glob("*.yaml")))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    schema = import_recipe(find_recipe("trpo")).CONFIG
    for name in arguments.configs:
        for seed in arguments.seeds:
            greedy, training = train(load_config(schema, CONFIGS / f"{name}.yaml", []), seed=seed)
            print(f"{name} seed {seed}: greedy {greedy:.1f}, last 100 training episodes {training:.1f}", flush=True)


if __name__ == "__main__":
    main()
