"""Held-out evaluation: how good are a policy's answers, greedy and sampled, and how sane is its language."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Self

import torch
from accelerate import Accelerator
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from rlhf.config import Config
from rlhf.data.records import Prompt
from rlhf.errors import DataError
from rlhf.lm.answer_statistics import majority_at_k, pass_at_k, win_rate
from rlhf.lm.collector import PromptCollector
from rlhf.lm.generation import Generator, bring_up_to_date
from rlhf.lm.prompt_stream import mix_seed
from rlhf.lm.samples import Samples, sample_completions, score_samples
from rlhf.lm.sampling import SamplingConfig
from rlhf.rewards.loading import load_reward
from rlhf.rewards.protocol import RewardFunction, text_of
from rlhf.training.distributed import gather_objects
from rlhf.training.experiment import mean_and_interval
from rlhf.training.sharding import whole_weights

NORMAL_95 = 1.959964
"""Two-sided 95 % quantile of the standard normal distribution."""


class EvaluationConfig(Config):
    """How held-out prompts are answered for evaluation."""

    greedy: bool = True
    """Answer each prompt once with the most likely tokens."""
    samples_per_prompt: int = Field(4, ge=0)
    """Answers drawn per prompt at the policy's own temperature; 0 draws none."""
    prompts: int | None = Field(None, ge=1)
    """Use only the first so many held-out prompts; None uses all."""
    prompts_per_batch: int = Field(256, ge=1)
    """Prompts answered at once by one process."""
    pass_at: list[int] = []
    """Each k for which pass@k is estimated from the drawn answers, without bias; for rewards of 0 or 1."""
    majority_at: list[int] = []
    """Each k for which k of the drawn answers vote (maj@k); needs `answers`."""
    answers: str | None = None
    """What reads the answer off a completion for the vote: a function of its text, as `module:function` or
    `file.py:function`, such as rlhf.rewards.extraction:last_number; None from it has no vote."""
    seed: int = 0
    """Of the drawn answers: the same at every evaluation, so that curves are comparable."""

    @model_validator(mode="after")
    def _refuse_what_too_few_answers_cannot_give(self) -> Self:
        for name, ks in (("pass_at", self.pass_at), ("majority_at", self.majority_at)):
            if any(not 1 <= k <= self.samples_per_prompt for k in ks):
                raise ValueError(
                    f"{name} {ks} asks for more answers than samples_per_prompt: {self.samples_per_prompt} "
                    "draws; raise it"
                )
        if self.majority_at and self.answers is None:
            raise ValueError(
                "majority_at needs `answers`, which reads the answer off a completion, such as "
                "rlhf.rewards.extraction:last_number"
            )
        return self


Rows = dict[str, list[dict[str, list[Any]]]]
"""Pass (`greedy`, `sampled`) -> one row per prompt: reward name -> scores of its answers, and what begins with "/"."""


def evaluate_policy(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, RewardFunction],
    sampling: SamplingConfig,
    config: EvaluationConfig,
    max_prompt_length: int | None = None,
    device: torch.device | str = "cpu",
    accelerator: Accelerator | None = None,
) -> dict[str, float]:
    """Answer held-out prompts and judge the answers.

    Args:
        generator: Answers.
        tokenizer: Encodes and decodes.
        prompts: Held out.
        rewards: Name -> reward function; for an accuracy, one that returns 0 or 1.
        sampling: Temperature and lengths; `greedy` is set as each pass needs it.
        config: How many answers.
        max_prompt_length: Longer prompts are refused.
        device: Where token ids are put.
        accelerator: Whose processes share the prompts; the result is the same on all.

    Returns:
        For each pass `greedy` and `sampled` and each reward NAME: `PASS_NAME_mean`, `PASS_NAME_standard_error` (over
        prompts: answers to one prompt are not independent), `PASS_NAME_ci95` (half width); further
        `PASS_ended_fraction` and `PASS_length_mean`, what rewards reported as `PASS_reward/...`;
        `sampled_NAME_best`, the mean of each prompt's best answer; and for each k of the config
        `sampled_NAME_pass_at_k` and `sampled_NAME_majority_at_k`, with `_low` and `_high`, the ends of a 95 %
        bootstrap interval over prompts. With one reward function named "score": `greedy_score_mean`, ...

    Raises:
        DataError: There is no prompt, or one is too long; pass@k of a reward that is not 0 or 1.
        RewardError: A reward function failed.
    """
    rows, reported = answer_prompts(
        generator,
        tokenizer,
        prompts=prompts,
        rewards=rewards,
        sampling=sampling,
        config=config,
        max_prompt_length=max_prompt_length,
        device=device,
        accelerator=accelerator,
    )
    return summarize(rows, config) | reported


