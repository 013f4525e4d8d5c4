"""Multi-turn episodes: tokens as drawn, the environment's masked, values and advantages carried across them."""

import numpy as np
import pytest
import torch
from torch import nn

from rlhf.core.algorithm import Gae, NoKl
from rlhf.core.estimate import estimate
from rlhf.core.presets import ALGORITHMS
from rlhf.core.types import PolicyOutput
from rlhf.data.tokenization import encode_prompt
from rlhf.errors import ConfigError, RewardError
from rlhf.lm.actors import make_generator
from rlhf.lm.episode_collector import EpisodeCollector, EpisodeCollectorConfig
from rlhf.lm.episode_evaluation import EpisodeEvaluationConfig, make_episode_evaluation
from rlhf.lm.episodes import begin_episode, play_episodes
from rlhf.lm.generation import Generation
from rlhf.lm.guessing import GuessingGame
from rlhf.lm.loading import ModelConfig, character_tokenizer, load_causal_lm
from rlhf.lm.players import TURNS_TEMPLATE
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.sampling import SamplingConfig
from rlhf.lm.text_environments import EnvironmentConfig, make_factory, play_demonstrations
from rlhf.training.learner import Learner
from rlhf.training.update_config import UpdateConfig

MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 2, "max_position_embeddings": 128}
TOKENIZER = character_tokenizer("abc>\n")
TOKENIZER.chat_template = TURNS_TEMPLATE
PAD, BOS, END, A, B, C, ARROW, NEWLINE = range(8)
ANSWER = [NEWLINE, B, NEWLINE, ARROW]  # "<eos>" is the policy's; then "\n", "b\n" and ">"


class Talk:
    """Says "b" after every turn; rewards 1, 2, 3, ...; over after `turns`."""

    def __init__(self, turns: int = 2, *, ends: str = "terminated") -> None:
        self.turns, self.ends, self.heard, self.seed = turns, ends, [], None

    def reset(self, *, seed=None):
        self.heard, self.seed = [], seed
        return [{"role": "user", "content": "c"}]

    def step(self, completion):
        self.heard.append(completion)
        over = len(self.heard) == self.turns
        answer = [{"role": "user", "content": "b"}]
        return answer, float(len(self.heard)), over and self.ends == "terminated", over and self.ends == "truncated"


class Scripted:
    """Writes what it is told, turn by turn, and keeps what it was shown."""

    def __init__(self, *turns: list[int]) -> None:
        self.turns, self.shown = list(turns), []

    def generate(self, prompt_ids, prompt_mask, *, group_size=1, sampling, generator=None):
        self.shown.append([ids[mask].tolist() for ids, mask in zip(prompt_ids, prompt_mask, strict=True)])
        ids = torch.tensor([self.turns[(len(self.shown) - 1) % len(self.turns)]] * len(prompt_ids))
        return Generation(
            completion_ids=ids,
            completion_mask=torch.ones(ids.shape, dtype=torch.bool),
            sampling_log_probs=torch.full(ids.shape, -0.5),
            ended=ids[:, -1] == END,
        )


class ValueByPosition(nn.Module):
    """A policy whose value at the t-th token after the prompt is 0.1 (t + 1), whoever wrote the token."""

    temperature = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.model = load_causal_lm(ModelConfig(config=MODEL), TOKENIZER)

    def forward(self, inputs, actions):
        values = 0.1 * torch.arange(1, actions.shape[1] + 1).float().expand(actions.shape)
        return PolicyOutput(torch.full(actions.shape, -0.5), torch.ones(actions.shape), values)


def make_policy(**arguments) -> LanguageModelPolicy:
    torch.manual_seed(0)
    return LanguageModelPolicy(load_causal_lm(ModelConfig(config=MODEL), TOKENIZER), **arguments)


def make_critic_policy() -> LanguageModelPolicy:
    """A fresh value head is zero, and zeros agree whatever goes wrong."""
    policy = make_policy(critic="head")
    assert policy.value_head is not None
    nn.init.normal_(policy.value_head.weight, generator=torch.Generator().manual_seed(1))
    return policy


