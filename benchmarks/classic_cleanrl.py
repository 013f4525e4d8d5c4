"""One training run of a CleanRL script, in a process of its own; `benchmarks/classic.py --cleanrl FOLDER` calls it.

    pip download --no-deps --no-binary :all: cleanrl==0.4.8 && tar xzf cleanrl-0.4.8.tar.gz     # outside this project
    python benchmarks/classic_cleanrl.py cleanrl-0.4.8/cleanrl/ppo.py --gym-id CartPole-v1 --total-timesteps 20000

The package's pins do not install beside current libraries, so its single files run as they are over a stand-in for what
they import: gym's old interface (four results of `step`, `env.seed`) over gymnasium's environments, a SummaryWriter
that writes nothing, an empty `pybullet_envs`, Stable-Baselines3's `DummyVecEnv`. All of it is as thin as it can be and
what the scripts print goes nowhere, so their speed is at its best. Time runs from the first reset to the script's end.

Prints one line of JSON: steps, cpu_seconds, wall_seconds, greedy_return (mean of 20 episodes).
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import sys
import time
import types
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"  # before torch and NumPy read it

import gymnasium
import numpy as np
import torch
from stable_baselines3.common import vec_env

EPISODES = 20
started: list[tuple[float, float]] = []
"""CPU and wall seconds at the first reset."""


class OldEnvironment:
    """gymnasium's environment behind gym's old interface; subclasses wrap one another."""

    def __init__(self, env: Any) -> None:
        self.env, self.first_seed = env, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.env, name)

    def step(self, action: Any) -> Any:
        """Observation, reward, and what the interface says of the end."""
        return self.env.step(action)

    def reset(self) -> Any:
        """The first observation."""
        return self.env.reset()

    def seed(self, seed: int) -> None:
        """Seed the next reset."""
        self.env.seed(seed)


class Base(OldEnvironment):
    """Where gymnasium's own environment begins."""

    def step(self, action: Any) -> Any:
        """Observation, reward, and what the interface says of the end."""
        observation, reward, terminated, truncated, infos = self.env.step(action)
        if truncated:
            infos["TimeLimit.truncated"] = not terminated
        return observation, reward, terminated or truncated, infos

    def reset(self) -> Any:
        """The first observation."""
        if not started:
            started.append((time.process_time(), time.perf_counter()))
        seed, self.first_seed = self.first_seed, None
        return self.env.reset(seed=seed)[0]

    def seed(self, seed: int) -> None:
        """Seed the next reset."""
        self.first_seed = seed


class ObservationWrapper(OldEnvironment):
    """gym's wrapper of the same name."""

    def step(self, action: Any) -> Any:
        """Observation, reward, and what the interface says of the end."""
        observation, reward, done, infos = self.env.step(action)
        return self.observation(observation), reward, done, infos

    def reset(self) -> Any:
        """The first observation."""
        return self.observation(self.env.reset())


class RecordEpisodeStatistics(OldEnvironment):
    """gym's wrapper of the same name, without its queues."""

    total, length = 0.0, 0

    def step(self, action: Any) -> Any:
        """Observation, reward, and what the interface says of the end."""
        observation, reward, done, infos = self.env.step(action)
        self.total += float(reward)
        self.length += 1
        if done:
            infos["episode"] = {"r": self.total, "l": self.length}
            self.total, self.length = 0.0, 0
        return observation, reward, done, infos


class Modern(gymnasium.Env):
    """The old interface turned back, as Stable-Baselines3's DummyVecEnv wants it."""

    def __init__(self, old: Any) -> None:
        self.old, self.observation_space, self.action_space = old, old.observation_space, old.action_space

    def step(self, action: Any) -> Any:
        """Observation, reward, and what the interface says of the end."""
        observation, reward, done, infos = self.old.step(action)
        truncated = infos.get("TimeLimit.truncated", False)
        reward = float(np.asarray(reward).item())  # the normalizing wrapper makes it an array of one
        return observation, reward, done and not truncated, truncated, infos

    def reset(self, **_: Any) -> Any:
        """The first observation and infos; seeds were given before."""
        return self.old.reset(), {}


