"""The step-0 doctor: each condition is broken on purpose and named; a healthy run passes without a word."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from rlhf.config import Config
from rlhf.core.estimate import estimate
from rlhf.core.presets import ALGORITHMS
from rlhf.errors import TrainingError
from rlhf.lm.actors import make_generator
from rlhf.lm.doctor import Doctor, DoctorConfig, examine
from rlhf.lm.evidence import gather_evidence
from rlhf.lm.loading import LoraSettings, ModelConfig, add_lora, character_tokenizer, load_causal_lm
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.reference import FrozenReference
from rlhf.lm.sampling import SamplingConfig
from rlhf.training.learner import Learner
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig
from rlhf.training.update_config import UpdateConfig
from tests.lm.test_collector import END, MODEL, PROMPTS, TOKENIZER, count_a, make_collector


def make_world(
    *, preset="ppo_rlhf", reward=count_a, limit=12, tokenizer=TOKENIZER, prepare=lambda model: None, lora=False,
    dtype=torch.float32, temper=lambda policy: None, mixed=True, **config,
):  # fmt: skip
    """A collector and a learner over a random model; 16 prompts x 2 completions, so that 'all equal' is no accident."""
    torch.manual_seed(0)
    algorithm = ALGORITHMS[preset]
    model = load_causal_lm(ModelConfig(config=MODEL), TOKENIZER).to(dtype)
    prepare(model)
    model = add_lora(model, LoraSettings(rank=2)) if lora else model
    policy = LanguageModelPolicy(model, critic="head" if algorithm.needs_critic else "none")
    reference = FrozenReference(policy) if algorithm.needs_reference else None
    settings = {"prompts_per_iteration": 16, "sampling": SamplingConfig(max_completion_length=limit), **config}
    collector = make_collector(
        policy,
        generator=make_generator(model, tokenizer),
        reward=reward,
        prompts=PROMPTS * 4,
        reference=reference,
        config=settings,
    )
    collector.tokenizer = tokenizer
    temper(policy)
    return collector, Learner(policy, algorithm, UpdateConfig())


def diagnose(**settings):
    collector, learner = make_world(**settings)
    rollout = collector.collect()
    experience = estimate(rollout, learner.algorithm)
    evidence = gather_evidence(rollout, experience, learner=learner, collector=collector, rows=8)
    return {finding.name: finding for finding in examine(evidence)}


def verdicts(findings):
    return {name: finding.verdict for name, finding in findings.items() if finding.verdict != "ok"}


@pytest.mark.parametrize("settings", [{}, {"preset": "grpo"}, {"preset": "dapo"}, {"lora": True}])
def test_a_healthy_run_passes_without_a_warning(settings):
    findings = diagnose(**settings)
    assert verdicts(findings) == {}
    assert {"ratio", "generator", "reward", "limit", "end_token", "entropy"} <= set(findings)
    # On one machine in one precision policy and reference compute the very same numbers.
    if settings.get("preset") != "dapo":
        assert findings["kl"].measured == "|log policy - log reference| mean 0, max 0"


def with_noise(policy):
    """Dropout that no switch turns off, as functional dropout with training=True in a model's own code."""
    policy.model.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: F.dropout(out + 0.5, 0.5, training=True))


def test_dropout_is_named():
    findings = diagnose(temper=with_noise)
    assert findings["ratio"].verdict == "refused"
    assert "dropout" in findings["ratio"].remedy
    assert "dropout" in findings["kl"].remedy


def sharpen(model, factor=30.0):
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)


def at_half_the_temperature(policy):
    policy.temperature = 0.5


def test_a_generator_at_another_temperature_is_named():
    # Of a sharp model, softmax(logits) and softmax(2 logits) differ by tenths of a nat.
    findings = diagnose(preset="dapo", prepare=sharpen, temper=at_half_the_temperature)
    assert findings["generator"].verdict == "refused"
    assert "temperature" in findings["generator"].remedy
    assert findings["ratio"].verdict == "ok"  # trainer and trainer agree


def disturb(policy):
    with torch.no_grad():
        policy.model.lm_head.weight.add_(torch.randn_like(policy.model.lm_head.weight))


def test_a_reference_that_is_another_model_is_named():
    findings = diagnose(temper=disturb)
    assert findings["kl"].verdict == "refused"
    assert "not the model that training starts from" in findings["kl"].remedy
    assert findings["ratio"].verdict == "ok"


def test_filtered_sampling_is_explained_and_allowed():
    findings = diagnose(sampling=SamplingConfig(max_completion_length=12, top_p=0.6))
    assert findings["generator"].verdict == "ok"
    assert "renormalise" in findings["generator"].remedy


def constant(completions, **columns):
    return [0.5] * len(completions)


def test_a_constant_reward_is_named():
    findings = diagnose(reward=constant)
    assert findings["reward_varies"].verdict == "refused"
    assert findings["reward_varies"].measured == "from 0.5 to 0.5 over 32 completions"
    # Eight completions may be equal by accident.
    assert diagnose(reward=constant, prompts_per_iteration=4)["reward_varies"].verdict == "warning"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_is_named(bad):
    """Reward functions are checked when they answer; this is the net under collectors of other kinds."""
    collector, learner = make_world()
    rollout = collector.collect()
    rewards = rollout.rewards.clone()
    rewards[:8][rollout.episode_ends[:8]] = bad
    broken = replace(rollout, rewards=rewards)
    experience = estimate(broken, learner.algorithm)
    evidence = gather_evidence(broken, experience, learner=learner, collector=collector, rows=8)
    finding = next(finding for finding in examine(evidence) if finding.name == "reward")
    assert (finding.verdict, finding.measured) == ("refused", "8 of 32 not finite")