def make_collector(factory=Talk, *, policy=None, generator=None, algorithm=None, seed=0, **config) -> EpisodeCollector:
    policy = policy or make_policy()
    settings = {"starts_per_iteration": 1, "sampling": SamplingConfig(max_completion_length=4)} | config
    return EpisodeCollector(
        factory,
        policy=policy,
        generator=generator or make_generator(policy.model, TOKENIZER),
        tokenizer=TOKENIZER,
        config=EpisodeCollectorConfig(**settings),
        algorithm=algorithm,
        seed=seed,
    )


def test_the_rollout_holds_the_drawn_tokens_and_masks_the_environments():
    generator = Scripted([A, END], [B, B, END])
    rollout = make_collector(generator=generator).collect()
    assert rollout.actions[0].tolist() == [A, END, *ANSWER, B, B, END]
    assert rollout.action_mask[0].tolist() == [True] * 2 + [False] * 4 + [True] * 3
    assert rollout.inputs["completion_mask"].all()  # the policy reads the environment's tokens
    assert rollout.rewards[0].tolist() == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0]
    assert rollout.episode_ends[0].tolist() == [False] * 8 + [True]
    # Shown in the second turn: exactly what the rollout holds up to there.
    prompt = [C, NEWLINE, ARROW]
    assert generator.shown == [[prompt], [[*prompt, A, END, *ANSWER]]]


def test_tokens_that_text_would_lose_are_kept():
    """A bos token amidst a turn decodes to nothing: encoding the text again would train on other tokens."""
    generator = Scripted([A, BOS, B, END], [A, END])
    collector = make_collector(generator=generator)
    rollout = collector.collect()
    assert rollout.actions[0, :4].tolist() == [A, BOS, B, END]
    assert generator.shown[1][0][3:7] == [A, BOS, B, END]
    assert collector._environments[0].heard == ["ab", "a"]


def test_a_cut_turn_gets_its_end_from_the_environment_and_masked():
    rollout = make_collector(generator=Scripted([A, A, A, A], [B, END])).collect()
    assert rollout.actions[0].tolist() == [A, A, A, A, END, *ANSWER, B, END]
    assert rollout.action_mask[0, 4:9].tolist() == [False] * 5
    assert rollout.metrics["rollout/cut_turns_fraction"] == 0.5


def discounted(collector: EpisodeCollector) -> list[float]:
    """Advantages with discount 0.5 and lambda 0.5."""
    axis = Gae(discount=0.5, gae_lambda=0.5, standardize="none")
    algorithm = ALGORITHMS["ppo_rlhf"].model_copy(update={"advantages": axis, "kl": NoKl()})
    return estimate(collector.collect(), algorithm).advantages[0].tolist()


def test_gae_is_carried_across_the_environments_tokens():
    """Own tokens at 0, 1, 6, 7 with values 0.1, 0.2, 0.7, 0.8; rewards 1 at 1 and 2 at 7; discount = lambda = 0.5.

    A7 = 2 - 0.8 = 1.2;  A6 = 0.5 * 0.8 - 0.7 + 0.25 * 1.2 = 0;  A1 = 1 + 0.5 * 0.7 - 0.2 + 0.25 * 0 = 1.15;
    A0 = 0.5 * 0.2 - 0.1 + 0.25 * 1.15 = 0.2875.
    """
    advantages = discounted(make_collector(policy=ValueByPosition(), generator=Scripted([A, END], [B, END])))
    assert advantages == pytest.approx([0.2875, 1.15, 0, 0, 0, 0, 0.0, 1.2], abs=1e-6)


