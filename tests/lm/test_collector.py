"""The prompt collector: where rewards sit, what is measured, what resumes, what is refused."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from rlhf.core.advantages import group_relative
from rlhf.core.algorithm import TruncatedWeights
from rlhf.core.estimate import estimate
from rlhf.core.presets import ALGORITHMS
from rlhf.data.records import Prompt
from rlhf.errors import ConfigError, DataError, RewardError, TrainingError
from rlhf.lm.actors import make_generator
from rlhf.lm.collector import PromptCollector
from rlhf.lm.collector_config import CollectorConfig, DynamicSampling, ShapingConfig
from rlhf.lm.generation import Generation
from rlhf.lm.judging import rows_to_learn_from, shape_scores, telling_groups
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.prompt_stream import PromptStream
from rlhf.lm.reference import FrozenReference
from rlhf.lm.sampling import SamplingConfig
from rlhf.rewards.combination import CombinedReward, RewardPart
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig

TOKENIZER = character_tokenizer("abc>")
PAD, END, A, B = 0, 2, 3, 4
MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 2, "max_position_embeddings": 32}
PROMPTS = [Prompt(text, {"answer": text[0]}) for text in ("a>", "bb>", "ccc>", "abc>")]


class Scripted:
    """A generator that writes what it is told, whatever the prompt."""

    def __init__(self, *completions: list[int], limit: int = 4) -> None:
        self.completions, self.limit = completions, limit

    def generate(self, prompt_ids, prompt_mask, *, group_size=1, sampling, generator=None):
        rows = [self.completions[row % len(self.completions)] for row in range(len(prompt_ids) * group_size)]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
        ended = torch.tensor([row[-1] == END for row in rows])
        return Generation(
            completion_ids=ids, completion_mask=mask, sampling_log_probs=torch.zeros(ids.shape), ended=ended
        )


def count_a(completions, **columns):
    return [float(text.count("a")) for text in completions]


def make_policy(**arguments) -> LanguageModelPolicy:
    torch.manual_seed(0)
    return LanguageModelPolicy(load_causal_lm(ModelConfig(config=MODEL), TOKENIZER), **arguments)


def make_collector(policy=None, *, generator=None, reward=count_a, prompts=PROMPTS, **arguments) -> PromptCollector:
    policy = policy or make_policy()
    config = CollectorConfig(
        **{
            "prompts_per_iteration": 2,
            "group_size": 2,
            "sampling": SamplingConfig(max_completion_length=4),
            **arguments.pop("config", {}),
        }
    )
    return PromptCollector(
        prompts,
        policy=policy,
        generator=generator or make_generator(policy.model, TOKENIZER),
        tokenizer=TOKENIZER,
        reward=reward,
        config=config,
        **arguments,
    )


def test_the_score_sits_on_the_end_token_and_never_on_padding():
    rollout = make_collector(generator=Scripted([A, END], [A, A, B, END])).collect()
    assert rollout.rewards[0].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert rollout.rewards[1].tolist() == [0.0, 0.0, 0.0, 2.0]
    assert rollout.episode_ends[0].tolist() == [False, True, False, False]
    assert rollout.action_mask[0].tolist() == [True, True, False, False]
    assert rollout.scores.tolist() == [1.0, 2.0, 1.0, 2.0]


def test_a_pad_token_that_is_the_end_token_does_not_move_the_score():
    tokenizer = character_tokenizer("abc>")
    tokenizer.pad_token = tokenizer.eos_token
    policy = make_policy()
    collector = make_collector(policy, generator=Scripted([A, END], [A, A, B, END]))
    collector.tokenizer = tokenizer
    assert collector.collect().rewards[0].tolist() == [0.0, 1.0, 0.0, 0.0]


def test_a_completion_cut_at_the_limit_is_scored_on_its_last_token():
    rollout = make_collector(generator=Scripted([A, END], [A, B, B, B])).collect()
    assert rollout.rewards[1].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert rollout.episode_ends[1].tolist() == [False, False, False, True]
    assert rollout.metrics["rollout/truncated_fraction"] == 0.5


def test_the_reward_sees_text_without_special_tokens_and_the_columns_of_its_prompt():
    seen = {}

    def reward(prompts, completions, answer):
        seen.update(prompts=prompts, completions=completions, answer=answer)
        return [0.0] * len(completions)

    make_collector(generator=Scripted([A, B, END]), reward=reward).collect()
    assert seen["completions"] == ["ab"] * 4
    assert seen["prompts"][0] == seen["prompts"][1] != seen["prompts"][2]
    assert [prompt[0] for prompt in seen["prompts"]] == seen["answer"]


def test_chat_prompts_get_chat_completions():
    tokenizer = character_tokenizer("abc>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    seen = []

    def reward(completions, **columns):
        seen.extend(completions)
        return [0.0] * len(completions)

    policy = make_policy()
    PromptCollector(
        [Prompt([{"role": "user", "content": "ab"}])],
        policy=policy,
        generator=Scripted([A, END]),
        tokenizer=tokenizer,
        reward=reward,
        config=CollectorConfig(prompts_per_iteration=1, sampling=SamplingConfig(max_completion_length=4)),
    ).collect()
    assert seen == [[{"role": "assistant", "content": "a"}]]


def test_groups_follow_the_position_of_the_prompt_not_its_text():
    """Two equal prompts are two groups (Search-R1 #88: ids by text silently changed the baseline)."""
    same = [Prompt("a>"), Prompt("a>")]
    rollout = make_collector(prompts=same).collect()
    assert rollout.group_ids.tolist() == [0, 0, 1, 1]


def test_old_log_probs_are_those_of_a_plain_forward():
    policy = make_policy()
    rollout = make_collector(policy, config={"measure_tokens": 8}).collect()
    for row in range(4):
        prompt = rollout.inputs["prompt_ids"][row][rollout.inputs["prompt_mask"][row]]
        completion = rollout.actions[row][rollout.action_mask[row]]
        logits = policy.model(torch.cat([prompt, completion])[None]).logits[0]
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, completion[:, None]).squeeze(1)
        got = rollout.old_log_probs[row][rollout.action_mask[row]]
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            rollout.sampling_log_probs[row][rollout.action_mask[row]], expected, rtol=1e-4, atol=1e-5
        )
    assert rollout.metrics["rollout/sampling_mismatch_mean"] < 1e-5


