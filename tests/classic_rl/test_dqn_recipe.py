"""The off-policy recipe with the DQN family: every shipped config runs, resumes exactly, and its folder acts."""

from __future__ import annotations

import importlib.util
import json
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
import yaml

from classic_rl.agents import make_agent
from classic_rl.dqn_config import DQNConfig
from classic_rl.environments import EnvironmentConfig, make_environments
from classic_rl.evaluation import EvaluationConfig, greedy_observations
from classic_rl.off_policy import OffPolicySchedule, Player
from classic_rl.q_networks import DuelingConfig, QNetwork, QNetworkConfig
from classic_rl.saliency import draw_saliency, saliency
from classic_rl.saving import load
from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import load_config, validate
from rlhf.errors import ConfigError, ModelError

FOLDER = Path(__file__).resolve().parents[2] / "recipes/configs/off_policy"
CONFIGS = [file for file in sorted(FOLDER.glob("*.yaml")) if yaml.safe_load(file.read_text())["agent"]["type"] == "dqn"]
PACKAGES = {"minatar": "minatar", "atari": "ale_py", "lunarlander": "Box2D"}


def require_packages(name):
    for part, package in PACKAGES.items():
        if part in name and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.fixture(scope="module")
def recipe():
    return import_recipe(find_recipe("off_policy"))


def run(recipe, file, folder, *more):
    overrides = [
        f"run.directory={folder}",
        "schedule.total_steps=120",
        "schedule.start_steps=40",
        "schedule.steps_per_iteration=40",
        "evaluation.episodes=1",
        "evaluation.max_steps=20",
        *more,
    ]
    return recipe.main(load_config(recipe.CONFIG, file, overrides))


