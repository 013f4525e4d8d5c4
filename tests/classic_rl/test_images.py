"""Images and composite observations, on-policy."""

from __future__ import annotations

import copy

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from torch.testing import assert_close

from classic_rl.collector import CollectSteps
from classic_rl.environments import EnvironmentConfig
from classic_rl.episodes import CollectEpisodes
from classic_rl.evaluation import EvaluationConfig, evaluate
from classic_rl.networks import MemoryConfig, NetworkConfig
from classic_rl.policy import ActorCritic
from classic_rl.saving import load, save
from rlhf.core.estimate import estimate
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig


class Seen(gymnasium.Env):
    """Reward 1 when the action names the half of the picture that is lit; 20 steps."""

    observation_space = spaces.Box(0, 1, (10, 10, 2), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.made = 0
        return self._draw(), {}

    def _draw(self):
        self.side = int(self.np_random.integers(2))
        picture = np.zeros((10, 10, 2), dtype=np.uint8)
        picture[self.np_random.integers(10), 5 * self.side + self.np_random.integers(5), 0] = 1
        return picture

    def step(self, action):
        reward = float(action == self.side)
        self.made += 1
        return self._draw(), reward, False, self.made >= 20, {}


class Parts(gymnasium.Env):
    """A Dict whose parts say, one-hot, as numbers and as bits, what to do; reward 1 for doing the Discrete part."""

    observation_space = spaces.Dict(
        {
            "number": spaces.Discrete(3, start=1),
            "vector": spaces.Box(-1, 1, (2,), np.float32),
            "bits": spaces.MultiBinary(2),
        }
    )
    action_space = spaces.Discrete(3, start=1)

    def __init__(self):
        self.observation_space = copy.deepcopy(Parts.observation_space)  # each copy draws for itself

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.made, self.shown = 0, self.observation_space.sample()
        return self.shown, {}

    def step(self, action):
        reward = float(action == self.shown["number"])
        self.made, self.shown = self.made + 1, self.observation_space.sample()
        return self.shown, reward, False, self.made >= 20, {}


for _name, _class in (("Seen-v0", Seen), ("Parts-v0", Parts)):
    if _name not in gymnasium.registry:
        gymnasium.register(_name, entry_point=_class)

SMALL = NetworkConfig(convolutions="minatar", image_features=32, hidden_sizes=[])


@pytest.mark.parametrize("collect", [CollectSteps(steps=25), CollectEpisodes(max_steps=20)])
def test_images_stay_bytes_and_are_scored_as_acted_on(make, collect):
    policy, collector = make("Seen-v0", "ppo", collect, network=SMALL)
    rollout = collector.collect()
    seen = rollout.inputs["observations"]
    assert seen.dtype == torch.uint8
    assert seen.shape[2:] == (10, 10, 2)
    assert (seen.sum(dim=(2, 3, 4)) == 1).all()  # one lit pixel
    assert_close(policy(rollout.inputs, rollout.actions).log_probs, rollout.old_log_probs)
    assert_close(rollout.next_values[:, :-1][:, 3], rollout.values[:, 4])


def test_nature_convolutions_have_their_size():
    # Mnih et al. 2015: 32 x 4 x 8^2 + 32, 64 x 32 x 4^2 + 64, 64 x 64 x 3^2 + 64, 512 x 3136 + 512 = 1,684,128 weights;
    # then one layer for 6 actions and one for the value (Mnih et al. 2016).
    policy = ActorCritic(
        spaces.Box(0, 255, (4, 84, 84), np.uint8), spaces.Discrete(6),
        network=NetworkConfig(convolutions="nature", hidden_sizes=[]), seed=0,
    )  # fmt: skip
    counted = sum(parameter.numel() for parameter in policy.parameters())
    assert counted == 1_684_128 + 513 * 6 + 513
    frames = torch.randint(0, 256, (2, 3, 4, 84, 84), dtype=torch.uint8)
    output = policy({"observations": frames}, torch.zeros(2, 3, dtype=torch.int64))
    assert output.values.shape == output.log_probs.shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize(("shuffle", "memory"), [("actions", None), ("rows", MemoryConfig(cell="gru", size=16))])
def test_what_is_seen_is_learned_saved_and_predicted(make, tmp_path, shuffle, memory):
    algorithm, network = ALGORITHMS["ppo"], SMALL.model_copy(update={"memory": memory})
    policy, collector = make("Seen-v0", algorithm, CollectSteps(steps=32), num_envs=8, network=network)
    learner = Learner(policy, algorithm, UpdateConfig(learning_rate=3e-3, shuffle=shuffle, flatten_parameters=True))
    for _ in range(30):
        learner.update(estimate(collector.collect(), algorithm))
    assert evaluate(policy, EnvironmentConfig(id="Seen-v0"), EvaluationConfig(max_steps=20))["return_mean"] > 17
    save(tmp_path, policy)
    trained, environment = load(tmp_path), gymnasium.make("Seen-v0")
    observation, _ = environment.reset(seed=0)
    total = 0.0
    for _ in range(20):
        observation, reward, *_ = environment.step(trained.predict(observation))
        total += reward
    assert total > 15


@pytest.mark.slow
def test_the_parts_of_a_dict_are_read(make, tmp_path):
    algorithm = ALGORITHMS["ppo"]
    policy, collector = make("Parts-v0", algorithm, CollectSteps(steps=32), num_envs=8)
    learner = Learner(policy, algorithm, UpdateConfig(learning_rate=5e-3, shuffle="actions", flatten_parameters=True))
    for _ in range(25):
        learner.update(estimate(collector.collect(), algorithm))
    assert evaluate(policy, EnvironmentConfig(id="Parts-v0"), EvaluationConfig(max_steps=20))["return_mean"] > 18
    save(tmp_path, policy)
    space = Parts.observation_space
    space.seed(0)
    shown = [space.sample() for _ in range(20)]
    trained = load(tmp_path)
    assert sum(trained.predict(observation) == observation["number"] for observation in shown) > 18


def test_networks_and_images_must_fit(make):
    with pytest.raises(ConfigError, match=r"network\.convolutions.*expected nature"):
        make("Seen-v0", "ppo", CollectSteps(steps=2))
    with pytest.raises(ConfigError, match=r"vectors need no convolutions"):
        make("CartPole-v1", "ppo", CollectSteps(steps=2), network=SMALL)
    with pytest.raises(ConfigError, match=r"normalize_observations"):
        make("Seen-v0", "ppo", CollectSteps(steps=2), network=SMALL, normalize_observations=True)


def test_ales_vector_environment_is_read(make):
    pytest.importorskip("ale_py")
    settings = {"num_envs": 4, "vectorization": "vector_entry_point", "network": NetworkConfig(
        convolutions="nature", image_features=8, hidden_sizes=[]
    )}  # fmt: skip
    policy, collector = make("ale_py:ALE/Pong-v5", "grpo", CollectEpisodes(group_size=2, max_steps=6), **settings)
    seen = collector.collect().inputs["observations"]
    assert seen.shape == (4, 6, 4, 84, 84)
    assert seen.dtype == torch.uint8
    assert torch.equal(seen[0, 0], seen[1, 0])  # a group starts from one state
    assert torch.equal(seen[2, 0], seen[3, 0])
    policy, collector = make("ale_py:ALE/Pong-v5", "ppo", CollectSteps(steps=5), **settings)
    rollout = collector.collect()
    # Frames are stacked oldest first, so the stack of one step holds the last three of the step before.
    seen = rollout.inputs["observations"]
    assert torch.equal(seen[:, 1:, :3], seen[:, :-1, 1:])
    assert_close(policy(rollout.inputs, rollout.actions).log_probs, rollout.old_log_probs)


def test_ales_vector_environment_cuts_and_resets_on_the_next_step(make):
    # 40 frames, 4 a step: the tenth step is truncated, the eleventh only resets. V of the true last frames bootstraps.
    pytest.importorskip("ale_py")
    network = NetworkConfig(convolutions="nature", image_features=8, hidden_sizes=[])
    settings = {"num_envs": 2, "vectorization": "vector_entry_point", "network": network}
    _, collector = make(
        "ale_py:ALE/Pong-v5", "ppo", CollectSteps(steps=13), kwargs={"max_num_frames_per_episode": 40}, **settings
    )
    assert collector.environments.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    rollout = collector.collect()
    assert rollout.action_mask[0].tolist() == [True] * 10 + [False] + [True] * 2
    assert rollout.episode_ends[0].tolist() == [False] * 9 + [True] + [False] * 3
    seen = rollout.inputs["observations"]
    assert torch.equal(seen[:, 10, :3], seen[:, 9, 1:]), "the step that is cut shows its own last frame"
    assert not torch.equal(seen[:, 11, :3], seen[:, 10, 1:]), "then a new episode begins"
    assert_close(rollout.next_values[:, 9], rollout.values[:, 10])
    assert rollout.next_values[:, 9].abs().min() > 0
    assert rollout.metrics["rollout/length_mean"] == 10


def test_a_lost_life_ends_a_row_and_not_the_game(make):
    # ALE's `life_loss_info` is the usual episodic life: an end without a reset. (Its `episodic_life` begins a new game
    # after every lost life, so that nobody learns what comes after the first.)
    pytest.importorskip("ale_py")
    network = NetworkConfig(convolutions="nature", image_features=8, hidden_sizes=[])
    _, collector = make(
        "ale_py:ALE/Breakout-v5", "ppo", CollectSteps(steps=90), num_envs=2, vectorization="vector_entry_point",
        kwargs={"life_loss_info": True}, network=network,
    )  # fmt: skip
    rollout = collector.collect()
    ends, seen = rollout.episode_ends[:, :-2], rollout.inputs["observations"]
    assert ends.sum() >= 2
    assert (rollout.next_values[:, :-2][ends] == 0).all(), "no value is bootstrapped over a lost life"
    assert torch.equal(~rollout.action_mask[:, 1:-1], ends)
    for row, step in ends.nonzero().tolist()[:2]:
        assert torch.equal(seen[row, step + 2, :3], seen[row, step + 1, 1:]), "the game goes on"