def test_the_reference_equals_the_policy_exactly_before_the_first_update():
    policy = make_policy()
    rollout = make_collector(policy, reference=FrozenReference(policy)).collect()
    assert torch.equal(rollout.ref_log_probs, rollout.old_log_probs)
    assert rollout.metrics["rollout/kl_to_ref"] == 0.0


def test_next_values_are_the_following_tokens_values_and_zero_after_the_end():
    policy = make_policy(critic="head")
    torch.nn.init.normal_(policy.value_head.weight)
    rollout = make_collector(policy, generator=Scripted([A, B, END], [A, END])).collect()
    values, following = rollout.values, rollout.next_values
    assert values.abs().sum() > 0
    assert torch.equal(following[0], torch.stack([values[0, 1], values[0, 2], torch.tensor(0.0)]))
    assert following[1, 0] == values[1, 1]
    assert following[1, 1] == 0.0


def test_prompts_come_once_each_before_any_comes_twice():
    stream = PromptStream(6, batch=4, seed=3)
    taken = stream.take() + stream.take() + stream.take()
    assert sorted(taken[:6]) == sorted(taken[6:]) == list(range(6))
    assert taken[:6] != taken[6:]


def test_processes_share_one_stream():
    whole = PromptStream(7, batch=4, seed=1)
    parts = [PromptStream(7, batch=4, process=rank, processes=2, seed=1) for rank in range(2)]
    for _ in range(5):
        assert whole.take() == [index for part in parts for index in part.take()]


def test_resume_draws_what_the_uninterrupted_collector_draws():
    policy = make_policy()
    first = make_collector(policy)
    first.collect()
    state = first.state_dict()
    expected = first.collect()
    second = make_collector(policy)
    second.load_state_dict(state)
    resumed = second.collect()
    assert torch.equal(resumed.actions, expected.actions)
    assert torch.equal(resumed.rewards, expected.rewards)
    assert resumed.metrics == expected.metrics


def test_different_iterations_draw_different_completions():
    collector = make_collector(prompts=[Prompt("a>")], config={"prompts_per_iteration": 1, "group_size": 16})
    first, second = collector.collect(), collector.collect()
    assert first.actions.shape != second.actions.shape or not torch.equal(first.actions, second.actions)


