"""Text environments in, a rollout out: the multi-turn twin of the prompt collector, for the same loop and learner."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config import Config
from rlhf.core.advantages import carry_values
from rlhf.core.algorithm import AlgorithmConfig
from rlhf.core.types import Rollout, present
from rlhf.data.collation import left_pad, right_pad
from rlhf.data.tokenization import require_special_tokens
from rlhf.errors import ConfigError, DataError
from rlhf.lm.backbone import unwrap_adapters
from rlhf.lm.episodes import Episode, begin_episode, play_episodes
from rlhf.lm.generation import Generator, bring_up_to_date
from rlhf.lm.judging import last_position
from rlhf.lm.measurement import RECHECK_EVERY, measure, measure_alone, step_gives_old_log_probs
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.prompt_stream import mix_seed
from rlhf.lm.reference import FrozenReference
from rlhf.lm.rollout_metrics import Statistics, gather_metrics, measured_statistics, uniform_groups
from rlhf.lm.sampling import SamplingConfig
from rlhf.lm.text_environments import EnvironmentFactory
from rlhf.training.sharding import whole_weights


class EpisodeCollectorConfig(Config):
    """How one iteration's episodes are played."""

    starts_per_iteration: int = Field(64, ge=1)
    """Start states over all processes."""
    group_size: int = Field(1, ge=1)
    """Episodes that begin with the same seed."""
    sampling: SamplingConfig = SamplingConfig(max_completion_length=16)
    """Temperature and lengths; `max_completion_length` limits one turn."""
    max_episode_length: int = Field(256, ge=1)
    """Tokens after the first prompt, the environment's included; an episode without room for one more whole turn is
    truncated."""
    episodes_per_batch: int | None = Field(None, ge=1)
    """Episodes played at once; bounds the cache's memory. None: all of this process."""
    measure_tokens: int = Field(16_384, ge=1)
    """Token budget of a microbatch of the no-grad forwards."""
    old_log_probs: Literal["auto", "recompute"] = "auto"
    """recompute: by a forward of the trainer. auto: where one step is made of a rollout and no critic is read, that
    step's own forward gives them and logs `sampling_mismatch_mean`; every 20th iteration a forward before it does."""
    samples: int = Field(2, ge=0)
    """Conversations an iteration, for samples.jsonl."""

    @model_validator(mode="after")
    def _refuse_combinations_without_meaning(self) -> Self:
        if self.sampling.greedy:
            raise ValueError("a policy cannot learn from greedy turns; set sampling.greedy to false")
        if self.sampling.max_completion_length > self.max_episode_length:
            raise ValueError("max_episode_length must have room for one turn of sampling.max_completion_length")
        return self


