"""What `benchmarks/classic.py` compares: each case is one of the recipes' configs, which every side is given alike.

`ours` trains as `rlhf run` does, files and final checkpoint included. Stable-Baselines3 is called with the same
numbers, each translated once, here. CleanRL's scripts take what their arguments offer.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import stable_baselines3 as sb3
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch import nn

from classic_rl.agents import make_agent
from classic_rl.collector import CollectSteps
from classic_rl.environments import make_environments
from classic_rl.episodes import make_collector
from classic_rl.evaluation import evaluate, evaluate_agent
from classic_rl.off_policy import learn_off_policy
from classic_rl.policy import ActorCritic
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config
from rlhf.training.learner import Learner
from rlhf.training.loop import optimize_policy
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs"
EPISODES = 20
CLOCKS = time.process_time, time.perf_counter


class Trial(NamedTuple):
    """One training run of one side."""

    steps: int
    """Environment steps in which the policy acted."""
    cpu_seconds: float
    """Of the process."""
    wall_seconds: float
    """Of building and training, not of importing or judging."""
    greedy_return: float
    """Mean of 20 episodes after training."""


@dataclass(frozen=True)
class Case:
    """One comparison."""

    recipe: str
    """on_policy or off_policy."""
    config: str
    """Name of the recipe's config."""
    target: float
    """What the project wants to reach: their time / ours."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Of the config."""
    cleanrl: str | None = None
    """CleanRL's script, and its arguments but for the environment, the steps and the seed."""
    with_sb3: bool = True

    def load(self, *, steps: int | None) -> Any:
        """The config, for about `steps` environment steps."""
        overrides = [f"{name}={value}" for name, value in self.overrides.items()]
        schema = import_recipe(find_recipe(self.recipe)).CONFIG
        config = load_config(schema, CONFIGS / self.recipe / f"{self.config}.yaml", overrides)
        if steps is None:
            return config
        if self.recipe == "on_policy":
            iterations = max(1, steps // (config.environment.num_envs * config.collect.steps))
            return config.model_copy(update={"iterations": iterations})
        return config.model_copy(update={"schedule": config.schedule.model_copy(update={"total_steps": steps})})


def steps_of(case: Case, config: Any) -> int:
    """Environment steps of a config."""
    if case.recipe == "off_policy":
        return config.schedule.total_steps
    return config.iterations * config.environment.num_envs * config.collect.steps


_CARTPOLE = {
    "environment.num_envs": 4, "collect.steps": 128, "algorithm.epochs": 4, "algorithm.minibatches": 4,
    "iterations": 97,
    "algorithm.advantages.discount": 0.99, "algorithm.advantages.gae_lambda": 0.95,
    "algorithm.value_loss.coefficient": 1.0, "algorithm.entropy_coef": 0.01, "update.learning_rate": 2.5e-4,
    "update.clip_schedule": "constant",
}  # fmt: skip
_SMALL = {"schedule.total_steps": 5000, "schedule.start_steps": 500, "agent.replay.capacity": 100_000}
_SMALLER = _SMALL | {"schedule.total_steps": 2500}
_LATE = "--learning-starts 500 --buffer-size 100000"
CASES = {
    "ppo_cartpole": Case(
        "on_policy", "cartpole_ppo", 3.0, _CARTPOLE,
        cleanrl="ppo.py --learning-rate 2.5e-4 --n-minibatch 4 --num-envs 4 --num-steps 128 --clip-vloss False "
        "--vf-coef 1.0",
    ),
    "ppo_lunarlander": Case(
        "on_policy", "lunarlander_ppo", 3.0, {"iterations": 6},
        cleanrl="ppo.py --learning-rate 3e-4 --n-minibatch 256 --num-envs 16 --num-steps 1024 --gamma 0.999 "
        "--gae-lambda 0.98 --clip-vloss False --anneal-lr False --vf-coef 1.0",
    ),
    "ppo_halfcheetah": Case(
        "on_policy", "halfcheetah_ppo", 2.0, {"iterations": 10},
        cleanrl="ppo_continuous_action.py --capture-video False",
    ),
    "a2c_cartpole": Case("on_policy", "cartpole_a2c_zoo", 1.5, {"iterations": 1250}),
    "a2c_lunarlander": Case("on_policy", "lunarlander_a2c", 1.5),
    "dqn_cartpole": Case("off_policy", "dqn_cartpole", 2.0),
    "dqn_lunarlander": Case("off_policy", "dqn_lunarlander", 2.0, {"schedule.total_steps": 10_000}),
    "dqn_cartpole_cleanrl": Case(
        "off_policy", "dqn_cartpole", 2.0,
        {
            "agent.batch_size": 128, "agent.replay.capacity": 10_000, "agent.target.every_steps": 500,
            "agent.exploration.fraction": 0.5, "agent.exploration.final": 0.05,
            "agent.values": "{type: scalar, huber: null}",
            "agent.network.hidden_sizes": "[120, 84]", "agent.optimizer.learning_rate": 2.5e-4,
            "agent.optimizer.max_grad_norm": 0.5, "schedule.start_steps": 10_000, "schedule.train_every": 10,
            "schedule.updates_per_train": 1,
        },
        cleanrl="dqn.py --learning-rate 2.5e-4 --batch-size 128 --train-frequency 10 --exploration-fraction 0.5",
        with_sb3=False,
    ),
    "sac_pendulum": Case("off_policy", "sac_pendulum", 1.5, _SMALL),
    "td3_pendulum": Case("off_policy", "td3_pendulum", 1.5, _SMALL),
    "sac_halfcheetah": Case("off_policy", "sac_halfcheetah", 1.5, _SMALLER),
    "td3_halfcheetah": Case("off_policy", "td3_halfcheetah", 1.5, _SMALLER),
    "sac_pendulum_cleanrl": Case(
        "off_policy", "sac_pendulum", 1.5,
        _SMALLER | {"agent.network.hidden_sizes": "[256, 128]", "agent.learning_rate": 3e-4,
                  "agent.critic_learning_rate": 1e-3},
        cleanrl=f"sac_continuous_action.py {_LATE}", with_sb3=False,
    ),
    "td3_pendulum_cleanrl": Case(
        "off_policy", "td3_halfcheetah", 1.5, _SMALLER | {"environment.id": "Pendulum-v1"},
        cleanrl=f"td3_continuous_action.py {_LATE}", with_sb3=False,
    ),
}  # fmt: skip
"""Names of the comparisons. `*_cleanrl` are those whose fixed parts no other side shares (layers, losses)."""


# --- ours -------------------------------------------------------------------------------------------------------------


def ours(case: Case, config: Any, seed: int) -> Trial:
    """Train and judge with this project."""
    with tempfile.TemporaryDirectory() as folder:
        settings = RunConfig(directory=f"{folder}/run", seed=seed, log_every=10**9, progress_bar=False)
        return (_on_policy if case.recipe == "on_policy" else _off_policy)(config, settings)


def _on_policy(config: Any, settings: RunConfig) -> Trial:
    started = [clock() for clock in CLOCKS]
    probe = make_environments(config.environment, num_envs=1)
    spaces = probe.single_observation_space, probe.single_action_space
    policy = ActorCritic(*spaces, network=config.network, seed=settings.seed)
    learner = Learner(policy, config.algorithm, config.update, seed=settings.seed)
    collector = make_collector(
        CollectSteps(steps=config.collect.steps), policy, config.environment, config.algorithm, seed=settings.seed
    )
    run = Run(settings, resolved=config, iterations=config.iterations, recipe="on_policy")
    optimize_policy(collector, learner, run)
    seconds = [clock() - start for clock, start in zip(CLOCKS, started, strict=True)]
    judged = evaluate(policy, config.environment, normalizer=collector.observation_normalizer)
    return Trial(collector.total_env_steps, *seconds, judged["return_mean"])


def _off_policy(config: Any, settings: RunConfig) -> Trial:
    started = [clock() for clock in CLOCKS]
    agent = make_agent(config.agent, environment=config.environment, schedule=config.schedule, seed=settings.seed)
    run = Run(settings, resolved=config, iterations=config.schedule.iterations, recipe="off_policy")
    learn_off_policy(agent, config.environment, config.schedule, run)
    seconds = [clock() - start for clock, start in zip(CLOCKS, started, strict=True)]
    return Trial(config.schedule.total_steps, *seconds, evaluate_agent(agent, config.environment)["return_mean"])


# --- Stable-Baselines3 ------------------------------------------------------------------------------------------------


def stable_baselines(
    case: Case, config: Any, seed: int, *, make: Callable[[str, int, int], VecEnv], total_steps: int
) -> Trial:
    """Train and judge with Stable-Baselines3 over the environments of `make(id, num_envs, seed)`."""
    started = [clock() for clock in CLOCKS]
    environment = config.environment
    environments = make(environment.id, environment.num_envs, seed)
    if environment.normalize_observations:
        environments = VecNormalize(environments, gamma=config.algorithm.advantages.discount)
    kind, settings = (_sb3_on_policy if case.recipe == "on_policy" else sb3_off_policy)(config)
    model = kind("MlpPolicy", environments, seed=seed, device="cpu", **settings)
    model.learn(total_timesteps=total_steps)
    seconds = [clock() - start for clock, start in zip(CLOCKS, started, strict=True)]
    judge = make_vec_env(environment.id, n_envs=EPISODES, seed=1_000_000, env_kwargs={"render_mode": None})
    if isinstance(environments, VecNormalize):
        judge = VecNormalize(judge, training=False, norm_reward=False)
        judge.obs_rms = environments.obs_rms
    returns, _ = evaluate_policy(model, judge, n_eval_episodes=EPISODES, deterministic=True)
    return Trial(model.num_timesteps, *seconds, float(returns))


def _sb3_on_policy(config: Any) -> tuple[Any, dict[str, Any]]:
    algorithm, update = config.algorithm, config.update
    settings = {
        "n_steps": config.collect.steps,
        "gamma": algorithm.advantages.discount,
        "gae_lambda": algorithm.advantages.gae_lambda,
        "ent_coef": algorithm.entropy_coef,
        "vf_coef": algorithm.value_loss.coefficient / 2,  # theirs has no factor of 1/2
        "max_grad_norm": update.max_grad_norm,
        "learning_rate": _schedule(update.learning_rate, update.learning_rate_schedule),
    }
    if update.optimizer == "rmsprop":
        return sb3.A2C, settings
    batch = config.environment.num_envs * config.collect.steps
    settings |= {
        "batch_size": batch // algorithm.minibatches,
        "n_epochs": algorithm.epochs,
        "clip_range": algorithm.surrogate.clip_high,
        "clip_range_vf": getattr(algorithm.value_loss, "clip_range", None),
    }
    return sb3.PPO, settings


def _schedule(rate: float, kind: str) -> Any:
    return (lambda left: left * rate) if kind == "linear" else rate


def sb3_off_policy(config: Any) -> tuple[Any, dict[str, Any]]:
    """Their class and its settings for a config of ours."""
    agent, schedule = config.agent, config.schedule
    settings: dict[str, Any] = {
        "buffer_size": agent.replay.capacity,
        "learning_starts": schedule.start_steps,
        "batch_size": agent.batch_size,
        "gamma": agent.discount,
        "train_freq": schedule.train_every,
        "gradient_steps": schedule.updates_per_train or -1,
        "policy_kwargs": {"net_arch": list(agent.network.hidden_sizes), "activation_fn": nn.ReLU},
    }
    if agent.type == "dqn":
        return sb3.DQN, settings | {
            "learning_rate": agent.optimizer.learning_rate,
            "max_grad_norm": agent.optimizer.max_grad_norm,
            "target_update_interval": agent.target.every_steps,
            "exploration_fraction": agent.exploration.fraction,
            "exploration_final_eps": agent.exploration.final,
        }
    settings |= {"learning_rate": agent.learning_rate, "tau": agent.target_rate}
    if agent.type == "sac":
        return sb3.SAC, settings
    size = int(np.prod(gymnasium.make(config.environment.id).action_space.shape))
    noise = NormalActionNoise(np.zeros(size), agent.noise.std * np.ones(size))
    return sb3.TD3, settings | {"action_noise": noise, "policy_delay": agent.policy_delay}


def plain(identifier: str, num_envs: int, seed: int) -> VecEnv:
    """Stable-Baselines3's fastest form: no monitor, no render mode."""
    del seed
    return DummyVecEnv([lambda: gymnasium.make(identifier)] * num_envs)


def usual(identifier: str, num_envs: int, seed: int) -> VecEnv:
    """As its users call it; sets a render mode, with which some environments take two to three times as long."""
    return make_vec_env(identifier, n_envs=num_envs, seed=seed)