def test_shaping_in_order():
    # Clip 9 to 5; the unended one gets -1 whatever its score; lengths 3 and 4 of 4 lie in the buffer of 2: -0.5, -1.
    shaping = ShapingConfig(score_clip=5.0, missing_end_score=-1.0, overlong_buffer=2)
    scores = shape_scores(
        torch.tensor([9.0, 1.0, 1.0]),
        shaping,
        ended=torch.tensor([True, True, False]),
        lengths=torch.tensor([2, 3, 4]),
        limit=4,
    )
    assert scores.tolist() == [5.0, 0.5, -2.0]


def test_raw_scores_are_logged_and_shaped_ones_are_learned_from():
    collector = make_collector(generator=Scripted([A, A, END]), config={"shaping": {"score_clip": 0.5}})
    rollout = collector.collect()
    assert rollout.metrics["rollout/score_mean"] == 2.0
    assert rollout.scores.tolist() == [0.5] * 4
    assert rollout.samples[0]["score"] == 2.0
    assert rollout.samples[0]["reward"] == 0.5


def test_dynamic_sampling_replaces_uniform_groups():
    """Rows 0-3 of each round: groups (1, 1) and (1, 0); two rounds give two groups that differ."""
    generator = Scripted([A, END], [A, END], [A, END], [B, END])
    collector = make_collector(generator=generator, config={"dynamic_sampling": DynamicSampling(max_rounds=3)})
    rollout = collector.collect()
    assert rollout.scores.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert rollout.group_ids.tolist() == [0, 0, 1, 1]
    assert rollout.metrics["rollout/rounds"] == 2.0
    assert rollout.metrics["rollout/uniform_groups_fraction"] == 0.5
    assert rollout.metrics["rollout/uniform_groups_kept_fraction"] == 0.0


def test_a_shortfall_of_dynamic_sampling_is_told(caplog):
    collector = make_collector(generator=Scripted([A, END]), config={"dynamic_sampling": DynamicSampling(max_rounds=2)})
    rollout = collector.collect()
    assert rollout.metrics["rollout/uniform_groups_kept_fraction"] == 1.0
    assert len(rollout.scores) == 4
    assert "scores are all equal" in caplog.text


def test_a_shortfall_can_stop_the_run():
    dynamic = DynamicSampling(max_rounds=2, on_shortfall="error")
    collector = make_collector(generator=Scripted([A, END]), config={"dynamic_sampling": dynamic})
    with pytest.raises(TrainingError, match="max_rounds"):
        collector.collect()


def test_telling_groups_keep_their_order():
    rewards = torch.tensor([0.0, 1.0, 2.0, 2.0, 3.0, 4.0])
    groups, uniform = telling_groups(rewards, group_size=2, quota=2)
    assert (groups.tolist(), uniform) == ([0, 2], 0)


def test_truncated_rows_leave_their_group():
    """The advantage of the others is that of a group without the truncated row: here (1, 3) around 2."""
    generator = Scripted([A, END], [A, A, A, END], [A, A, A, A], [B, B, B, B], limit=4)
    config = {"prompts_per_iteration": 1, "group_size": 4, "mask_truncated": True}
    rollout = make_collector(generator=generator, config=config).collect()
    assert rollout.scores.tolist() == [1.0, 3.0]
    advantages = group_relative(rollout.scores, rollout.group_ids, scale="none")
    assert advantages.tolist() == [-1.0, 1.0]


def test_a_group_of_which_one_row_ended_is_left_out():
    ended = torch.tensor([True, False, True, True])
    assert rows_to_learn_from(ended, torch.tensor([0, 0, 1, 1]), grouped=True).tolist() == [2, 3]
    assert rows_to_learn_from(ended, torch.tensor([0, 0, 1, 1]), grouped=False).tolist() == [0, 2, 3]


def test_masking_everything_is_an_error():
    collector = make_collector(generator=Scripted([B, B, B, B]), config={"mask_truncated": True})
    with pytest.raises(TrainingError, match="max_completion_length"):
        collector.collect()


def test_auto_takes_the_generators_log_probs_only_after_a_check():
    collector = make_collector()
    first, second = collector.collect(), collector.collect()
    assert "rollout/sampling_mismatch_mean" in first.metrics
    assert "rollout/sampling_mismatch_mean" not in second.metrics
    assert torch.equal(second.old_log_probs, second.sampling_log_probs)