def test_truncation_bootstraps_from_the_state_after_the_environments_answer():
    """The answer's four tokens stand at 8 to 11, so the next state's value is that at 12: 1.3.

    A7 = 2 + 0.5 * 1.3 - 0.8 = 1.85;  A6 = -0.3 + 0.25 * 1.85 = 0.1625;  A1 = 1.15 + 0.25 * 0.1625 = 1.190625;
    A0 = 0.25 * 1.190625 = 0.29765625.
    """
    collector = make_collector(
        lambda: Talk(ends="truncated"), policy=ValueByPosition(), generator=Scripted([A, END], [B, END])
    )
    assert discounted(collector) == pytest.approx([0.29765625, 1.190625, 0, 0, 0, 0, 0.1625, 1.85], abs=1e-6)


def test_an_episode_without_room_for_one_more_turn_is_truncated():
    """Two tokens, an answer of four, and a turn of up to four: 10 tokens have room for a second turn, 9 have not."""
    for length, turns in ((10, 2), (9, 1)):
        collector = make_collector(
            lambda: Talk(turns=2), policy=ValueByPosition(), generator=Scripted([A, END]), max_episode_length=length
        )
        rollout = collector.collect()
        assert rollout.metrics["rollout/turns_mean"] == turns
        assert rollout.metrics["rollout/truncated_fraction"] == float(turns == 1)
    # Cut after its first turn: next state at 6, after the answer at 2 to 5, whose value is 0.7.
    assert rollout.next_values[0, 1].item() == pytest.approx(0.7)


def test_the_bootstrap_does_not_see_the_token_that_is_appended_for_it():
    policy = make_critic_policy()
    collector = make_collector(lambda: Talk(1, ends="truncated"), policy=policy, generator=Scripted([A, END]))
    value = collector.collect().next_values[0, 1]
    # By hand: the value head on the hidden state of the last token of the conversation so far.
    ids = torch.tensor([[C, NEWLINE, ARROW, A, END, *ANSWER]])
    hidden = policy.model.model(input_ids=ids)[0][0, -1]
    assert policy.value_head is not None
    assert value.item() == pytest.approx(float(policy.value_head(hidden).detach()), abs=1e-5)


def test_generator_and_trainer_agree_on_every_own_token():
    rollout = make_collector(lambda: Talk(3), starts_per_iteration=6).collect()
    mask = rollout.action_mask
    assert not mask.all()
    assert torch.allclose(rollout.sampling_log_probs[mask], rollout.old_log_probs[mask], atol=1e-4)


def test_the_step_with_its_own_old_log_probs_is_the_step_with_recomputed_ones():
    """The script says log-probs of -.5, which are nobody's; groups differ by what their turns are worth."""
    weights, algorithm = {}, ALGORITHMS["opo"]
    for old in ("auto", "recompute"):
        policy, rewards = make_policy(), iter([1, 2, 4, 8] * 10)
        collector = make_collector(
            lambda rewards=rewards: Talk(next(rewards) % 3 + 1),
            policy=policy,
            generator=Scripted([A, END], [B, B, END], [C, END]),
            group_size=4,
            old_log_probs=old,
            algorithm=algorithm,
        )
        learner = Learner(policy, algorithm, UpdateConfig(learning_rate=1e-2, microbatch_rows=3))
        for iteration in range(3):
            rollout = collector.collect()
            assert rollout.on_policy == (old == "auto" and iteration > 0)
            assert ("rollout/entropy" in rollout.metrics) != rollout.on_policy
            own = policy.action_log_probs(rollout.inputs, rollout.actions)[rollout.action_mask]
            metrics = learner.update(estimate(rollout, algorithm))
        if rollout.on_policy:
            assert metrics["sampling_mismatch_mean"] == pytest.approx((own + 0.5).abs().mean().item(), rel=1e-5)
        weights[old] = dict(policy.named_parameters())
    for name, expected in weights["recompute"].items():
        torch.testing.assert_close(weights["auto"][name], expected, atol=2e-6, rtol=1e-5)
        assert not torch.allclose(expected, dict(make_policy().named_parameters())[name], atol=1e-4)


