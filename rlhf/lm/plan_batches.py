"""The batch arithmetic of a run: prompts, completions, tokens, optimizer steps, as lines for `rlhf explain`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from rlhf.lm.measurement import RECHECK_EVERY, step_gives_old_log_probs


def rollout_batches(config: Any, processes: int) -> Iterator[str]:
    """Reinforcement learning on prompts: a config like `FineTuningConfig`."""
    collector, algorithm, iterations = config.collector, config.algorithm, config.iterations
    prompts, group = collector.prompts_per_iteration, collector.group_size
    completions, length = prompts * group, collector.sampling.max_completion_length
    steps = algorithm.epochs * algorithm.minibatches
    yield (
        f"an iteration: {prompts:,} prompts x {group} = {completions:,} completions of at most {length:,} tokens, "
        f"{completions * length:,} in all"
        + (f"; a process has {math.ceil(prompts / processes):,} prompts" if processes > 1 else "")
    )
    yield (
        f"an update: epochs x minibatches = {algorithm.epochs} x {algorithm.minibatches} = {steps:,} optimizer steps "
        f"of {math.ceil(completions / algorithm.minibatches):,} completions"
    )
    yield _forwards(config)
    yield (
        f"the run: {iterations:,} iterations = {iterations * prompts:,} prompts, {iterations * completions:,} "
        f"completions, at most {iterations * completions * length:,} tokens, {iterations * steps:,} optimizer steps"
    )
    yield from _looks(config)


def _forwards(config: Any) -> str:
    """Who reads a rollout before the update, and how often the update does."""
    collector, algorithm = config.collector, config.algorithm
    own_critic = algorithm.needs_critic and config.critic.start != "head"
    refers = algorithm.needs_reference or config.watch.kl_budget is not None
    readers = ["the reference"] * refers + ["the critic"] * own_critic
    tells = step_gives_old_log_probs(algorithm, sampling=collector.sampling, has_reference=refers)
    if collector.old_log_probs == "recompute" or (algorithm.needs_critic and not own_critic):
        readers.append("the policy")
    elif collector.old_log_probs == "auto" and tells:
        readers.append(f"every {RECHECK_EVERY}th time the policy (the one step gives its own old log-probs)")
    elif collector.old_log_probs == "auto":
        often = f"every {RECHECK_EVERY}th time the policy (always where the generator's log-probs are others)"
        readers.append(often if collector.sampling.full_support else "the policy")
    kept = ", the first with a forward that was kept" if collector.keep_forward else ""
    before = f"before it {' and '.join(readers)} read the completions" if readers else "nothing reads them before it"
    return f"forwards of an update: {algorithm.epochs} x over the completions, and backward{kept}; {before}"


def _looks(config: Any) -> Iterator[str]:
    """How often held-out prompts are answered: before the first update, every so many iterations, after the last."""
    evaluation, every, iterations = config.evaluation, config.run.evaluate_every, config.iterations
    looks = 1 if every == 0 else 1 + math.ceil(iterations / every)
    task = config.prompts.task
    count = evaluation.prompts or (task.held_out if task is not None else None)
    answers = evaluation.greedy + evaluation.samples_per_prompt
    known = "the" if count is None else f"{count:,}"
    yield (
        f"an evaluation: {known} held-out prompts, {answers} answers each"
        + ("" if count is None else f" = {count * answers:,} completions")
        + (f"; {looks:,} of them, the first before the first update" if every else "; at the end only")
    )


def episode_batches(config: Any, processes: int) -> Iterator[str]:
    """Reinforcement learning on episodes: a config like `EpisodeTrainingConfig`."""
    collector, algorithm, iterations = config.collector, config.algorithm, config.iterations
    starts, group, length = collector.starts_per_iteration, collector.group_size, collector.max_episode_length
    episodes, steps = starts * group, algorithm.epochs * algorithm.minibatches
    yield (
        f"an iteration: {starts:,} start states x {group} = {episodes:,} episodes of at most {length:,} tokens after "
        f"the first prompt, turns of at most {collector.sampling.max_completion_length:,}"
        + (f"; a process has {math.ceil(starts / processes):,} start states" if processes > 1 else "")
    )
    yield (
        f"an update: epochs x minibatches = {algorithm.epochs} x {algorithm.minibatches} = {steps:,} optimizer steps "
        f"of {math.ceil(episodes / algorithm.minibatches):,} episodes"
    )
    yield (
        f"the run: {iterations:,} iterations = {iterations * episodes:,} episodes, at most "
        f"{iterations * episodes * length:,} tokens, {iterations * steps:,} optimizer steps"
    )


def ranking_batches(config: Any, processes: int) -> Iterator[str]:
    """Training a reward model: a config like `reward_model`'s."""
    training = config.training
    share = training.batch_prompts // processes
    answers = f"{config.num_candidates}" if config.task is not None else "all their"
    length = "the model's context" if training.max_length is None else f"{training.max_length:,} tokens"
    yield (
        f"an optimizer step: {training.batch_prompts:,} prompts with {answers} answers, each with its prompt at most "
        f"{length}; a process takes {share:,} prompts, {min(training.microbatch_prompts or share, share):,} at once"
    )
    if config.task is None:
        held = f"of which {config.held_out:.0%} are held out" if config.held_out_data is None else "all of the file's"
        yield f"the run: {training.epochs} x the rankings, {held}, / {training.batch_prompts:,} optimizer steps"
        return
    steps = training.epochs * math.ceil(config.task.train / training.batch_prompts)
    yield (
        f"the run: {training.epochs} x {config.task.train:,} rankings / {training.batch_prompts:,} = {steps:,} "
        f"optimizer steps, {training.epochs * config.task.train * config.num_candidates:,} completions"
    )