def scorings(collector) -> list[int]:
    """Iterations of 21 in which the policy scored what was drawn."""
    seen = []
    count_forward = collector.policy.model.model.register_forward_pre_hook(lambda *_: seen.append(len(rollouts)))
    rollouts = []
    for _ in range(21):
        rollouts.append(collector.collect())
    count_forward.remove()
    return sorted(set(seen))


def test_where_one_step_is_made_it_gives_the_old_log_probs():
    """A generator that disagrees, as one in bfloat16 does: its log-probs of 0 must not get into the ratio."""
    collector = make_collector(generator=Scripted([A, END], [A, B, END]), algorithm=ALGORITHMS["dr_grpo"])
    assert scorings(collector) == [0, 20]
    rollout = collector.collect()
    assert rollout.on_policy
    assert "rollout/entropy" not in rollout.metrics
    assert "rollout/sampling_mismatch_mean" not in rollout.metrics


@pytest.mark.parametrize(
    ("name", "changes", "config"),
    [
        ("ppo_rlhf", {"epochs": 1}, {}),  # KL in the reward
        ("dr_grpo", {"epochs": 2}, {}),
        ("dr_grpo", {"minibatches": 2}, {}),
        ("dr_grpo", {"rollout_correction": TruncatedWeights()}, {}),
        ("dr_grpo", {}, {"old_log_probs": "recompute"}),
    ],
)
def test_what_needs_old_log_probs_before_the_step_gets_them(name, changes, config):
    algorithm = ALGORITHMS[name].model_copy(update=changes)
    policy = policy_with_critic() if algorithm.needs_critic else make_policy()
    reference = FrozenReference(policy) if algorithm.needs_reference else None
    generator = Scripted([A, END], [A, B, END])
    collector = make_collector(policy, generator=generator, algorithm=algorithm, config=config, reference=reference)
    assert scorings(collector) == list(range(21))
    assert not collector.collect().on_policy


def test_top_p_tells_no_distance_to_a_reference():
    algorithm = ALGORITHMS["grpo"]
    policy = make_policy()
    for sampling, skips in (({}, True), ({"top_p": 0.9}, False)):
        config = {"sampling": SamplingConfig(max_completion_length=4, **sampling)}
        collector = make_collector(
            policy, generator=Scripted([A, END]), algorithm=algorithm, config=config, reference=FrozenReference(policy)
        )
        assert [collector.collect().on_policy for _ in range(2)] == [False, skips]


def test_a_step_with_its_own_old_log_probs_is_the_step_with_recomputed_ones():
    weights = {}
    for old in ("auto", "recompute"):
        policy, algorithm = make_policy(), ALGORITHMS["grpo"]
        generator, reference = Scripted([A, END], [A, B, END], [B, A, A, B]), FrozenReference(make_policy())
        config = {"old_log_probs": old, "group_size": 3}
        collector = make_collector(policy, generator=generator, algorithm=algorithm, config=config, reference=reference)
        learner = Learner(policy, algorithm, UpdateConfig(learning_rate=1e-2, microbatch_rows=4))
        for iteration in range(3):
            rollout = collector.collect()
            assert rollout.on_policy == (old == "auto" and iteration > 0)
            own = policy.action_log_probs(rollout.inputs, rollout.actions)[rollout.action_mask]
            metrics = learner.update(estimate(rollout, algorithm), kl_coef=0.04)
        assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
        mismatch = metrics if rollout.on_policy else rollout.metrics  # the generator said 0 everywhere
        name = "sampling_mismatch_mean" if rollout.on_policy else "rollout/sampling_mismatch_mean"
        assert mismatch[name] == pytest.approx(own.abs().mean().item(), rel=1e-5)
        weights[old] = dict(policy.named_parameters())
    for name, expected in weights["recompute"].items():
        torch.testing.assert_close(weights["auto"][name], expected, atol=2e-6, rtol=1e-5)
        assert not torch.allclose(expected, dict(make_policy().named_parameters())[name], atol=1e-4)


def test_a_critic_of_its_own_is_asked_without_the_policy():
    policy = policy_with_critic()
    collector = make_collector(policy)
    collector.collect()
    rollout = collector.collect()
    assert torch.equal(rollout.old_log_probs, rollout.sampling_log_probs)
    expected = policy(rollout.inputs, rollout.actions)
    torch.testing.assert_close(rollout.values, expected.values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rollout.old_log_probs, expected.log_probs, atol=1e-4, rtol=1e-5)