def test_a_critic_or_several_steps_need_the_forward_before_them():
    several = ALGORITHMS["opo"].model_copy(update={"epochs": 2})
    for algorithm, policy in ((ALGORITHMS["opo"], make_critic_policy()), (several, make_policy())):
        collector = make_collector(policy=policy, generator=Scripted([A, END]), algorithm=algorithm)
        assert [collector.collect().on_policy for _ in range(2)] == [False, False]


def test_neighbours_and_padding_change_nothing():
    policy = make_critic_policy()
    collector = make_collector(lambda: Talk(2), policy=policy)
    games = [(Talk(1, ends="truncated"), [A, A, END]), (Talk(3), [B, END])]
    episodes = []
    for environment, words in games:
        episode = begin_episode(environment, TOKENIZER, seed=0)
        play_episodes(
            Scripted(words),
            TOKENIZER,
            [episode],
            sampling=SamplingConfig(max_completion_length=4),
            max_episode_length=100,
        )
        episodes.append(episode)
    together = collector.make_rollout(episodes)
    for row, episode in enumerate(episodes):
        alone = collector.make_rollout([episode])
        width = alone.actions.shape[1]
        own = alone.action_mask[0]
        assert not together.action_mask[row, width:].any()
        for name in ("old_log_probs", "values", "next_values"):
            ours = getattr(together, name)[row, :width][own]
            assert torch.allclose(ours, getattr(alone, name)[0][own], atol=1e-5), name


def test_groups_share_their_start_and_nothing_else():
    collector = make_collector(starts_per_iteration=3, group_size=2, generator=Scripted([A, END]))
    rollout = collector.collect()
    assert rollout.group_ids.tolist() == [0, 0, 1, 1, 2, 2]
    seeds = [environment.seed for environment in collector._environments]
    assert seeds[0::2] == seeds[1::2]
    assert len(set(seeds)) == 3
    collector.collect()
    assert seeds != [environment.seed for environment in collector._environments]


def test_a_resumed_collector_plays_what_the_first_would_have_played():
    whole = make_collector(starts_per_iteration=4)
    whole.collect()
    state, expected = whole.state_dict(), whole.collect()
    resumed = make_collector(starts_per_iteration=4)
    resumed.load_state_dict(state)
    again = resumed.collect()
    assert torch.equal(again.actions, expected.actions)


def test_evaluation_is_the_same_every_time_and_apart_from_training():
    collector = make_collector(lambda: GuessingLetters(), starts_per_iteration=4)
    evaluate = make_episode_evaluation(collector, EpisodeEvaluationConfig(episodes=5))
    first = evaluate()
    collector.collect()
    assert evaluate() == first
    assert set(first) >= {"greedy_score_mean", "sampled_score_mean", "sampled_score_ci95", "greedy_turns_mean"}


class GuessingLetters(Talk):
    """Rewards the length of what was said, so that scores differ."""

    def step(self, completion):
        answer, _, terminated, truncated = super().step(completion)
        return answer, float(len(completion)), terminated, truncated


def test_a_broken_environment_is_refused():
    class Silent(Talk):
        def step(self, completion):
            return [], 0.0, False, False

    class Poisoned(Talk):
        def step(self, completion):
            return [], float("nan"), True, False

    class Crashing(Talk):
        def step(self, completion):
            return {}[completion]

    class Mute(Talk):
        def step(self, completion):
            return "b", 0.0, False, False

    class Nameless(Talk):
        def reset(self, *, seed=None):
            return [{"text": "c"}]

    class Gymnasium(Talk):
        def reset(self, *, seed=None):
            return super().reset(seed=seed), {}

    class Seedless(Talk):
        def reset(self):
            return super().reset()

    for environment, told in (
        (Silent, "says nothing"),
        (Poisoned, "no finite number"),
        (Crashing, r"Crashing.step \(.*test_text_environments.py, line \d+\): the environment raised KeyError: 'a'"),
        (Mute, "Mute.step: the environment says no messages; got 'b'"),
        (Nameless, "Nameless.reset: not a message"),
        (Gymnasium, "Gymnasium.reset: not a message"),
        (Seedless, "unexpected keyword argument 'seed'"),
    ):
        with pytest.raises(RewardError, match=told):
            make_collector(environment, generator=Scripted([A, END])).collect()