def test_the_presets_are_there():
    names = {file.stem for file in CONFIGS}
    assert {"dqn_cartpole", "c51_cartpole", "qr_dqn_cartpole", "rainbow_cartpole", "dqn_atari_pong"} <= names
    assert {"dqn_mountaincar", "dqn_acrobot", "dqn_lunarlander", "dqn_minatar_breakout"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_runs_and_its_folder_acts(recipe, file, tmp_path):
    require_packages(file.stem)
    small = ["agent.replay.capacity=500"] if "atari" in file.stem else []
    metrics = run(recipe, file, tmp_path / "run", "schedule.train_every=16", "schedule.updates_per_train=1", *small)
    assert np.isfinite(metrics["loss"])
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["rollout/total_env_steps"] >= 120
    config = load_config(recipe.CONFIG, file)
    if "atari" in file.stem:
        observation, space = np.zeros((4, 84, 84), np.uint8), gymnasium.spaces.Discrete(18)
    else:
        environment = gymnasium.make(config.environment.id)
        (observation, _), space = environment.reset(seed=0), environment.action_space
    assert space.contains(load(tmp_path / "run/policy").predict(observation))


@pytest.mark.parametrize("name", ["dqn_cartpole", "rainbow_minatar_breakout"])
def test_a_resumed_run_equals_an_uninterrupted_one(recipe, name, tmp_path):
    """Through checkpoints on the disk, in the same episodes: the same metrics, the same weights."""
    require_packages(name)
    file = FOLDER / f"{name}.yaml"
    often = ["schedule.train_every=4", "schedule.updates_per_train=1", "agent.replay.capacity=300"]
    # Schedules run over total_steps; the first half is told of the whole and stopped by a checkpoint.
    config = load_config(recipe.CONFIG, file, [*often, "schedule.total_steps=120", "schedule.start_steps=40"])
    parts = [_train(config, tmp_path / "whole", [120]), _train(config, tmp_path / "halves", [60, 120])]
    assert parts[0][1] == parts[1][1]
    assert all(torch.equal(one, other) for one, other in zip(parts[0][0], parts[1][0], strict=True))


def _train(config, folder, stops):
    """Play until each stop; at a stop everything goes through the disk into new objects."""
    from rlhf.training.checkpoints import CheckpointStore

    store = CheckpointStore(folder, keep=1)
    metrics, saved = {}, None
    for stop in stops:
        agent = make_agent(config.agent, environment=config.environment, schedule=config.schedule, seed=0)
        player = Player(agent, config.environment, config.schedule, seed=0)
        if saved is not None:
            agent.load_state_dict(store.load(saved, "agent"))
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                player.load_state_dict(store.load(saved, "player"))
        if stop == 120:
            player.play_until(90)  # the same windows for the averaged metrics in both
        metrics = player.play_until(stop)
        saved = store.save(stop, {"agent": agent.state_dict(), "player": player.state_dict()})
    return list(agent.online.network.state_dict().values()), metrics


def test_a_run_resumes_from_its_directory(recipe, tmp_path):
    file = FOLDER / "dqn_cartpole.yaml"
    run(recipe, file, tmp_path / "run", "schedule.train_every=4", "schedule.updates_per_train=1")
    more = ["schedule.train_every=4", "schedule.updates_per_train=1", "schedule.total_steps=200", "run.resume=true"]
    metrics = run(recipe, file, tmp_path / "run", *more)
    assert metrics["rollout/total_env_steps"] == 200
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["agent.double=true", "agent.target={type: none}"], "needs a target network"),
        (["environment.id=Pendulum-v1"], "finitely many actions"),
        (["agent.network.convolutions=nature"], "vectors need no convolutions"),
        (["environment.normalize_observations=true"], "raw observations"),
        (["agent.replay.capacity=2", "agent.n_step=5"], "too small"),
        (["evaluation.kwargs={render_mode: human}"], "render_mode slows"),
        (["saliency_images=3"], "need a dueling network of images"),
    ],
)
def test_mistakes_are_told_in_one_sentence(recipe, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(recipe, FOLDER / "dqn_cartpole.yaml", tmp_path, *overrides)


@pytest.mark.parametrize("game", ["Asterix", "Breakout", "Freeway", "Seaquest", "SpaceInvaders"])
def test_minatar_goes_on_from_a_saved_state(game):
    """Two copies, one restored from the other, see the same frames, sticky actions and spawns included."""
    pytest.importorskip("minatar")
    config = EnvironmentConfig(id=f"classic_rl.minatar:MinAtar{game}-v1", num_envs=1, vectorization="sync")
    schedule = OffPolicySchedule(total_steps=400, start_steps=400)
    agents = validate(DQNConfig, {"network": {"convolutions": "minatar", "hidden_sizes": [8]}})
    players = []
    for seed in (0, 1):
        agent = make_agent(agents, environment=config, schedule=schedule, seed=0)
        players.append(Player(agent, config, schedule, seed=seed))
    players[0].play_until(150)
    state = players[0].state_dict()
    players[0].agent.replay.cut()
    frames = []
    for player in players:
        player.load_state_dict(state)
        actions, seen = np.random.default_rng(0), []
        for _ in range(150):
            frame, reward, *_ = player.environments.step(actions.integers(3, size=1))
            seen.append((frame.tobytes(), float(reward[0])))
        frames.append(seen)
    assert frames[0] == frames[1]


def test_saliency_is_the_gradient_of_each_stream(tmp_path):
    """By central differences at a few pixels."""
    space = gymnasium.spaces.Box(0, 255, (10, 10, 4), np.uint8)
    config = QNetworkConfig(convolutions="minatar", hidden_sizes=[16], dueling=DuelingConfig())
    network = QNetwork(space, 3, config=config, seed=0).double()
    network.convolutions[0].register_forward_hook(lambda *arguments: arguments[-1].double())
    values = DQNConfig().values
    images = np.random.default_rng(0).integers(0, 2, (2, 10, 10, 4)).astype(np.uint8)
    maps = saliency(network, images, values=values)
    assert maps.value.shape == maps.advantage.shape == images.shape
    base = torch.from_numpy(images).double()
    for place in [(0, 3, 4, 1), (1, 7, 2, 3)]:
        for stream, found in enumerate(maps):
            moved = []
            for step in (1e-3, -1e-3):
                other = base.clone()
                other[place] += step
                with torch.no_grad():
                    moved.append(network.streams(other)[stream][place[0]].amax().item())
            assert found[place] == pytest.approx(abs(moved[0] - moved[1]) / 2e-3, abs=1e-4)
    draw_saliency(tmp_path / "maps.png", images, maps, channels_first=False)
    assert (tmp_path / "maps.png").stat().st_size > 1000
    with pytest.raises(ModelError, match="dueling"):
        saliency(QNetwork(space, 3, config=QNetworkConfig(convolutions="minatar")), images, values=values)


def test_a_run_shows_where_its_network_looks(recipe, tmp_path):
    """The observations are those of the run's last policy, acting greedily."""
    pytest.importorskip("minatar")
    file = FOLDER / "rainbow_minatar_breakout.yaml"
    run(recipe, file, tmp_path / "run", "saliency_images=3")
    assert (tmp_path / "run/saliency.png").stat().st_size > 1000
    settings = load_config(recipe.CONFIG, file, ["environment.num_envs=1"])
    policy = load(tmp_path / "run/policy")
    environments = make_environments(settings.environment, images=True)
    seen = greedy_observations(policy, environments, EvaluationConfig(max_steps=30))
    frame, _ = environments.reset(seed=[int(np.random.SeedSequence(EvaluationConfig().seed).generate_state(1)[0])])
    for shown in seen:
        assert np.array_equal(shown, frame[0])
        frame, *_ = environments.step(policy.greedy(frame.astype(np.uint8)))
    environments.close()


ATARI = {
    "off_policy": ["dqn_atari_breakout", "dqn_atari_pong", "rainbow_atari_pong"],
    "on_policy": ["atari_breakout_ppo", "atari_pong_ppo"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "config"), [(name, config) for name in ATARI for config in ATARI[name]])
def test_atari_presets_go_on_after_a_lost_life_and_evaluate_whole_games(name, config):
    # Mnih et al. 2015: a lost life ends the return, not the game. Tried on Breakout, whose games have five lives.
    pytest.importorskip("ale_py")
    settings = load_config(import_recipe(find_recipe(name)).CONFIG, FOLDER.parent / name / f"{config}.yaml", [])
    judged = settings.evaluation.adapt(settings.environment)
    assert not judged.kwargs["reward_clipping"]
    for environment, lives_at_ends in [(settings.environment, [4, 3, 2, 1, 0]), (judged, [0])]:
        ends, fresh = _lives_over_games(environment.model_copy(update={"id": "ale_py:ALE/Breakout-v5", "num_envs": 1}))
        assert ends[: len(lives_at_ends)] == lives_at_ends
        assert set(ends) == set(lives_at_ends)
        assert all(new == (old if old else 5) for old, new in zip(ends, fresh, strict=False))


def _lives_over_games(environment):
    """Lives left at every end that the environment tells, and after the step that follows it."""
    environments = make_environments(environment, images=True)
    environments.reset(seed=1)
    generator, ends, fresh, ended = np.random.default_rng(0), [], [], False
    for _ in range(600):
        _, _, terminated, truncated, infos = environments.step(generator.integers(4, size=1))
        if ended:
            fresh.append(int(infos["lives"][0]))
        ended = bool(terminated[0] or truncated[0])
        if ended:
            ends.append(int(infos["lives"][0]))
    environments.close()
    return ends, fresh


def test_a_missing_minatar_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "minatar", None)
    with pytest.raises(gymnasium.error.DependencyNotInstalled, match="pip install minatar"):
        gymnasium.make("classic_rl.minatar:MinAtarBreakout-v1")


def test_what_an_installed_minatar_misses_shows(monkeypatch, tmp_path):
    """Told to install minatar, somebody who has it would look in the wrong place."""
    (tmp_path / "minatar.py").write_text("import a_package_that_minatar_needs")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "minatar", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_minatar_needs"):
        gymnasium.make("classic_rl.minatar:MinAtarBreakout-v1")