def policy_with_critic() -> LanguageModelPolicy:
    torch.manual_seed(1)
    policy = make_policy(critic=load_causal_lm(ModelConfig(config=MODEL), TOKENIZER))
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


def policy_with_head() -> LanguageModelPolicy:
    policy = make_policy(critic="head")
    torch.nn.init.normal_(policy.value_head.weight)
    return policy


def ppo_step(make, *, keep: bool, epochs: int) -> tuple[LanguageModelPolicy, list[int]]:
    """A policy after one rollout and update, and how many rows each forward of its critic's body read."""
    policy = make()
    body = policy.model.model if policy.critic is None else policy.critic
    algorithm = ALGORITHMS["ppo_rlhf"].model_copy(update={"epochs": epochs})
    rows: list[int] = []
    settings = {"prompts_per_iteration": 4, "keep_forward": keep}
    collector = make_collector(policy, config=settings, algorithm=algorithm, reference=FrozenReference(policy))
    learner = Learner(policy, algorithm, UpdateConfig(learning_rate=1e-2, microbatch_rows=3))
    collector.generator.generate = without(body, collector.generator.generate, rows)
    experience = estimate(collector.collect(), algorithm, kl_coef=0.1)
    learner.update(experience)
    return policy, rows


def without(body, generate, rows):
    """Count forwards of a body from here on, but not those of generation."""
    body.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)

    def generated(*arguments, **named):
        found = generate(*arguments, **named)
        rows.clear()
        return found

    return generated