def test_a_reward_may_be_numpys():
    class Numbers(Talk):
        def step(self, completion):
            messages, reward, terminated, truncated = super().step(completion)
            return messages, np.float32(reward), np.bool_(terminated), np.bool_(truncated)

    # Two turns that are worth 1 and 2.
    assert make_collector(Numbers, generator=Scripted([A, END])).collect().rewards.sum().item() == 3.0


def test_environments_are_found_in_a_file(tmp_path):
    file = tmp_path / "my_game.py"
    file.write_text("from rlhf.lm.guessing import GuessingGame\n\n\nclass Game(GuessingGame):\n    mine = True\n")
    factory = make_factory(EnvironmentConfig(function=f"{file}:Game", arguments={"highest": 3}))
    assert factory().mine
    assert factory().highest == 3


def test_environments_are_found_by_name():
    factory = make_factory(EnvironmentConfig(function="rlhf.lm.guessing:GuessingGame", arguments={"highest": 3}))
    assert factory().highest == 3
    assert factory() is not factory()
    for function, match in (
        ("rlhf.lm.guessing:Missing", "there is no 'Missing'"),
        ("rlhf.lm.guessing", "not the name of a text environment"),
        ("nowhere.py:Game", "nowhere.py: no such file"),
        ("rlhf.lm.prompt_stream:PromptStream", "cannot be made"),
    ):
        with pytest.raises(ConfigError, match=match):
            make_factory(EnvironmentConfig(function=function))


# --- the guessing game --------------------------------------------------------------------------------------------


def bisect(highest: int, guesses: int) -> list[float]:
    """Play bisection from every start; returns the scores."""
    scores = []
    for seed in range(200):
        game = GuessingGame(highest=highest, guesses=guesses)
        game.reset(seed=seed)
        low, high, over, score = 1, highest, False, 0.0
        while not over:
            guess = (low + high) // 2
            (answer,), reward, over, truncated = game.step(str(guess))
            assert not truncated
            score += reward
            low, high = (guess + 1, high) if answer["content"] == "higher" else (low, guess - 1)
        scores.append(score)
    return scores


def test_bisection_always_wins_with_log2_guesses():
    """7 = 2^3 - 1 numbers need three guesses; with two, 3 of the 7 numbers are reached."""
    assert set(bisect(7, 3)) == {1.0}
    assert sum(bisect(7, 2)) / 200 == pytest.approx(3 / 7, abs=0.1)


def test_what_is_no_number_costs_a_guess_and_a_little():
    for said in ("", "x", "0", "8", "+3", "03", "3 3", "³"):
        game = GuessingGame(highest=7, guesses=2)
        game.reset(seed=0)
        (answer,), reward, terminated, truncated = game.step(said)
        assert (answer["content"], reward, terminated, truncated) == ("no number", -0.1, False, False), said
    assert game.step("x")[2]


def test_demonstrations_are_turns_with_all_that_was_said_before():
    factory = make_factory(EnvironmentConfig(function="rlhf.lm.guessing:GuessingGame"))
    records = play_demonstrations(factory, episodes=20, seed=0)
    assert sum(len(record.prompt) == 1 for record in records) == 20
    longer = [record for record in records if len(record.prompt) == 3]
    assert longer
    assert [message["role"] for message in longer[0].prompt] == ["user", "assistant", "user"]
    assert all(1 <= int(record.completion[0]["content"]) <= 15 for record in records)
    assert records == play_demonstrations(factory, episodes=20, seed=0)


def test_demonstrated_prompts_are_what_the_collector_shows():
    """Fine-tuning and playing must read the same tokens, or the first learns what the second never sees."""
    generator = Scripted([A, END])
    make_collector(generator=generator).collect()
    conversation = [
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    assert encode_prompt(TOKENIZER, conversation) == generator.shown[1][0]