class SummaryWriter:
    """Writes nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def install() -> None:
    """Put the stand-ins where the scripts import them from."""
    gym, wrappers, core = types.ModuleType("gym"), types.ModuleType("gym.wrappers"), types.ModuleType("gym.core")
    members = {"Wrapper": OldEnvironment, "ObservationWrapper": ObservationWrapper}
    for module in (gym, core):
        vars(module).update(members)
    vars(wrappers).update(
        TimeLimit=OldEnvironment, Monitor=OldEnvironment, RecordEpisodeStatistics=RecordEpisodeStatistics
    )
    vars(gym).update(
        make=lambda identifier: Base(gymnasium.make(identifier)), spaces=gymnasium.spaces, wrappers=wrappers, core=core
    )
    tensorboard, pybullet = types.ModuleType("torch.utils.tensorboard"), types.ModuleType("pybullet_envs")
    vars(tensorboard).update(SummaryWriter=SummaryWriter)
    distutils, strings = types.ModuleType("distutils"), types.ModuleType("distutils.util")
    vars(strings).update(strtobool=lambda text: int(text.lower() in ("y", "yes", "t", "true", "on", "1")))
    vars(distutils).update(util=strings)
    sys.modules.update(
        {
            "gym": gym, "gym.wrappers": wrappers, "gym.core": core, "gym.spaces": gymnasium.spaces,
            "pybullet_envs": pybullet, "torch.utils.tensorboard": tensorboard,
            "distutils": distutils, "distutils.util": strings,
        }
    )  # fmt: skip
    plain = vec_env.DummyVecEnv
    vec_env.DummyVecEnv = lambda makers: plain([lambda make=make: Modern(make()) for make in makers])  # type: ignore


@torch.no_grad()
def greedy_action(script: dict[str, Any], observation: np.ndarray) -> Any:
    """What a finished script's policy does without noise."""
    row = torch.as_tensor(observation, dtype=torch.float32)[None]
    if "q_network" in script:
        return int(script["q_network"](row, "cpu").argmax())
    if "pg" in script:
        mean = script["pg"](row, "cpu")[0]
        return (torch.tanh(mean) * script["pg"].action_scale + script["pg"].action_bias)[0].numpy()
    if "agent" not in script:
        return script["actor"](row, "cpu")[0].numpy()
    if hasattr(script["agent"], "actor"):
        return int(script["agent"].actor(row).argmax())
    normalized = script["envs"].venv.envs[0].old  # a NormalizedEnv, whose statistics are only read
    statistics = normalized.ob_rms
    scaled = (observation - statistics.mean) / np.sqrt(statistics.var + normalized.epsilon)
    row = torch.as_tensor(np.clip(scaled, -normalized.clipob, normalized.clipob), dtype=torch.float32)[None]
    space = normalized.action_space
    return np.clip(script["agent"].actor_mean(row)[0].numpy(), space.low, space.high)


def judge(script: dict[str, Any], identifier: str) -> float:
    """Mean return of greedy episodes."""
    returns = []
    for episode in range(EPISODES):
        environment = gymnasium.make(identifier)
        observation, _ = environment.reset(seed=1_000_000 + episode)
        total, over = 0.0, False
        while not over:
            observation, reward, terminated, truncated, _ = environment.step(greedy_action(script, observation))
            total, over = total + float(reward), terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def main() -> None:
    """Run, judge, print."""
    install()
    torch.set_num_threads(1)
    sys.argv = sys.argv[1:]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        script = runpy.run_path(sys.argv[0], run_name="__main__")
        seconds = time.process_time() - started[0][0], time.perf_counter() - started[0][1]
    settings = script["args"]
    steps = settings.total_timesteps
    if "num_updates" in script:
        steps = script["num_updates"] * settings.batch_size
    returns = judge(script, settings.gym_id)
    print(json.dumps({"steps": steps, "cpu_seconds": seconds[0], "wall_seconds": seconds[1], "greedy_return": returns}))


if __name__ == "__main__":
    main()
