"""Watching: each way of going wrong is told once, with its remedy; a healthy run is left in peace."""

import pytest
import torch

from rlhf.core.types import Rollout
from rlhf.lm.watch import Watch, WatchConfig

HEALTHY = {
    "kl_to_ref": 0.02,
    "kl_to_ref_per_sequence": 1.0,
    "entropy": 2.0,
    "rollout/length_mean": 50.0,
    "clip_fraction": 0.1,
    "explained_variance": 0.3,
}


def watch_over(*changes, config=None, **settings):
    """A watch that has seen a healthy iteration and then these."""
    said = []
    watch = Watch(config or WatchConfig(), say=said.append, **settings)
    watch.after_update(1, HEALTHY)
    for number, change in enumerate(changes):
        metrics = watch.after_update(number + 2, {**HEALTHY, **change})
    return watch, said, metrics


def test_a_healthy_run_is_left_in_peace():
    noisy = [{"entropy": 1.5, "rollout/length_mean": 70.0, "clip_fraction": 0.5, "explained_variance": -0.1}, {}] * 15
    watch, said, metrics = watch_over(*noisy)
    assert said == []
    assert watch.warnings == ()
    assert metrics == {"watch/entropy_ratio": 1.0, "watch/length_ratio": 1.0, "watch/warnings": 0.0}


@pytest.mark.parametrize(
    ("name", "change", "iterations", "told"),
    [
        ("kl_runaway", {"kl_to_ref": 0.5, "kl_to_ref_per_sequence": 26.0}, 1, "KL coefficient"),
        ("negative_kl", {"kl_to_ref": -0.02}, 3, "top_p"),
        ("entropy_collapse", {"entropy": 0.19}, 1, "clip_high"),  # 0.19 of 2.0 nats is less than a tenth
        ("length_drift", {"rollout/length_mean": 101.0}, 1, "2 times as long"),
        ("length_drift", {"rollout/length_mean": 24.0}, 1, "0.48 times as long"),
        ("clipping", {"clip_fraction": 0.41}, 3, "target_kl"),
        ("critic", {"explained_variance": -0.01}, 20, "warmup_iterations"),
    ],
)
def test_what_goes_wrong_is_told_once_with_a_remedy(name, change, iterations, told):
    watch, _, _ = watch_over(*[change] * (iterations - 1), {})
    assert watch.warnings == ()
    watch, said, metrics = watch_over(*[change] * iterations)
    assert watch.warnings == (name,)
    assert told in said[0]
    assert "Remedy:" in said[0]
    assert f"(iteration {iterations + 1})" in said[0]
    assert metrics["watch/warnings"] == 1.0
    watch, said, _ = watch_over(*[change] * (iterations * 3))
    assert len(said) == 1


def test_a_large_kl_of_a_long_completion_is_no_runaway():
    # 1000 tokens of 0.04 nats each: 40 nats a sequence, and still the same language.
    watch, _, _ = watch_over({"kl_to_ref": 0.04, "kl_to_ref_per_sequence": 40.0})
    assert watch.warnings == ()


def test_ratios_per_sequence_may_clip():
    watch, _, _ = watch_over(*[{"clip_fraction": 0.6}] * 5, clips_tokens=False)
    assert watch.warnings == ()


def evaluations(*pairs, error=0.01):
    said = []
    watch = Watch(WatchConfig(), say=said.append)
    for score, gold in pairs:
        watch.look_at_evaluation(
            {"sampled_score_mean": score, "sampled_gold_mean": gold, "sampled_gold_standard_error": error}
        )
    return watch.warnings


def test_a_rising_reward_with_a_falling_gold_score_is_overoptimization():
    assert evaluations((0.0, 0.5), (1.0, 0.6), (2.0, 0.5)) == ("overoptimization",)
    assert evaluations((0.0, 0.5), (1.0, 0.6), (2.0, 0.7)) == ()  # both rise
    assert evaluations((0.0, 0.5), (1.0, 0.6), (0.5, 0.5)) == ()  # both fall: another illness
    # 0.6 - 0.5 is 0.1; of errors 0.05 each, two standard errors of the difference are 0.14.
    assert evaluations((0.0, 0.5), (1.0, 0.6), (2.0, 0.5), error=0.05) == ()


def test_an_evaluation_without_gold_is_not_judged():
    watch = Watch(WatchConfig(), say=print)
    assert watch.watching(lambda: {"greedy_score_mean": 1.0})() == {"greedy_score_mean": 1.0}
    assert watch.warnings == ()


def rollout_with(kl):
    one = torch.ones(1, 1)
    metrics = {} if kl is None else {"rollout/kl_to_ref_per_sequence": kl}
    return Rollout(
        inputs={}, actions=one.long(), action_mask=one.bool(), rewards=one, old_log_probs=-one,
        episode_ends=one.bool(), metrics=metrics,
    )  # fmt: skip


@pytest.mark.parametrize(("budget", "kl", "ends"), [(2.0, 1.9, False), (2.0, 2.1, True), (None, 99.0, False)])
def test_the_budget_ends_the_run(budget, kl, ends):
    # Also where nothing else is watched.
    watch = Watch(WatchConfig(kl_budget=budget, enabled=False), say=print)
    reason = watch.before_update(1, rollout_with(kl), None)
    assert (reason is not None) == ends
    if ends:
        assert "2.1 nats per sequence" in reason
        assert "budget of 2" in reason


def test_it_can_be_silenced():
    _, said, metrics = watch_over({"entropy": 0.0}, config=WatchConfig(enabled=False))
    assert said == []
    assert metrics == {}


def test_a_resumed_watch_goes_on():
    watch, _, _ = watch_over({"clip_fraction": 0.5}, {"clip_fraction": 0.5}, {"entropy": 0.1, "clip_fraction": 0.5})
    assert watch.warnings == ("entropy_collapse", "clipping")
    said = []
    resumed = Watch(WatchConfig(), say=said.append)
    resumed.load_state_dict(watch.state_dict())
    metrics = resumed.after_update(9, {**HEALTHY, "entropy": 0.1})
    assert said == []  # told before the stop
    assert metrics["watch/entropy_ratio"] == pytest.approx(0.05)  # of the first iteration's 2.0
