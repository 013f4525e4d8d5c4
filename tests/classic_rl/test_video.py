"""Films of evaluation episodes: files that play, of whole episodes, and training that never draws."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from classic_rl.agents import make_agent
from classic_rl.dqn import DQNConfig
from classic_rl.environments import EnvironmentConfig, make_environments
from classic_rl.evaluation import EvaluationConfig, evaluate, evaluate_agent
from classic_rl.networks import NetworkConfig
from classic_rl.off_policy import OffPolicySchedule
from classic_rl.policy import ActorCritic
from classic_rl.video import VideoFile, filmed
from rlhf.config import load_config, validate
from rlhf.errors import ConfigError

av = pytest.importorskip("av")
pytest.importorskip("pygame")
CONFIGS = Path(__file__).resolve().parents[2] / "recipes/configs"


def frames(file):
    """All pictures of a film, [T, height, width, 3], and its rate."""
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]), stream.average_rate


def pole_policy(environment, **settings):
    probe = make_environments(environment, num_envs=1, images=True)
    return ActorCritic(probe.single_observation_space, probe.single_action_space, seed=0, **settings)


def test_a_film_shows_a_whole_episode_of_cartpole(tmp_path):
    environment = EnvironmentConfig(id="CartPole-v1")
    policy = pole_policy(environment)
    config = EvaluationConfig(episodes=2, video=2)
    results = evaluate(policy, environment, config, videos=tmp_path)
    evaluate(policy, environment, config, videos=tmp_path)
    names = [f"evaluation_000{number}_episode_{index}.mp4" for number in (1, 2) for index in (0, 1)]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    pictures, rate = frames(tmp_path / names[0])
    assert pictures.shape[1:] == (400, 600, 3)
    assert rate == 50  # CartPole's render_fps
    alone = evaluate(policy, EnvironmentConfig(id="CartPole-v1", vectorization="sync"), EvaluationConfig(episodes=1))[
        "length_mean"
    ]
    assert len(pictures) == alone + 1, "the first picture is of the start"
    assert not np.array_equal(pictures[0], pictures[-1])
    assert results["length_mean"] > 5


def test_nothing_is_filmed_unless_asked(tmp_path):
    environment = EnvironmentConfig(id="CartPole-v1")
    evaluate(pole_policy(environment), environment, EvaluationConfig(episodes=1), videos=tmp_path / "videos")
    evaluate(pole_policy(environment), environment, EvaluationConfig(episodes=1, video=1))
    assert not list(tmp_path.iterdir())


def test_off_policy_agents_are_filmed(tmp_path):
    environment = EnvironmentConfig(id="CartPole-v1", kwargs={"sutton_barto_reward": True})
    agent = make_agent(DQNConfig(), environment=environment, schedule=OffPolicySchedule(total_steps=10), seed=0)
    evaluate_agent(agent, environment, EvaluationConfig(episodes=1, video=1, max_steps=5), videos=tmp_path)
    assert len(frames(tmp_path / "evaluation_0001_episode_0.mp4")[0]) == 6


def test_small_and_odd_pictures_are_enlarged_and_made_even(tmp_path):
    video = VideoFile(tmp_path / "film.mp4", frames_per_second=10)
    for value in (0, 255):
        video.add(np.full((85, 97, 3), value, dtype=np.uint8))
    video.close()
    pictures, rate = frames(tmp_path / "film.mp4")
    assert pictures.shape == (2, 340, 388, 3)
    assert rate == 10
    assert pictures[0].max() < 30
    assert pictures[1].min() > 225


def test_minatar_draws_its_channels(tmp_path):
    pytest.importorskip("minatar")
    environment = EnvironmentConfig(id="classic_rl.minatar:MinAtarBreakout-v1")
    network = NetworkConfig(convolutions="minatar", image_features=8, hidden_sizes=[])
    policy = pole_policy(environment, network=network)
    config = EvaluationConfig(episodes=1, video=1, max_steps=4)
    evaluate(policy, environment, config, videos=tmp_path)
    pictures, _ = frames(next(tmp_path.iterdir()))
    assert pictures.shape == (5, 260, 260, 3)
    assert (pictures[0].reshape(10, 26, 10, 26, 3)[3, 13, :, 13].max(axis=1) > 100).all(), "row 3 is full of bricks"


def test_ale_shows_what_the_agent_sees(tmp_path):
    pytest.importorskip("ale_py")
    environment = EnvironmentConfig(id="ale_py:ALE/Pong-v5", vectorization="vector_entry_point")
    with filmed(environment, tmp_path / "pong.mp4") as stage:
        stage.reset(seed=0)
        for _ in range(3):
            stage.step(np.zeros(1, dtype=np.int64))
    assert frames(tmp_path / "pong.mp4")[0].shape == (4, 336, 336, 3)


def test_what_draws_nothing_is_told(tmp_path):
    policy = ActorCritic(spaces.Box(-1, 1, (1,)), spaces.Discrete(2), seed=0)
    config = EvaluationConfig(video=1, episodes=1, max_steps=3)
    with pytest.raises(ConfigError, match=r"draws no pictures.*evaluation\.video=0"):
        evaluate(policy, EnvironmentConfig(id="Forever-v0"), config, videos=tmp_path)


def test_without_the_package_the_config_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert EvaluationConfig(video=0).video == 0
    with pytest.raises(ConfigError, match=r"rlhf-toolkit\[video\]"):
        validate(EvaluationConfig, {"video": 1})


@pytest.mark.parametrize("recipe", ["on_policy", "off_policy"])
def test_recipes_film_into_the_run_directory(recipe, tmp_path, monkeypatch):
    drawn = []
    made = make_environments
    for module in ("classic_rl.collector", "classic_rl.off_policy"):
        monkeypatch.setattr(
            f"{module}.make_environments", lambda *given, **named: drawn.append(made(*given, **named)) or drawn[-1]
        )
    module = importlib.import_module(f"recipes.{recipe}")
    sizes = {"on_policy": ["iterations=1"], "off_policy": ["schedule.total_steps=20", "schedule.start_steps=100"]}
    names = {"on_policy": "cartpole_ppo", "off_policy": "dqn_cartpole"}
    overrides = [*sizes[recipe], f"run.directory={tmp_path}", "run.overwrite=true", "run.progress_bar=false"]
    overrides += ["evaluation.video=1", "evaluation.episodes=1", "evaluation.max_steps=9"]
    module.main(load_config(module.CONFIG, CONFIGS / recipe / f"{names[recipe]}.yaml", overrides))
    assert [file.name for file in (tmp_path / "videos").iterdir()] == ["evaluation_0001_episode_0.mp4"]
    assert len(frames(next((tmp_path / "videos").iterdir()))[0]) <= 10
    assert drawn
    assert all(environments.render_mode is None for environments in drawn)
