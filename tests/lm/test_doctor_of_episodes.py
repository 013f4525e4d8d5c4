"""The step-0 doctor over conversations: the same checks over turns, with remedies that exist there."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rlhf.commands.recipes import find_recipe, import_recipe
from rlhf.config import validate
from rlhf.core.estimate import estimate
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import ConfigError, TrainingError
from rlhf.lm.actors import make_generator
from rlhf.lm.doctor import examine
from rlhf.lm.episode_collector import EpisodeCollector, EpisodeCollectorConfig
from rlhf.lm.evidence import gather_evidence
from rlhf.lm.loading import ModelConfig, load_causal_lm
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.reference import FrozenReference
from rlhf.lm.sampling import SamplingConfig
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig
from tests.lm.test_text_environments import MODEL, TOKENIZER, Talk
from tests.recipes.test_text_environment import settings


class Loud(Talk):
    """Rewards each turn by the letters it hears."""

    def step(self, completion):
        messages, _, terminated, truncated = super().step(completion)
        return messages, float(len(completion)), terminated, truncated


class Deaf(Talk):
    """Rewards every turn alike."""

    def step(self, completion):
        messages, _, terminated, truncated = super().step(completion)
        return messages, 0.5, terminated, truncated


def diagnose(factory=Loud, *, preset="ppo_rlhf", temper=lambda policy: None, limit=6, room=64, group_size=1):
    """Findings over 32 episodes of two turns by a random model."""
    torch.manual_seed(0)
    algorithm = ALGORITHMS[preset]
    model = load_causal_lm(ModelConfig(config=MODEL), TOKENIZER)
    policy = LanguageModelPolicy(model, critic="head" if algorithm.needs_critic else "none")
    collector = EpisodeCollector(
        factory,
        policy=policy,
        generator=make_generator(model, TOKENIZER),
        tokenizer=TOKENIZER,
        config=EpisodeCollectorConfig(
            starts_per_iteration=32 // group_size,
            group_size=group_size,
            sampling=SamplingConfig(max_completion_length=limit),
            max_episode_length=room,
        ),
        reference=FrozenReference(policy) if algorithm.needs_reference else None,
    )
    learner = Learner(policy, algorithm, UpdateConfig())
    temper(policy)
    rollout = collector.collect()
    experience = estimate(rollout, algorithm)
    evidence = gather_evidence(rollout, experience, learner=learner, collector=collector, rows=8)
    return {finding.name: finding for finding in examine(evidence)}


def verdicts(findings):
    return {name: finding.verdict for name, finding in findings.items() if finding.verdict != "ok"}


@pytest.mark.parametrize(("preset", "group_size"), [("ppo_rlhf", 1), ("grpo", 4)])
def test_healthy_conversations_pass_without_a_warning(preset, group_size):
    findings = diagnose(preset=preset, group_size=group_size, limit=12, room=96)
    assert verdicts(findings) == {}
    # Rows of other batches, so of products of other sizes: float32 rounds differently in the last places.
    for name in ("ratio", "kl"):
        assert float(findings[name].measured.rpartition("max ")[2]) < 1e-5
    assert "of turns cut at 12 tokens" in findings["limit"].measured
    assert findings["room"].measured == "0% of episodes without room for one more turn"


def with_noise(policy):
    """Dropout that no switch turns off."""
    policy.model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: F.dropout(out + 0.5, 0.5, training=True))


def test_dropout_is_named_over_the_policys_own_tokens():
    findings = diagnose(temper=with_noise)
    assert findings["ratio"].verdict == "refused"
    assert "dropout" in findings["ratio"].remedy


def at_half_the_temperature(policy):
    with torch.no_grad():
        policy.model.lm_head.weight.mul_(30.0)
    policy.temperature = 0.5


def test_another_temperature_is_named():
    findings = diagnose(preset="dapo", temper=at_half_the_temperature, group_size=4)
    assert findings["generator"].verdict == "refused"
    assert findings["ratio"].verdict == "ok"


def test_a_reward_that_never_differs_is_refused():
    finding = diagnose(Deaf)["reward_varies"]
    assert (finding.verdict, finding.measured) == ("refused", "from 1 to 1 over 32 completions")  # two turns of .5
    assert "start states" in finding.remedy
    assert diagnose(Deaf, preset="grpo", group_size=4)["groups"].verdict == "refused"


def test_cut_turns_get_a_remedy_that_exists():
    """A random model over 8 tokens ends a turn at its first token once in eight times."""
    finding = diagnose(limit=1)["limit"]
    assert finding.verdict == "warning"
    assert "shaping" not in finding.remedy
    assert "mask_truncated" not in finding.remedy


def test_episodes_without_room_are_named_apart_from_those_the_environment_cuts():
    # One turn of 6 tokens and an answer of 4 leave no room for another 6 in 8.
    finding = diagnose(room=8)["room"]
    assert finding.verdict == "warning"
    assert "max_episode_length" in finding.remedy
    assert diagnose(lambda: Loud(ends="truncated"))["room"].verdict == "ok"


def test_rewards_that_are_not_finite_are_named():
    torch.manual_seed(0)
    model = load_causal_lm(ModelConfig(config=MODEL), TOKENIZER)
    policy = LanguageModelPolicy(model, critic="head")
    config = EpisodeCollectorConfig(
        starts_per_iteration=4, sampling=SamplingConfig(max_completion_length=6), max_episode_length=64
    )
    collector = EpisodeCollector(
        Loud, policy=policy, generator=make_generator(model, TOKENIZER), tokenizer=TOKENIZER, config=config
    )
    learner = Learner(policy, ALGORITHMS["ppo"], UpdateConfig())
    rollout = collector.collect()
    broken = replace(rollout, rewards=torch.where(rollout.episode_ends, torch.nan, rollout.rewards))
    evidence = gather_evidence(
        broken, estimate(broken, learner.algorithm), learner=learner, collector=collector, rows=4
    )
    assert verdicts({one.name: one for one in examine(evidence)})["reward"] == "refused"


def run(values):
    module = import_recipe(find_recipe("text_environment"))
    return module.main(validate(module.CONFIG, values))


def test_the_recipe_asks_the_doctor(tmp_path):
    run(settings(tmp_path / "healthy", iterations=1))
    checks = json.loads((tmp_path / "healthy" / "doctor.json").read_text())["checks"]
    assert {check["name"] for check in checks} > {"ratio", "kl", "generator", "limit", "room"}
    assert "refused" not in {check["verdict"] for check in checks}
    run(settings(tmp_path / "silent", iterations=1, doctor={"enabled": False}))
    assert not (tmp_path / "silent" / "doctor.json").exists()


DEAF = """
class Deaf:
    alphabet = "ab>\\n"

    def reset(self, *, seed=None):
        return [{"role": "user", "content": "a"}]

    def step(self, completion):
        return [], 0.5, True, False
"""


def test_the_recipe_refuses_what_would_train_on_garbage(tmp_path, monkeypatch):
    (tmp_path / "deaf_environment.py").write_text(DEAF)
    monkeypatch.chdir(tmp_path)
    values = settings(tmp_path / "run", environment={"function": "deaf_environment:Deaf"})
    values["collector"] |= {"starts_per_iteration": 32, "group_size": 1}
    with pytest.raises(TrainingError, match=r"reward_varies.*doctor.allow=\[reward_varies\]"):
        run(values)
    run({**values, "doctor": {"allow": ["reward_varies"]}, "run": {**values["run"], "directory": str(tmp_path / "b")}})


def test_groups_of_one_are_refused(tmp_path):
    values = settings(tmp_path, algorithm="grpo")
    values["collector"]["group_size"] = 1
    with pytest.raises(ConfigError, match="only one of each"):
        run(values)
