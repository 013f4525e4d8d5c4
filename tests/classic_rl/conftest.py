"""Registers the hand-made environments and builds collectors for them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch


def _load(name, file):
    # import-mode=importlib gives test modules no package, so what they share is loaded by path.
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(file))
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


_load("classic_rl_test_environments", "counting.py").register()
_load("classic_rl_test_masked", "masked.py").register()
_load("classic_rl_test_continuous", "continuous.py").register()


@pytest.fixture
def continuous():
    """Agents of `continuous.py`."""
    return _load("classic_rl_test_continuous", "continuous.py")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make():
    """Build (policy, collector) for an environment id, a preset and a way to collect."""
    from classic_rl.environments import EnvironmentConfig, make_environments
    from classic_rl.episodes import make_collector
    from classic_rl.policy import ActorCritic
    from rlhf.core.presets import ALGORITHMS

    def build(
        identifier, preset, collect, *, num_envs=2, seed=0, kwargs=None, processes=None, network=None, **settings
    ):
        algorithm = ALGORITHMS[preset] if isinstance(preset, str) else preset
        environment = EnvironmentConfig(id=identifier, num_envs=num_envs, kwargs=kwargs or {}, **settings)
        probe = make_environments(environment, num_envs=1, images=True)
        policy = ActorCritic(
            probe.single_observation_space,
            probe.single_action_space,
            network=network,
            critic=algorithm.needs_critic,
            seed=seed,
        )
        probe.close()
        collector = make_collector(collect, policy, environment, algorithm, seed=seed, processes=processes)
        return policy, collector

    return build