@pytest.mark.parametrize("make", [policy_with_critic, policy_with_head])
@pytest.mark.parametrize("epochs", [1, 3])
def test_a_kept_forward_serves_the_first_epoch(epochs, make):
    """The same step from a forward less: 8 rows are 3 microbatches of an update."""
    (plain, plain_rows), (kept, kept_rows) = (ppo_step(make, keep=keep, epochs=epochs) for keep in (False, True))
    assert plain_rows == [8] + [3, 3, 2] * epochs
    assert kept_rows == [8] + [3, 3, 2] * (epochs - 1)
    start = dict(make().named_parameters())
    for (name, expected), got in zip(plain.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
        assert not torch.allclose(got, start[name], atol=1e-4), f"{name} has not moved"


def test_what_is_kept_are_the_values():
    policy = policy_with_critic()
    collector = make_collector(policy, config={"keep_forward": True})
    for _ in range(2):  # with the policy's own forward, and with the generator's log-probs
        rollout = collector.collect()
        assert torch.equal(rollout.live_values, rollout.values)
        assert rollout.live_values.requires_grad
        assert not rollout.values.requires_grad
        assert not rollout.old_log_probs.requires_grad
        assert rollout.live_log_probs is None
    assert "rollout/entropy_mean" not in rollout.metrics


def fully_sharded(module: torch.nn.Module) -> torch.nn.Module:
    """Of FSDP2's class, as `fully_shard` makes a module; no process group is needed for that."""
    module.__class__ = type("FSDPLinear", (FSDPModule, type(module)), {})
    return module


def test_keeping_what_no_epoch_could_use_is_refused():
    keeping = {"keep_forward": True}
    with pytest.raises(ConfigError, match="one process, and there are 2"):
        make_collector(config=keeping, accelerator=SimpleNamespace(process_index=0, num_processes=2))
    sharded = make_policy()
    sharded.add_module("shard", fully_sharded(torch.nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match="these are sharded"):
        make_collector(sharded, config=keeping)
    several = ALGORITHMS["ppo_rlhf"].model_copy(update={"minibatches": 2})
    with pytest.raises(ConfigError, match="one minibatch, and the algorithm has 2"):
        make_collector(policy_with_critic(), config=keeping, algorithm=several)
    policy = policy_with_critic()
    rollout = make_collector(policy, config=keeping, reference=FrozenReference(policy)).collect()
    with pytest.raises(ConfigError, match="meet weights that have moved"):
        Learner(policy, several, UpdateConfig()).update(estimate(rollout, several))


def test_a_kept_forward_without_a_critic_are_the_log_probs():
    """Several epochs and a generator that disagrees: the forward that gives the old log-probs is the first epoch's."""
    rollout = make_collector(generator=Scripted([A, END]), config={"keep_forward": True}).collect()
    assert torch.equal(rollout.live_log_probs, rollout.old_log_probs)
    assert rollout.live_log_probs.requires_grad
    assert rollout.live_values is None


def test_a_critic_on_the_policys_states_takes_the_policys_forward():
    collector = make_collector(make_policy(critic="head"))
    for _ in range(2):
        assert "rollout/sampling_mismatch_mean" in collector.collect().metrics
    with pytest.raises(ConfigError, match="old_log_probs"):
        make_collector(make_policy(critic="head"), config={"old_log_probs": "sampling"})


def test_auto_never_trusts_a_generator_that_disagrees():
    """The scripted generator reports log-probs of 0, which is certainty."""
    collector = make_collector(generator=Scripted([A, END]))
    for _ in range(2):
        rollout = collector.collect()
        assert not torch.equal(rollout.old_log_probs, rollout.sampling_log_probs)
        assert rollout.metrics["rollout/sampling_mismatch_mean"] > 1e-3


def test_a_prompt_longer_than_the_limit_is_refused_before_anything_is_generated():
    with pytest.raises(DataError, match=r"(?s)2 of 4 prompts.*expected at most 3"):
        make_collector(config={"max_prompt_length": 3})


def test_a_reward_function_that_raises_is_named():
    def broken(completions, **columns):
        raise KeyError("gone")

    with pytest.raises(RewardError, match="broken"):
        make_collector(reward=broken).collect()


@pytest.mark.parametrize(
    ("scores", "message"), [([1.0], "wrong number"), ([float("nan")] * 4, "NaN"), (["1"] * 4, "no number")]
)
def test_bad_scores_are_refused(scores, message):
    with pytest.raises(RewardError, match=message):
        make_collector(reward=lambda completions, **columns: scores).collect()


def test_another_temperature_than_the_policys_is_refused():
    with pytest.raises(ConfigError, match="temperature"):
        make_collector(make_policy(temperature=0.5))


def test_no_prompts_are_refused():
    with pytest.raises(ConfigError, match="no prompt"):
        make_collector(prompts=[])


@pytest.mark.parametrize(
    "settings",
    [
        {"sampling": {"greedy": True}},
        {"group_size": 1, "dynamic_sampling": {"max_rounds": 2}},
        {"old_log_probs": "sampling", "sampling": {"top_p": 0.9}},
        {"shaping": {"overlong_buffer": 4}, "sampling": {"max_completion_length": 4}},
    ],
)
def test_settings_without_meaning_are_refused(settings):
    with pytest.raises(ValueError, match=r"set|lower|raise|use|shorter"):
        CollectorConfig.model_validate(settings)


# --- rewards per token and per step, parts, greedy baselines ---------------------------------------------------------


def test_rewards_per_token_stay_at_their_tokens():
    def per_token(completions, completion_ids, **columns):
        return [[float(token) for token in ids] for ids in completion_ids]

    rollout = make_collector(generator=Scripted([A, END], [A, A, B, END]), reward=per_token).collect()
    assert rollout.rewards[0].tolist() == [A, END, 0.0, 0.0]
    assert rollout.rewards[1].tolist() == [A, A, B, END]
    assert rollout.scores.tolist() == [A + END, 2 * A + B + END] * 2


def test_rewards_per_step_stand_where_steps_end_and_shaping_on_the_last_token():
    def per_step(completions, completion_ids, **columns):
        return [{0: 1.0, 2: 0.5} if len(ids) > 2 else {} for ids in completion_ids]

    shaping = {"shaping": ShapingConfig(overlong_buffer=2)}  # limit 4: two tokens cost 0, four cost 1
    collector = make_collector(generator=Scripted([A, END], [A, A, B, END]), reward=per_step, config=shaping)
    rollout = collector.collect()
    assert rollout.rewards[0].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert rollout.rewards[1].tolist() == [1.0, 0.0, 0.5, -1.0]


def test_rewards_per_token_reach_rewards_to_go():
    def per_step(completions, completion_ids, **columns):
        return [{0: 1.0, len(ids) - 1: 0.5} for ids in completion_ids]

    rollout = make_collector(generator=Scripted([A, B, END], [B, END]), reward=per_step).collect()
    advantages = estimate(rollout, ALGORITHMS["reinforce"]).advantages
    # discount .99: 1 + .99^2 x .5, .99 x .5, .5; in the second row 1 + .99 x .5, .5.
    assert advantages[0].tolist() == pytest.approx([1.49005, 0.495, 0.5])
    assert advantages[1, :2].tolist() == pytest.approx([1.495, 0.5])


def test_combined_rewards_may_mix_tokens_and_completions():
    def per_token(completions, completion_ids, **columns):
        return [[1.0] * len(ids) for ids in completion_ids]

    combined = CombinedReward(
        [
            RewardPart(per_token, 2.0, name="tokens"),
            RewardPart(count_a, 0.5, name="count"),
            RewardPart(lambda completions, **columns: [float("b" in text) for text in completions], role="gate"),
        ]
    )
    rollout = make_collector(generator=Scripted([A, END], [A, A, B, END]), reward=combined).collect()
    assert rollout.rewards[0].tolist() == [0.0, 0.0, 0.0, 0.0]  # no b: the gate is closed
    assert rollout.rewards[1].tolist() == [2.0, 2.0, 2.0, 3.0]  # .5 x two a's on the last token


def test_the_parts_of_a_combined_reward_reach_the_rollout():
    combined = CombinedReward(
        [
            RewardPart(count_a, 2.0),
            RewardPart(lambda completions, **columns: [float("b" in text) for text in completions], role="gate"),
            RewardPart(lambda completions, **columns: [-float(len(text)) for text in completions], 0.1, "penalty"),
        ]
    )
    rollout = make_collector(generator=Scripted([A, END], [A, A, B, END]), reward=combined).collect()
    assert rollout.reward_parts[:2].tolist() == [[0.0, -1.0], [2.0, -3.0]]
    assert rollout.part_weights == (2.0, 0.1)
    assert rollout.scores[:2].tolist() == pytest.approx([-0.1, 3.7])
    with_shaping = make_collector(
        generator=Scripted([A, END], [A, A, B, END]), reward=combined, config={"shaping": {"overlong_buffer": 2}}
    ).collect()
    assert with_shaping.reward_parts[1].tolist() == pytest.approx([2.0, -3.0, -1.0])
    assert with_shaping.part_weights == (2.0, 0.1, 1.0)


def test_remax_asks_for_one_greedy_completion_per_prompt():
    seen = []

    class Watching(Scripted):
        def generate(self, prompt_ids, prompt_mask, *, group_size=1, sampling, generator=None):
            seen.append((len(prompt_ids), group_size, sampling.greedy))
            self.completions = [[A, A, END]] if sampling.greedy else [[A, END], [B, END]]
            return super().generate(prompt_ids, prompt_mask, group_size=group_size, sampling=sampling)

    rollout = make_collector(generator=Watching(), algorithm=ALGORITHMS["remax"]).collect()
    assert seen == [(2, 2, False), (2, 1, True)]
    assert rollout.baselines.tolist() == [2.0] * 4
    assert rollout.scores.tolist() == [1.0, 0.0, 1.0, 0.0]
    assert rollout.metrics["rollout/greedy_reward_mean"] == 2.0
    assert make_collector(generator=Scripted([A, END])).collect().baselines is None


def test_gdpo_needs_parts_that_shaping_leaves_alone():
    with pytest.raises(ConfigError, match="compares the parts of a reward, and there is one function only"):
        make_collector(algorithm=ALGORITHMS["gdpo"])
    with pytest.raises(ConfigError, match="score_clip and missing_end_score"):
        make_collector(
            reward=CombinedReward([(count_a, 1.0)]),
            algorithm=ALGORITHMS["gdpo"],
            config={"shaping": {"score_clip": 1.0}},
        )


def test_refills_are_counted():
    """Uniform scores: all four rounds are used, three of them refills."""
    config = {"dynamic_sampling": DynamicSampling(max_rounds=4)}
    metrics = make_collector(generator=Scripted([A, END]), config=config).collect().metrics
    assert metrics["rollout/rounds"] == 4.0
    assert metrics["rollout/refills"] == 3.0
    assert metrics["rollout/uniform_groups_fraction"] == 1.0
    assert metrics["rollout/uniform_groups_kept_fraction"] == 1.0


def test_greedy_rollouts_are_refused():
    with pytest.raises(ValueError, match="cannot learn from greedy completions"):
        CollectorConfig(sampling=SamplingConfig(greedy=True))
