"""What the collectors record, against environments whose every step is known in advance."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from classic_rl.collector import CollectSteps, Processes
from classic_rl.episodes import CollectEpisodes
from rlhf.core.estimate import estimate
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError


def test_reset_steps_of_next_step_autoreset_are_masked(make):
    # Episodes of 3 steps; NEXT_STEP autoreset then spends one step on the reset, with reward 0.
    # Steps:    0 1 2 | 3=reset | 4 5 6 | 7=reset | 8 9
    # observed: 0 1 2 | 3       | 0 1 2 | 3       | 0 1
    _, collector = make("Countdown-v0", "ppo", CollectSteps(steps=10))
    rollout = collector.collect()
    for row in range(2):
        assert rollout.action_mask[row].tolist() == [True, True, True, False] * 2 + [True, True]
        assert rollout.episode_ends[row].tolist() == [False, False, True, False] * 2 + [False, False]
        assert rollout.rewards[row].tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 1, 1]
        assert rollout.inputs["observations"][row, :, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert rollout.metrics["rollout/episodes"] == 4
    assert rollout.metrics["rollout/return_mean"] == 3
    assert rollout.metrics["rollout/length_mean"] == 3
    assert rollout.metrics["rollout/env_steps"] == 16


def test_the_mask_crosses_rollouts_when_an_episode_ends_with_one(make):
    # 3 steps a rollout, episodes of 3: the second rollout begins with the reset step.
    _, collector = make("Countdown-v0", "ppo", CollectSteps(steps=3))
    collector.collect()
    second = collector.collect()
    assert second.action_mask[0].tolist() == [False, True, True]
    third = collector.collect()
    # Episode 2 began in rollout 2 and ends on rollout 3's first step: its return is 3 all the same.
    assert third.metrics["rollout/return_mean"] == 3
    assert third.action_mask[0].tolist() == [True, False, True]


def test_terminated_bootstraps_zero_and_truncated_the_final_state(make):
    for terminates in (True, False):
        policy, collector = make("Countdown-v0", "ppo", CollectSteps(steps=5), kwargs={"terminates": terminates})
        rollout = collector.collect()
        with torch.no_grad():
            by_count = policy.values(torch.arange(4.0).unsqueeze(1))
        # observed 0 1 2 [3 reset] 0, next: 1 2 3 0 1; V(3) counts only where the limit cut the episode.
        expected = by_count[[1, 2, 3, 0, 1]]
        if terminates:
            expected[2] = 0
        assert_close(rollout.next_values[0], expected)
        assert_close(rollout.values[0], by_count[[0, 1, 2, 3, 0]])


def test_advantages_never_mix_episodes(make):
    # lambda = gamma = 1, V = 0 everywhere: an advantage is the number of steps left in the episode or rollout.
    policy, collector = make("Countdown-v0", "ppo", CollectSteps(steps=6))
    for parameter in policy.critic.parameters():
        parameter.data.zero_()
    algorithm = ALGORITHMS["ppo"].model_copy(
        update={"advantages": ALGORITHMS["ppo"].advantages.model_copy(update={"discount": 1.0, "gae_lambda": 1.0})}
    )
    experience = estimate(collector.collect(), algorithm)
    assert experience.advantages[0].tolist() == [3, 2, 1, 0, 2, 1]


@pytest.mark.parametrize("identifier", ["CartPole-v1", "Pendulum-v1"])
def test_old_log_probs_and_values_are_the_trainers(make, identifier):
    policy, collector = make(identifier, "ppo", CollectSteps(steps=16), num_envs=3)
    rollout = collector.collect()
    output = policy(rollout.inputs, rollout.actions)
    assert_close(output.log_probs, rollout.old_log_probs)
    assert_close(output.values, rollout.values)


def test_draws_follow_the_policy(make):
    # 40,000 draws at one constant state: the frequency of action 1 lies within 4 standard errors of its probability.
    policy, collector = make("Forever-v0", "ppo", CollectSteps(steps=5000), num_envs=8)
    policy.actor.layers[-1].bias.data = torch.tensor([0.0, 1.0])
    rollout = collector.collect()
    probability = rollout.old_log_probs.exp()[rollout.actions == 1][0].item()
    frequency = rollout.actions.float().mean().item()
    assert abs(frequency - probability) < 4 * (probability * (1 - probability) / 40_000) ** 0.5


def test_groups_start_from_one_state_and_groups_differ(make):
    for identifier in ("StartState-v0", "CartPole-v1"):
        _, collector = make(identifier, "grpo", CollectEpisodes(group_size=3), num_envs=6)
        first, second = collector.collect(), collector.collect()
        starts = first.inputs["observations"][:, 0]
        assert first.group_ids.tolist() == [0, 0, 0, 1, 1, 1]
        assert (starts[:3] == starts[0]).all()
        assert (starts[3:] == starts[3]).all()
        assert not torch.equal(starts[0], starts[3])
        assert not torch.equal(second.inputs["observations"][0, 0], starts[0])


def test_rows_are_whole_episodes(make):
    # Under always-right CartPole falls after 9 to 11 steps whatever the start (every start lies within +-0.05).
    policy, collector = make("CartPole-v1", "grpo", CollectEpisodes(group_size=2), num_envs=4)
    policy.actor.layers[-1].bias.data = torch.tensor([0.0, 100.0])
    rollout = collector.collect()
    lengths = rollout.action_mask.sum(dim=1)
    assert ((lengths >= 8) & (lengths <= 11)).all()
    assert rollout.actions.shape[1] == lengths.max()
    for row, length in enumerate(lengths.tolist()):
        assert rollout.action_mask[row, :length].all()
        assert rollout.episode_ends[row].nonzero().flatten().tolist() == [length - 1]
    assert rollout.scores.tolist() == lengths.tolist()  # CartPole pays 1 a step
    assert rollout.metrics["rollout/env_steps"] == lengths.sum()


def test_max_steps_truncates(make):
    policy, collector = make("Countdown-v0", "ppo", CollectEpisodes(max_steps=2))
    rollout = collector.collect()
    assert rollout.action_mask.tolist() == [[True, True]] * 2
    assert rollout.episode_ends.tolist() == [[False, True]] * 2
    with torch.no_grad():
        assert_close(rollout.next_values[0, 1], policy.values(torch.tensor([2.0])))


def test_the_reference_is_the_initial_policy(make):
    policy, collector = make("CartPole-v1", "rloo", CollectEpisodes(group_size=2), num_envs=4)
    initial = copy.deepcopy(policy)
    policy.actor.layers[-1].bias.data += torch.tensor([0.0, 1.0])
    rollout = collector.collect()
    assert_close(rollout.ref_log_probs, initial(rollout.inputs, rollout.actions).log_probs)
    assert not torch.allclose(rollout.ref_log_probs, rollout.old_log_probs)


def test_box_actions_are_clipped_for_the_environment_only(make):
    # Pendulum accepts +-2; a standard deviation of e^2 = 7.4 leaves it most of the time.
    policy, collector = make("Pendulum-v1", "ppo", CollectSteps(steps=32))
    policy.distribution.log_std.data.fill_(2.0)
    rollout = collector.collect()
    assert rollout.actions.abs().max() > 2
    outside = (rollout.actions.abs() > 2).float().mean().item()
    assert rollout.metrics["rollout/clipped_action_fraction"] == pytest.approx(outside)


def test_noise_does_not_depend_on_the_number_of_processes(make):
    _, whole = make("Pendulum-v1", "ppo", CollectSteps(steps=8), num_envs=4)
    rollout = whole.collect()
    for index in range(2):
        _, half = make(
            "Pendulum-v1", "ppo", CollectSteps(steps=8), num_envs=4, processes=Processes(count=2, index=index)
        )
        part = half.collect()
        rows = slice(2 * index, 2 * index + 2)
        assert_close(part.actions, rollout.actions[rows])
        assert_close(part.inputs["observations"], rollout.inputs["observations"][rows])


@pytest.mark.parametrize("identifier", ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "StartState-v0"])
def test_resume_goes_on_in_the_same_episodes(make, identifier, tmp_path):
    settings = {"num_envs": 3, "normalize_observations": True, "normalize_rewards": True}
    policy, collector = make(identifier, "ppo", CollectSteps(steps=20), **settings)
    for _ in range(2):
        collector.collect()
    torch.save(collector.state_dict(), tmp_path / "state.pt")
    expected = [collector.collect() for _ in range(3)]
    _, resumed = make(identifier, "ppo", CollectSteps(steps=20), **settings)
    resumed.policy.load_state_dict(policy.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for rollout in expected:
        again = resumed.collect()
        assert torch.equal(again.inputs["observations"], rollout.inputs["observations"])
        assert torch.equal(again.actions, rollout.actions)
        assert torch.equal(again.rewards, rollout.rewards)
        assert torch.equal(again.action_mask, rollout.action_mask)
        assert again.metrics == rollout.metrics


def test_resume_of_episodes_draws_the_next_groups(make):
    policy, collector = make("CartPole-v1", "grpo", CollectEpisodes(group_size=2), num_envs=4)
    collector.collect()
    state = collector.state_dict()
    expected = collector.collect()
    policy.actor.layers[-1].bias.data += 1  # the reference must come from the checkpoint, not from this policy
    _, resumed = make("CartPole-v1", "grpo", CollectEpisodes(group_size=2), num_envs=4, seed=0)
    resumed.load_state_dict(state)
    again = resumed.collect()
    assert torch.equal(again.actions, expected.actions)
    assert torch.equal(again.ref_log_probs, expected.ref_log_probs)


def test_a_simulator_that_cannot_be_saved_says_so(make):
    _, collector = make("Countdown-v0", "ppo", CollectSteps(steps=4))
    collector.environments.envs[0].unwrapped.engine = object()
    state = collector.state_dict()
    assert state["environments"] is None
    with pytest.warns(UserWarning, match="starts new episodes"):
        collector.load_state_dict(state)
    assert collector.collect().inputs["observations"][0, 0, 0] == 0


def test_resuming_with_other_normalization_is_refused(make):
    _, plain = make("Countdown-v0", "ppo", CollectSteps(steps=4))
    _, normalized = make("Countdown-v0", "ppo", CollectSteps(steps=4), normalize_observations=True)
    with pytest.raises(ConfigError, match="observation_normalizer differs"):
        normalized.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    ("preset", "collect", "num_envs", "message"),
    [
        ("grpo", CollectSteps(steps=4), 2, "collect.type.*expected episodes"),
        ("grpo", CollectEpisodes(group_size=1, max_steps=9), 2, "collect.group_size.*at least 2"),
        ("rloo", CollectEpisodes(group_size=1, max_steps=9), 2, "collect.group_size.*at least 2"),
        (
            "grpo",
            CollectEpisodes(group_size=3, max_steps=9),
            4,
            "environment.num_envs.*multiple of collect.group_size = 3",
        ),
        ("grpo", CollectEpisodes(group_size=2), 4, "collect.max_steps"),
    ],
)
def test_bad_settings_get_one_clear_error(make, preset, collect, num_envs, message):
    with pytest.raises(ConfigError, match=message):
        make("Forever-v0", preset, collect, num_envs=num_envs)


def test_environments_that_cannot_be_shared_are_refused(make):
    with pytest.raises(ConfigError, match=r"environment.num_envs.*got 3.*multiple of 2 processes"):
        make("Countdown-v0", "ppo", CollectSteps(), num_envs=3, processes=Processes(count=2))


def test_the_mirror_follows_in_place_steps_and_moved_parameters(make):
    policy, collector = make("CartPole-v1", "ppo", CollectSteps(steps=4))
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)

    def agree():
        with torch.no_grad():
            assert_close(torch.from_numpy(collector.mirror(x)), policy.actor(torch.from_numpy(x)), rtol=1e-5, atol=1e-6)

    agree()
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.1)
    policy.actor(torch.from_numpy(x)).square().sum().backward()
    optimizer.step()
    agree()
    # Flattening gives every parameter new memory; a collector refreshes its views with each rollout.
    for parameter in policy.parameters():
        parameter.data = parameter.data.clone() + 0.1
    collector.collect()
    agree()
