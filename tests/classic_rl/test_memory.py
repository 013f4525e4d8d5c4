"""Recurrent policies: their state over episodes, rollouts, evaluation, saving and resuming."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn
from torch.testing import assert_close

from classic_rl.acting import Forward
from classic_rl.collector import CollectSteps
from classic_rl.encoders import Encoder, NumpyMemory
from classic_rl.environments import EnvironmentConfig
from classic_rl.episodes import CollectEpisodes
from classic_rl.evaluation import EvaluationConfig, evaluate
from classic_rl.networks import MemoryConfig, NetworkConfig
from classic_rl.policy import ActorCritic
from classic_rl.saving import load, save
from rlhf.core.algorithm import Gae
from rlhf.core.estimate import estimate
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig

CELLS = ["lstm", "gru"]


def _network(cell, size=8):
    return NetworkConfig(memory=MemoryConfig(cell=cell, size=size), hidden_sizes=[16])


def _cell_like(memory):
    """Torch's own single-step cell with the same weights: what a memory must equal step by step."""
    cell = (nn.LSTMCell if isinstance(memory, nn.LSTM) else nn.GRUCell)(memory.input_size, memory.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in memory.state_dict().items()})
    return cell


def _by_steps(encoder, observations, starts, state):
    """Features [B, T, F] from a loop over time that resets the state where an episode starts."""
    cell, size, features = _cell_like(encoder.memory), encoder.memory.hidden_size, []
    for step in range(observations.shape[1]):
        state = torch.where(starts[:, step, None], 0.0, state)
        if isinstance(cell, nn.LSTMCell):
            state = torch.cat(cell(observations[:, step], (state[:, :size], state[:, size:])), dim=1)
        else:
            state = cell(observations[:, step], state)
        features.append(state[:, :size])
    return torch.stack(features, dim=1)


@pytest.mark.parametrize("kind", CELLS)
def test_a_segment_equals_its_steps(kind):
    torch.manual_seed(0)
    encoder = Encoder(spaces.Box(-1, 1, (3,)), _network(kind))
    observations, state = torch.randn(4, 9, 3), torch.randn(4, encoder.state_size)
    starts = torch.zeros(4, 9, dtype=torch.bool)
    starts[0, 0] = starts[1, 4] = starts[2, 8] = starts[2, 1] = starts[2, 2] = True
    expected = _by_steps(encoder, observations, starts, state)
    features = encoder(observations, starts=starts, state=state)
    assert_close(features, expected)
    gradient = torch.randn_like(features)
    actual = torch.autograd.grad((features * gradient).sum(), encoder.memory.weight_hh_l0)[0]
    cell = _cell_like(encoder.memory)
    assert torch.isfinite(actual).all()
    assert actual.shape == cell.weight_hh.shape
    rows = encoder(observations[1:2], starts=starts[1:2], state=state[1:2])
    assert_close(rows, expected[1:2])  # a row does not depend on those beside it


@pytest.mark.parametrize("kind", CELLS)
def test_the_numpy_step_equals_torchs_cell(kind):
    torch.manual_seed(0)
    memory = Encoder(spaces.Box(-1, 1, (3,)), _network(kind)).memory
    own, cell = NumpyMemory(memory), _cell_like(memory)
    x, state = torch.randn(5, 3), torch.randn(5, 16 if kind == "lstm" else 8)
    expected = torch.cat(cell(x, tuple(state.split(8, dim=1))), dim=1) if kind == "lstm" else cell(x, state)
    assert_close(torch.from_numpy(own(x.numpy(), state.numpy())), expected.detach())
    memory.bias_hh_l0.data.zero_()
    own.refresh()
    assert (own(x.numpy(), state.numpy()) != expected.detach().numpy()).any()


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("collect", [CollectSteps(steps=7), CollectEpisodes(max_steps=20)])
def test_what_was_acted_on_is_what_is_learned_from(make, monkeypatch, kind, collect):
    """Greedy outputs recorded while acting equal those of the update's forward, over three rollouts and many resets."""
    policy, collector = make(
        "Countdown-v0", "ppo", collect, num_envs=3, network=_network(kind), kwargs={"length": 4}, vectorization="sync"
    )
    acted, forward = [], Forward.__call__

    def record(*arguments, **options):
        acted.append(forward(*arguments, **options))
        return acted[-1]

    monkeypatch.setattr(Forward, "__call__", record)
    for _ in range(3):
        acted.clear()
        rollout = collector.collect()
        outputs = policy.outputs(rollout.inputs).detach()
        assert_close(outputs, torch.from_numpy(np.stack(acted, axis=1)), rtol=1e-5, atol=1e-6)
        assert_close(policy(rollout.inputs, rollout.actions).log_probs, rollout.old_log_probs)