def summarize(rows: Rows, config: EvaluationConfig) -> dict[str, float]:
    """The metrics of `evaluate_policy`, from what `answer_prompts` returned."""
    metrics: dict[str, float] = {}
    for name, table in rows.items():
        metrics |= summarize_rows(table, name)
        metrics |= summarize_votes(table, name, config) if name == "sampled" else {}
    # What people look for first stands first in logs.
    return dict(sorted(metrics.items(), key=lambda item: not item[0].endswith("_mean") or "length" in item[0]))


def answer_prompts(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, RewardFunction],
    sampling: SamplingConfig,
    config: EvaluationConfig,
    max_prompt_length: int | None = None,
    device: torch.device | str = "cpu",
    accelerator: Accelerator | None = None,
) -> tuple[Rows, dict[str, float]]:
    """Answer held-out prompts and judge each answer; arguments and errors as in `evaluate_policy`.

    Returns:
        Rows in an order that depends on the number of processes only, the same on all of them; and what rewards
        reported about themselves, `PASS_reward/...` -> mean over processes.
    """
    chosen = list(prompts)[: config.prompts]
    if not chosen:
        raise DataError("there is no held-out prompt to evaluate on", remedy="Hold some prompts out.")
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    extract = None if config.answers is None else load_reward(config.answers)
    passes = [("greedy", 1, True)] * config.greedy + [("sampled", config.samples_per_prompt, False)] * bool(
        config.samples_per_prompt
    )
    bring_up_to_date(generator)
    rows: Rows = {}
    reported: dict[str, float] = {}
    for name, count, greedy in passes:
        own = chosen[rank::processes]
        part: tuple[list[dict[str, list[Any]]], dict[str, float]] = ([], {})
        if own:
            samples = sample_completions(
                generator,
                tokenizer,
                prompts=own,
                sampling=sampling.model_copy(update={"greedy": greedy}),
                group_size=count,
                max_prompt_length=max_prompt_length,
                prompts_per_batch=config.prompts_per_batch,
                device=device,
                random=torch.Generator().manual_seed(mix_seed("evaluation", config.seed, rank)),
            )
            part = _judge(samples, rewards, count=count, extract=extract)
        parts = [part] if accelerator is None else gather_objects(accelerator, part)
        rows[name] = [row for table, _ in parts for row in table]
        told = [said for _, said in parts if said]
        reported |= {f"{name}_{key}": sum(said[key] for said in told) / len(told) for key in (told or [{}])[0]}
    return rows, reported


def _judge(
    samples: Samples,
    rewards: Mapping[str, RewardFunction],
    *,
    count: int,
    extract: Callable[[str], Hashable | None] | None,
) -> tuple[list[dict[str, list[Any]]], dict[str, float]]:
    """One row per prompt, and what the rewards reported."""
    columns: dict[str, list[Any]] = {"/length": samples.lengths.tolist(), "/ended": samples.ended.float().tolist()}
    reported: dict[str, float] = {}
    for name, function in rewards.items():
        scores, said = score_samples(function, samples)
        columns[name] = scores.tolist()
        reported |= said
    if extract is not None:
        read = [extract(text_of(completion)) for completion in samples.completions]
        columns["/answer"] = [None if answer is None else str(answer) for answer in read]
    starts = range(0, len(samples.prompts), count)
    return [{name: values[start : start + count] for name, values in columns.items()} for start in starts], reported