def by_prompt(prompts, completions, **columns):
    return [float(len(prompt)) for prompt in prompts]


def test_groups_without_variance_are_named():
    findings = diagnose(preset="grpo", reward=by_prompt)
    assert findings["groups"].verdict == "refused"
    assert findings["groups"].measured == "100% of groups have equal rewards"
    assert findings["reward_varies"].verdict == "ok"
    assert diagnose(preset="grpo", reward=by_prompt, prompts_per_iteration=4)["groups"].verdict == "warning"
    # PPO with a critic does not compare within groups.
    assert diagnose(reward=by_prompt)["groups"].verdict == "ok"


def test_a_limit_that_is_too_short_is_named():
    # A random model ends after its first token once in seven times.
    finding = diagnose(limit=1)["limit"]
    assert finding.verdict == "warning"
    assert "max_completion_length" in finding.remedy


def without_end(model):
    def suppress(_module, _arguments, logits):
        logits = logits.clone()
        logits[..., END] -= 60.0
        return logits

    model.lm_head.register_forward_hook(suppress)


def test_a_suppressed_end_token_is_named():
    findings = diagnose(prepare=without_end)
    assert findings["end_token"].verdict == "refused"
    assert findings["limit"].verdict == "warning"


def test_an_end_token_outside_the_vocabulary_is_named():
    tokenizer = character_tokenizer("abc>")
    tokenizer.add_special_tokens({"eos_token": "<never>"})
    findings = diagnose(tokenizer=tokenizer)
    assert (findings["end_token"].verdict, findings["end_token"].measured) == ("refused", "outside the vocabulary")


def test_a_policy_that_is_certain_already_is_named():
    assert diagnose(prepare=lambda model: sharpen(model, 1e5))["entropy"].verdict == "warning"


def test_bfloat16_is_graded_as_bfloat16():
    # Rounding to 8 bits moves log-probs by up to about 1e-2; that is no reason to refuse.
    findings = diagnose(dtype=torch.bfloat16)
    assert "refused" not in verdicts(findings).values()


class Settings(Config):
    """Nothing."""


def make_doctor(folder, config=None, **settings):
    collector, learner = make_world(**settings)
    run = Run(RunConfig(directory=str(folder), progress_bar=False), resolved=Settings(), iterations=3)
    doctor = Doctor(config or DoctorConfig(), run=run, learner=learner, collector=collector)
    rollout = collector.collect()
    return doctor, rollout, estimate(rollout, learner.algorithm)


def test_a_refusal_ends_the_run_with_remedy_and_record(tmp_path, capsys):
    doctor, rollout, experience = make_doctor(tmp_path, reward=constant)
    with pytest.raises(TrainingError, match=r"train on garbage: reward_varies.*doctor.allow=\[reward_varies\]"):
        doctor.before_update(1, rollout, experience)
    checks = json.loads((tmp_path / "doctor.json").read_text())["checks"]
    assert {check["name"]: check["verdict"] for check in checks}["reward_varies"] == "refused"
    assert "before the first update" in capsys.readouterr().out


def test_what_is_allowed_is_a_warning_and_later_iterations_are_not_examined(tmp_path):
    doctor, rollout, experience = make_doctor(tmp_path, DoctorConfig(allow=["reward_varies"]), reward=constant)
    assert doctor.before_update(2, rollout, experience) is None
    assert not (tmp_path / "doctor.json").exists()
    assert doctor.before_update(1, rollout, experience) is None
    checks = json.loads((tmp_path / "doctor.json").read_text())["checks"]
    assert {check["name"]: check["verdict"] for check in checks}["reward_varies"] == "warning"


def test_the_doctor_changes_nothing(tmp_path):
    doctor, rollout, experience = make_doctor(tmp_path)
    policy = doctor._learner.policy
    before, random = {k: v.clone() for k, v in policy.state_dict().items()}, torch.get_rng_state()
    doctor.before_update(1, rollout, experience)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_the_console_gets_a_table_and_the_remedies(tmp_path, capsys):
    doctor, rollout, experience = make_doctor(tmp_path, limit=1)
    doctor.before_update(1, rollout, experience)
    said = capsys.readouterr().out
    assert all(name in said for name in ("ratio", "generator", "reward_varies", "end_token"))
    assert "limit: most answers are judged unfinished: raise collector.sampling.max_completion_length" in said


def test_lambda_of_rows_that_are_too_short_for_it(monkeypatch):
    """VAPO's lambda is 1 - 1 / (.05 x length), so 0 below 20 tokens; with alpha 4 no row of 1 token or more has 0."""
    finding = diagnose(preset="vapo", limit=12)["credit"]
    assert (finding.verdict, finding.measured) == ("warning", "lambda is 0 for 100% of the rows")
    assert "length_adaptive" in finding.remedy
    vapo = ALGORITHMS["vapo"]
    longer = vapo.model_copy(update={"advantages": vapo.advantages.model_copy(update={"length_adaptive": 4.0})})
    monkeypatch.setitem(ALGORITHMS, "vapo", longer)
    assert diagnose(preset="vapo", limit=12)["credit"].verdict == "ok"
    assert "credit" not in diagnose(preset="ppo_rlhf")