@pytest.mark.parametrize("kind", CELLS)
def test_values_bootstrap_from_the_state_that_was_reached(make, kind):
    """Episodes of 3 steps, cut by truncation: V(s') reads the final observation after the episode's own history."""
    policy, collector = make(
        "Countdown-v0", "ppo", CollectSteps(steps=5), network=_network(kind), kwargs={"length": 3, "terminates": False}
    )
    first = collector.collect()

    def value(*observed):
        inputs = torch.tensor(observed, dtype=torch.float32).view(1, -1, 1)
        starts = torch.zeros(1, len(observed), dtype=torch.bool)
        state = torch.zeros(1, policy.encoder.state_size)
        return policy.values_of(_by_steps(policy.encoder, inputs, starts, state))[0, -1]

    # Countdown shows 0, 1, 2, 3 = the end; step 3 resets, so columns are 0, 1, 2, (3), 0 and the row is cut after 1.
    assert_close(first.values[0, [0, 1, 2, 4]], torch.stack([value(0), value(0, 1), value(0, 1, 2), value(0)]).detach())
    expected = torch.stack([value(0, 1), value(0, 1, 2), value(0, 1, 2, 3), value(0, 1)]).detach()
    assert_close(first.next_values[0, [0, 1, 2, 4]], expected)
    second = collector.collect()  # goes on in the episode that the first one cut: 1, 2, (3), 0, 1
    assert_close(
        second.values[0, [0, 1, 3, 4]], torch.stack([value(0, 1), value(0, 1, 2), value(0), value(0, 1)]).detach()
    )


@pytest.mark.parametrize("kind", CELLS)
def test_resume_is_bitwise(make, kind, tmp_path):
    algorithm = ALGORITHMS["ppo"].model_copy(update={"minibatches": 2})

    def start():
        policy, collector = make("CartPole-v1", algorithm, CollectSteps(steps=16), num_envs=4, network=_network(kind))
        return policy, collector, Learner(policy, algorithm, UpdateConfig(flatten_parameters=True), seed=0)

    policy, collector, learner = start()
    for step in range(4):
        if step == 2:
            torch.save({"collector": collector.state_dict(), "learner": learner.state_dict()}, tmp_path / "state.pt")
        learner.update(estimate(collector.collect(), algorithm))
    other, resumed, relearner = start()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["collector"])
    relearner.load_state_dict(state["learner"])
    for _ in range(2):
        relearner.update(estimate(resumed.collect(), algorithm))
    for name, tensor in policy.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_prediction_remembers_until_reset(tmp_path):
    policy = ActorCritic(spaces.Box(-1, 1, (2,)), spaces.Box(-9, 9, (1,)), network=_network("lstm"), seed=0)
    policy.actor.layers[-1].weight.data.mul_(100)
    save(tmp_path, policy)
    trained, observations = load(tmp_path), np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    first = [trained.predict(observation) for observation in observations]
    starts, state = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(1, 16)
    expected = policy.actor(_by_steps(policy.encoder, torch.from_numpy(observations)[None], starts, state))[0]
    np.testing.assert_allclose(np.stack(first), expected.detach().numpy(), rtol=1e-4, atol=1e-5)
    again = trained.predict(observations[0])
    assert not np.allclose(again, first[0])
    trained.reset()
    np.testing.assert_array_equal(trained.predict(observations[0]), first[0])


def test_memory_needs_whole_rows_and_no_foreign_memory(make):
    policy, _ = make("CartPole-v1", "ppo", CollectSteps(steps=4), network=_network("gru"))
    with pytest.raises(ConfigError, match=r"update\.shuffle.*remembers"):
        Learner(policy, ALGORITHMS["ppo"], UpdateConfig(shuffle="actions"))
    with pytest.raises(ConfigError, match=r"network\.memory.*reference"):
        make("CartPole-v1", "ppo_rlhf", CollectSteps(steps=4), network=_network("gru"))


def _recall(make, preset, network, *, iterations, seed=0):
    """Greedy return on the corridor after learning."""
    algorithm = ALGORITHMS[preset].model_copy(
        update={"advantages": Gae(discount=0.99, gae_lambda=0.95, standardize="minibatch")}
    )
    policy, collector = make("Recall-v0", algorithm, CollectSteps(steps=32), num_envs=16, network=network, seed=seed)
    learner = Learner(policy, algorithm, UpdateConfig(learning_rate=3e-3, flatten_parameters=True), seed=seed)
    for _ in range(iterations):
        learner.update(estimate(collector.collect(), algorithm))
    return evaluate(policy, EnvironmentConfig(id="Recall-v0"), EvaluationConfig(episodes=40))["return_mean"]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "iterations"), [("ppo", 60), ("a2c", 200)])
@pytest.mark.parametrize("kind", CELLS)
def test_memory_solves_what_needs_one(make, preset, iterations, kind):
    assert _recall(make, preset, _network(kind, size=16), iterations=iterations) == 1.0


@pytest.mark.slow
def test_without_memory_the_corridor_stays_a_coin_toss(make):
    # 40 fixed episodes: always answering one side scores the share of that side, well inside +-0.5.
    assert abs(_recall(make, "ppo", NetworkConfig(hidden_sizes=[16]), iterations=60)) < 0.5


def test_cartpole_without_velocities_hides_them():
    environment = gymnasium.make("classic_rl.partial:CartPoleNoVelocity-v1")
    inner = gymnasium.make("CartPole-v1")
    observation, _ = environment.reset(seed=3)
    whole, _ = inner.reset(seed=3)
    np.testing.assert_array_equal(observation, whole[[0, 2]])
    observation, reward, *_ = environment.step(1)
    np.testing.assert_array_equal(observation, inner.step(1)[0][[0, 2]])
    assert reward == 1
    assert environment.observation_space.contains(observation)
    assert environment.spec.max_episode_steps == 500