def summarize_rows(rows: Sequence[Mapping[str, Sequence[Any]]], name: str) -> dict[str, float]:
    """Metrics of one pass from what each prompt's answers got.

    Args:
        rows: One per prompt: reward name -> scores of its answers, and their "/length" and "/ended".
        name: Of the pass; begins the metrics' names.
    """
    metrics: dict[str, float] = {}
    for reward in rows[0]:
        if reward == "/answer":
            continue
        table = [row[reward] for row in rows]
        means = [sum(scores) / len(scores) for scores in table]
        match reward:
            case "/length":
                metrics[f"{name}_length_mean"] = sum(means) / len(means)
            case "/ended":
                metrics[f"{name}_ended_fraction"] = sum(means) / len(means)
            case _:
                mean, error = mean_and_standard_error(means)
                metrics[f"{name}_{reward}_mean"] = mean
                metrics[f"{name}_{reward}_standard_error"] = error
                metrics[f"{name}_{reward}_ci95"] = NORMAL_95 * error
                if len(table[0]) > 1:
                    metrics[f"{name}_{reward}_best"] = sum(map(max, table)) / len(table)
    return metrics


def summarize_votes(
    rows: Sequence[Mapping[str, Sequence[Any]]], name: str, config: EvaluationConfig
) -> dict[str, float]:
    """pass@k and maj@k of one pass, each with a bootstrap interval over prompts.

    Args:
        rows: As for `summarize_rows`, with "/answer" where answers vote.
        name: Of the pass; begins the metrics' names.
        config: Says which k.

    Raises:
        DataError: pass@k of a reward that is not 0 or 1.
    """
    metrics: dict[str, float] = {}
    for reward in (key for key in rows[0] if not key.startswith("/")):
        for k in config.pass_at:
            each = [pass_at_k(len(row[reward]), _count_right(row[reward], reward), k) for row in rows]
            metrics |= _with_interval(f"{name}_{reward}_pass_at_{k}", each)
        for k in config.majority_at:
            each = [majority_at_k(row["/answer"], row[reward], k) for row in rows]
            metrics |= _with_interval(f"{name}_{reward}_majority_at_{k}", each)
    return metrics


def compare_rows(ours: Rows, theirs: Rows) -> dict[str, float]:
    """How often one model's answers score higher than another's to the same prompts.

    Args:
        ours: What `answer_prompts` returned.
        theirs: The same of the other model, with the same prompts, rewards and number of processes.

    Returns:
        `PASS_NAME_win_rate` per pass and reward, ties counting half, with `_low` and `_high`, the ends of a 95 %
        bootstrap interval over prompts.
    """
    metrics: dict[str, float] = {}
    for name, table in ours.items():
        for reward in (key for key in table[0] if not key.startswith("/")):
            each = [win_rate(a[reward], b[reward]) for a, b in zip(table, theirs[name], strict=True)]
            metrics |= _with_interval(f"{name}_{reward}_win_rate", each)
    return metrics


def _count_right(scores: Sequence[float], reward: str) -> int:
    if any(score not in (0.0, 1.0) for score in scores):
        raise DataError(
            "pass@k counts right answers, and a score is neither 0 nor 1",
            where=f"evaluation.pass_at, reward {reward!r}",
            got=next(score for score in scores if score not in (0.0, 1.0)),
            remedy="Set pass_at: [], or judge by a reward that is 0 or 1.",
        )
    return sum(score == 1.0 for score in scores)


def _with_interval(name: str, values: Sequence[float]) -> dict[str, float]:
    mean, low, high = mean_and_interval(values)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and sample standard deviation / sqrt(n); the error of a single value is not known and given as nan.

    >>> mean_and_standard_error([0.0, 1.0, 1.0, 0.0])
    (0.5, 0.28867513459481287)
    """
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def make_evaluation(
    collector: PromptCollector,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, RewardFunction],
    config: EvaluationConfig,
) -> Callable[[], dict[str, float]]:
    """What `Run.evaluate` takes: `evaluate_policy` with the generator, lengths and temperature of a collector.

    Args:
        collector: The run's.
        prompts: Held out.
        rewards: Name -> reward function.
        config: How many answers.
    """

    def evaluate() -> dict[str, float]:
        with whole_weights(collector.policy):
            return evaluate_policy(
                collector.generator,
                collector.tokenizer,
                prompts=prompts,
                rewards=rewards,
                sampling=collector.config.sampling,
                config=config,
                max_prompt_length=collector.config.max_prompt_length,
                device=collector.device,
                accelerator=collector.accelerator,
            )

    return evaluate