class EpisodeCollector:
    """Collects rollouts of conversations; a `Collector`.

    A row is an episode. `completion_mask` is True on all of its tokens, since the policy reads them;
    `action_mask` only on the policy's own, so that the loss and the KL leave the environment's out and GAE carries
    values and advantages across them.

    Args:
        factory: Makes environments.
        policy: Measures old log-probs and values; shares its weights with the generator.
        generator: Writes the policy's turns.
        tokenizer: With a chat template.
        config: Sizes and lengths.
        algorithm: What will learn from the rollouts; None collects what any needs.
        reference: Gives `ref_log_probs`; None where the algorithm needs none.
        accelerator: Whose processes share the start states; None is one process.
        seed: Of start states and of sampling; both are functions of (seed, iteration, process), so that a resumed
            run plays what the uninterrupted one would have played.

    Raises:
        ConfigError: Settings that do not fit one another.
        ModelError: The tokenizer lacks a pad or an end token.
    """

    replicated = True
    """A checkpoint needs the state of one process only."""

    def __init__(
        self,
        factory: EnvironmentFactory,
        *,
        policy: LanguageModelPolicy,
        generator: Generator,
        tokenizer: PreTrainedTokenizerBase,
        config: EpisodeCollectorConfig,
        algorithm: AlgorithmConfig | None = None,
        reference: FrozenReference | None = None,
        accelerator: Accelerator | None = None,
        seed: int = 0,
    ) -> None:
        """Check what can be checked before any time is spent."""
        require_special_tokens(tokenizer)
        self._rank, processes = (
            (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
        )
        _check_settings(config, policy=policy, processes=processes)
        self.factory, self.policy, self.generator, self.tokenizer = factory, policy, generator, tokenizer
        self.config, self.reference, self.accelerator = config, reference, accelerator
        self._quota = config.starts_per_iteration // processes
        self._seed, self._iteration = seed, 0
        self._takes_one_step = (
            config.old_log_probs == "auto"
            and step_gives_old_log_probs(algorithm, sampling=config.sampling, has_reference=reference is not None)
            and not policy.has_critic
        )
        self._environments = [factory() for _ in range(self._quota * config.group_size)]

    def collect(self) -> Rollout:
        """Play one iteration's episodes.

        Raises:
            DataError: A conversation exceeds the model's context.
            RewardError: An environment broke its protocol.
        """
        with whole_weights(self.policy):
            return self._collect()

    def _collect(self) -> Rollout:
        bring_up_to_date(self.generator)
        episodes = self._begin()
        play_episodes(
            self.generator,
            self.tokenizer,
            episodes,
            sampling=self.config.sampling,
            max_episode_length=self.config.max_episode_length,
            rows_per_batch=self.config.episodes_per_batch,
            device=self.device,
            random=torch.Generator().manual_seed(mix_seed("sampling", self._seed, self._iteration, self._rank)),
        )
        skips_forward = self._takes_one_step and self._iteration % RECHECK_EVERY != 0
        self._iteration += 1
        return self.make_rollout(episodes, skips_forward=skips_forward)

    def make_rollout(self, episodes: Sequence[Episode], *, skips_forward: bool = False) -> Rollout:
        """Measure finished episodes.

        Args:
            episodes: Played to their ends; at least one.
            skips_forward: Leave the old log-probs to the update, and values out.
        """
        rows = self._tensors(episodes)
        inputs = {name: rows[name] for name in ("prompt_ids", "prompt_mask", "completion_mask")}
        actions, mask = rows["actions"], rows["own"]
        reference = None
        with self._autocast():
            if skips_forward:
                log_probs, entropy, values = rows["log_probs"].clone(), None, None
            else:
                log_probs, entropy, values = measure(self.policy, inputs, actions, tokens=self.config.measure_tokens)
            if self.reference is not None:
                score = self.reference.log_probs
                reference = measure_alone(score, inputs, actions, tokens=self.config.measure_tokens)
        ends = last_position(mask)
        next_values = None
        if values is not None:
            carried = carry_values(values, mask, episode_ends=ends)
            next_values = torch.where(ends, self._last_values(episodes).unsqueeze(1), carried)
        statistics = episode_statistics(episodes, group_size=self.config.group_size) | measured_statistics(
            mask,
            old_log_probs=log_probs,
            sampling_log_probs=rows["log_probs"],
            entropy=entropy,
            ref_log_probs=reference,
        )
        return Rollout(
            inputs=inputs,
            actions=actions,
            action_mask=mask,
            rewards=rows["rewards"],
            old_log_probs=log_probs,
            on_policy=skips_forward,
            episode_ends=ends,
            values=values,
            next_values=next_values,
            ref_log_probs=reference,
            sampling_log_probs=rows["log_probs"],
            group_ids=torch.tensor([episode.group for episode in episodes], device=self.device),
            metrics=gather_metrics(statistics, accelerator=self.accelerator),
            samples=_readable(episodes, count=self.config.samples),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the collector stands; episodes never outlive an iteration."""
        return {"iteration": self._iteration}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._iteration = int(state["iteration"])

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return next(self.policy.parameters()).device

    def _begin(self) -> list[Episode]:
        size, first = self.config.group_size, self._rank * self._quota
        return [
            begin_episode(
                environment,
                self.tokenizer,
                seed=mix_seed("episode", self._seed, self._iteration, first + row // size),
                group=first + row // size,
            )
            for row, environment in enumerate(self._environments)
        ]

    def _tensors(self, episodes: Sequence[Episode]) -> dict[str, Tensor]:
        """What was played, [B, ...]; padding is False or 0 whatever stands there."""
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int), "require_special_tokens ran"
        prompt_ids, prompt_mask = left_pad([episode.prompt_ids for episode in episodes], pad_id)
        actions, completion_mask = right_pad([episode.token_ids for episode in episodes], pad_id)
        own, rewards, log_probs = completion_mask.clone(), torch.zeros(actions.shape), torch.zeros(actions.shape)
        own[completion_mask] = torch.tensor([flag for episode in episodes for flag in episode.own])
        rewards[completion_mask] = torch.tensor([number for episode in episodes for number in episode.rewards])
        log_probs[completion_mask] = torch.tensor([number for episode in episodes for number in episode.log_probs])
        named = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "actions": actions, "own": own}
        named |= {"completion_mask": completion_mask, "rewards": rewards, "log_probs": log_probs}
        return {name: tensor.to(self.device) for name, tensor in named.items()}

    def _last_values(self, episodes: Sequence[Episode]) -> Tensor:
        """[B] V of the state after the last turn: 0 where terminated; where truncated, with what was said in answer.

        A value is read where a token is predicted, so one more token is appended, which the value does not see.
        """
        values = torch.zeros(len(episodes), device=self.device)
        rows = [row for row, episode in enumerate(episodes) if episode.truncated]
        if not rows:
            return values
        pad_id = self.tokenizer.pad_token_id
        assert isinstance(pad_id, int), "require_special_tokens ran"
        cut = [episodes[row] for row in rows]
        self._require_room(cut)
        prompt_ids, prompt_mask = left_pad([episode.prompt_ids for episode in cut], pad_id)
        actions, mask = right_pad([[*episode.token_ids, *episode.trailing_ids, pad_id] for episode in cut], pad_id)
        inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_mask": mask}
        inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
        with self._autocast():
            output = measure(self.policy, inputs, actions.to(self.device), tokens=self.config.measure_tokens)
        last = (mask.sum(dim=1) - 1).to(self.device).unsqueeze(1)
        values[rows] = present(output.values).gather(1, last).squeeze(1)
        return values

    def _require_room(self, cut: Sequence[Episode]) -> None:
        context = getattr(unwrap_adapters(self.policy.model).config.get_text_config(), "max_position_embeddings", None)
        needed = max(len(one.prompt_ids) + len(one.token_ids) + len(one.trailing_ids) for one in cut)
        if context is not None and needed > context:
            raise DataError(
                "a truncated episode and the environment's last answer exceed the model's context",
                where="collector.max_episode_length",
                got=needed,
                expected=f"at most {context} tokens",
                remedy="Lower max_episode_length, so that the answer whose value is read still has room.",
            )

    def _autocast(self) -> AbstractContextManager[None]:
        """The learner's precision: old log-probs of another precision would give ratios other than 1."""
        return nullcontext() if self.accelerator is None else self.accelerator.autocast()


def episode_statistics(episodes: Sequence[Episode], *, group_size: int) -> Statistics:
    """What was played; rows of a group lie side by side."""
    scores = torch.tensor([episode.score for episode in episodes])
    every_row = torch.ones(len(episodes), dtype=torch.bool)

    def mean(values: Sequence[float]) -> tuple[str, Tensor, Tensor]:
        return "mean", torch.tensor(values, dtype=torch.float32), every_row

    turns = sum(episode.turns for episode in episodes)
    statistics: Statistics = {
        "score_mean": ("mean", scores, every_row),
        "score_std": ("std", scores, every_row),
        "turns_mean": mean([float(episode.turns) for episode in episodes]),
        "length_mean": mean([float(sum(episode.own)) for episode in episodes]),
        "environment_tokens_mean": mean([float(len(episode.own) - sum(episode.own)) for episode in episodes]),
        "truncated_fraction": mean([float(episode.truncated) for episode in episodes]),
        "out_of_room_fraction": mean([float(episode.out_of_room) for episode in episodes]),
        "cut_turns_fraction": (
            "mean",
            torch.tensor([float(n < episode.cut_turns) for episode in episodes for n in range(episode.turns)]),
            torch.ones(turns, dtype=torch.bool),
        ),
    }
    if group_size > 1:
        uniform = uniform_groups(scores, group_size)
        statistics["uniform_groups_fraction"] = ("mean", uniform.float(), torch.ones_like(uniform))
    return statistics


def _readable(episodes: Sequence[Episode], *, count: int) -> list[dict[str, Any]]:
    """The first conversations of different groups, for people."""
    rows = [round(index * len(episodes) / max(1, count)) for index in range(min(count, len(episodes)))]
    return [
        {
            "messages": episodes[row].messages,
            "score": round(episodes[row].score, 6),
            "turns": episodes[row].turns,
            "terminated": episodes[row].terminated,
        }
        for row in rows
    ]


def _check_settings(config: EpisodeCollectorConfig, *, policy: LanguageModelPolicy, processes: int) -> None:
    """Refuse what would fail, or silently mean something else, in the first iteration."""
    if config.starts_per_iteration % processes:
        raise ConfigError(
            "the start states of an iteration cannot be shared evenly",
            where="collector.starts_per_iteration",
            got=config.starts_per_iteration,
            expected=f"a multiple of the {processes} processes",
        )
    if config.sampling.temperature != policy.temperature:
        raise ConfigError(
            "turns are drawn at one temperature and scored at another, so every ratio would be wrong",
            where="collector.sampling.temperature",
            got=config.sampling.temperature,
            expected=f"the policy's {policy.temperature}",
        )