def imitation_batches(config: Any, processes: int) -> Iterator[str]:
    """Supervised fine-tuning: a config like `sft`'s."""
    training = config.training
    share = training.batch_size // processes
    micro = min(training.microbatch_size or share, share)
    rows = "packed rows" if training.packing else "demonstrations"
    yield (
        f"an optimizer step: {training.batch_size:,} {rows} of at most {training.max_length:,} tokens, "
        f"{training.batch_size * training.max_length:,} in all; a process takes {share // micro:,} x {micro:,}"
    )
    if training.max_steps is None:
        yield f"the run: {training.epochs:g} x the {rows} / {training.batch_size:,} optimizer steps"
    else:
        yield (
            f"the run: {training.max_steps:,} optimizer steps = {training.max_steps * training.batch_size:,} {rows}, "
            f"at most {training.max_steps * training.batch_size * training.max_length:,} tokens"
        )


def answer_batches(config: Any, processes: int) -> Iterator[str]:
    """Evaluation of a model: a config like `evaluate`'s."""
    evaluation, length = config.evaluation, config.sampling.max_completion_length
    if config.data is None and config.prompts is None:
        yield "no prompts are answered"
    else:
        task = None if config.prompts is None else config.prompts.task
        count = evaluation.prompts or (task.held_out if task is not None else None)
        count = count or (None if config.data is None else config.data.limit)
        each = evaluation.greedy + evaluation.samples_per_prompt
        models = "" if config.against is None else ", by each of two models"
        total = "" if count is None else f" = {count * each:,} completions, {count * each * length:,} tokens"
        yield (
            f"{'the' if count is None else f'{count:,}'} prompts x {each} answers of at most {length:,} tokens"
            f"{total}{models}; {evaluation.prompts_per_batch:,} prompts at once"
            + (f" in each of {processes} processes" if processes > 1 else "")
        )
    if config.texts is not None:
        yield "the perplexity of given texts besides"


def candidate_batches(config: Any, processes: int) -> Iterator[str]:
    """Making rankings: a config like `rankings`'s."""
    length, each = config.sampling.max_completion_length, config.num_candidates
    task = config.source.task
    count = None if task is None else task.train + task.held_out
    total = "" if count is None else f" = {count * each:,} completions, {count * each * length:,} tokens"
    yield (
        f"{'the' if count is None else f'{count:,}'} prompts x {each} answers of at most {length:,} tokens{total}; "
        f"{config.prompts_per_batch:,} prompts at once"
    )


def judging_batches(config: Any, processes: int) -> Iterator[str]:
    """Holding a reward against rankings: a config like `reward_bench`'s."""
    per_call = f"the reward is asked for {config.completions_per_call:,} at once"
    if config.task is None:
        yield f"every answer of the rankings once; {per_call}"
    else:
        count, each = config.task.held_out, config.num_candidates
        yield f"{count:,} prompts x {each} = {count * each:,} answers; {per_call}"
