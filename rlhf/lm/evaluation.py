"""Held-out evaluation: how good are a policy's answers, greedy and sampled, and how sane is its language."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config import Config
from rlhf.data.collation import left_pad, right_pad
from rlhf.data.records import Demonstration, Prompt
from rlhf.data.tokenization import encode_completion, encode_prompt
from rlhf.errors import DataError
from rlhf.lm.collector import PromptCollector
from rlhf.lm.generation import Generator
from rlhf.lm.measurement import measure_log_probs
from rlhf.lm.policy import LanguageModelPolicy
from rlhf.lm.prompt_stream import mix_seed
from rlhf.lm.samples import sample_completions, score_samples
from rlhf.lm.sampling import SamplingConfig
from rlhf.rewards.protocol import RewardFunction
from rlhf.training.distributed import gather_objects

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
    seed: int = 0
    """Of the drawn answers: the same at every evaluation, so that curves are comparable."""


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
        `PASS_ended_fraction` and `PASS_length_mean`; and `sampled_NAME_best`, the mean of each prompt's best answer
        (for a 0/1 reward, pass@n). With one reward function named "score": `greedy_score_mean`, ...

    Raises:
        DataError: There is no prompt, or one is too long.
        RewardError: A reward function failed.
    """
    chosen = list(prompts)[: config.prompts]
    if not chosen:
        raise DataError("there is no held-out prompt to evaluate on", remedy="Hold some prompts out.")
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    passes = [("greedy", 1, True)] * config.greedy + [("sampled", config.samples_per_prompt, False)] * bool(
        config.samples_per_prompt
    )
    metrics: dict[str, float] = {}
    for name, count, greedy in passes:
        rows: list[dict[str, list[float]]] = []
        own = chosen[rank::processes]
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
            judged = {
                reward: score_samples(function, samples)[0].view(-1, count) for reward, function in rewards.items()
            }
            lengths, ended = samples.lengths.view(-1, count), samples.ended.view(-1, count)
            for index in range(len(own)):
                row = {reward: scores[index].tolist() for reward, scores in judged.items()}
                rows.append({**row, "/length": lengths[index].tolist(), "/ended": ended[index].float().tolist()})
        everyone = rows if accelerator is None else [row for part in gather_objects(accelerator, rows) for row in part]
        metrics |= summarize_rows(everyone, name)
    # What people look for first stands first in logs.
    return dict(sorted(metrics.items(), key=lambda item: not item[0].endswith("_mean") or "length" in item[0]))


def summarize_rows(rows: Sequence[Mapping[str, Sequence[float]]], name: str) -> dict[str, float]:
    """Metrics of one pass from what each prompt's answers got.

    Args:
        rows: One per prompt: reward name -> scores of its answers, and their "/length" and "/ended".
        name: Of the pass; begins the metrics' names.
    """
    metrics: dict[str, float] = {}
    for reward in rows[0]:
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


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Probability that at least one of k answers, drawn without replacement from those given, is right.

    `1 - C(n - c, k) / C(n, k)`. Source: Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1.

    >>> pass_at_k(8, 1, 4)
    0.5
    """
    if not 1 <= k <= answers:
        raise DataError("pass@k needs at least k answers a prompt", got=f"{answers} answers, k={k}")
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    demonstrations: Sequence[Demonstration],
    max_length: int | None = None,
    tokens_per_batch: int = 16_384,
) -> dict[str, float]:
    """How surprised a model is by held-out texts, per completion token.

    Args:
        model: A causal language model, bare or with adapters.
        tokenizer: Its tokenizer.
        demonstrations: Prompt and completion; an empty prompt makes the whole text count (but its first token, where
            the tokenizer adds no beginning-of-text token to predict it from).
        max_length: Tokens of a text that are looked at; the rest is cut off. None looks at all.
        tokens_per_batch: Budget of one forward.

    Returns:
        "perplexity" = exp("loss"), "loss" in nats per token, "loss_standard_error" (over texts, by the delta method
        of a ratio), "tokens".

    Raises:
        DataError: No text has a token to predict.
    """
    prompts, completions = [], []
    for item in demonstrations:
        ids = encode_prompt(tokenizer, item.prompt)
        rest = encode_completion(tokenizer, item.prompt, item.completion, add_end=False)
        if not ids:
            ids, rest = rest[:1], rest[1:]
        rest = rest if max_length is None else rest[: max(0, max_length - len(ids))]
        if rest:
            prompts.append(ids)
            completions.append(rest)
    if not prompts:
        raise DataError("there is no token to predict in the held-out texts", got=f"{len(demonstrations)} texts")
    losses, counts = _losses(model, prompts, completions, tokens_per_batch=tokens_per_batch)
    total = counts.sum()
    loss = losses.sum() / total
    residuals = losses - loss * counts
    error = residuals.square().sum().sqrt() / total
    return {
        "perplexity": math.exp(loss.item()),
        "loss": loss.item(),
        "loss_standard_error": error.item(),
        "tokens": float(total),
    }


def _losses(
    model: Any, prompts: list[list[int]], completions: list[list[int]], *, tokens_per_batch: int
) -> tuple[Tensor, Tensor]:
    """[N] summed negative log-prob of each completion, and [N] its tokens, float64."""
    policy = LanguageModelPolicy(model)
    device = next(policy.parameters()).device
    prompt_ids, prompt_mask = (tensor.to(device) for tensor in left_pad(prompts, 0))
    completion_ids, completion_mask = (tensor.to(device) for tensor in right_pad(completions, 0))
    inputs = {"prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_mask": completion_mask}
    log_probs = measure_log_probs(policy.action_log_probs, inputs, completion_ids, tokens=tokens_per_batch)
    return -log_probs.double().sum(dim=1).cpu(), completion_mask.sum(dim=1).double().cpu()


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
