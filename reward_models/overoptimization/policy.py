"""One policy optimized against the proxy, with gold score, proxy and KL measured on held-out prompts on the way."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reward_models.overoptimization.settings import OptimizationConfig, StartConfig, Variant
from reward_models.overoptimization.start import logged, open_reward, start_model
from rlhf.config import Config, validate
from rlhf.data.records import Prompt
from rlhf.lm.actors import Actors, make_actors
from rlhf.lm.collector import PromptCollector
from rlhf.lm.collector_config import CollectorConfig
from rlhf.lm.evaluation import mean_and_standard_error
from rlhf.lm.loading import load_tokenizer
from rlhf.lm.measurement import measure_alone
from rlhf.lm.prompt_stream import mix_seed
from rlhf.lm.samples import Samples, sample_completions, score_samples
from rlhf.lm.sources import load_prompt_sets, make_reward
from rlhf.lm.watch import Watch, WatchConfig
from rlhf.rewards.protocol import RewardFunction, text_of
from rlhf.training.distributed import make_accelerator
from rlhf.training.learner import Learner
from rlhf.training.loop import optimize_policy
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig

SHOWN = 6
"""Answers kept at each measurement."""


class PolicyCell(Config):
    """Settings of the cell."""

    start: StartConfig
    optimization: OptimizationConfig
    variant: Variant
    name: str
    """Of the variant: its folder."""
    seed: int
    """Of sampling and shuffling, and of the start that it belongs to."""
    folder: str
    """Where the start is."""


def optimize(settings: dict[str, Any]) -> dict[str, Any]:
    """Optimize one policy against the proxy.

    The run directory `<folder>/<name>` has its metrics and samples, as every run has.

    Args:
        settings: Of `PolicyCell`; `prepare` has filled the folder.

    Returns:
        Lists over the measurements: "iteration", "kl" (to the start, nats per answer, from the measured answers
        themselves), "gold", "proxy" (what is optimized), "gold_error" (standard error over prompts), "length",
        "answers" (a few of them: prompt, completion, gold, proxy); and "ended_because", null where all iterations ran.
    """
    cell = validate(PolicyCell, settings, where="the cell's settings")
    directory = Path(cell.folder) / cell.name
    directory.mkdir(parents=True, exist_ok=True)
    with logged(Path(cell.folder) / f"{cell.name}.log"):
        accelerator = make_accelerator()
        settings_of_run = RunConfig(
            directory=str(directory),
            seed=cell.seed,
            evaluate_every=cell.optimization.evaluate_every,
            log_every=cell.optimization.evaluate_every,
            overwrite=True,
            progress_bar=False,
        )
        iterations = cell.optimization.iterations
        run = Run(
            settings_of_run, resolved=cell, iterations=iterations, accelerator=accelerator, recipe="overoptimization"
        )
        learner, collector, measured = _wire(cell, run)
        run.evaluate = measured
        watch = Watch(WatchConfig(enabled=False, kl_budget=cell.variant.kl_budget), say=run.say)
        warmup = cell.optimization.critic.warmup_iterations if learner.algorithm.needs_critic else 0
        optimize_policy(collector, learner, run, observers=[watch], critic_warmup=warmup)
    ended = run.completed < iterations
    reason = f"KL budget of {cell.variant.kl_budget} nats spent at iteration {run.completed}" if ended else None
    return {**measured.curve, "ended_because": reason}


def _wire(cell: PolicyCell, run: Run) -> tuple[Learner, PromptCollector, HeldOut]:
    config, accelerator = cell.optimization, run.accelerator
    model = start_model(cell.start, cell.folder)
    sampling = cell.start.sampling
    reward = open_reward(cell.variant, cell.start, cell.folder)
    algorithm = config.with_coefficient(cell.variant.kl_coefficient).with_length(sampling.max_completion_length)
    actors = make_actors(
        model,
        algorithm,
        temperature=sampling.temperature,
        critic=config.critic.start,
        tokenizer=load_tokenizer(model),
        keep_reference=True,
        accelerator=accelerator,
    )
    train, held_out = load_prompt_sets(cell.start.source)
    learner = Learner(actors.policy, algorithm, config.update, accelerator=accelerator, seed=cell.seed)
    collector = PromptCollector(
        train,
        policy=actors.policy,
        generator=actors.generator,
        tokenizer=actors.tokenizer,
        reward=reward,
        config=CollectorConfig(
            prompts_per_iteration=config.prompts_per_iteration, group_size=config.group_size, sampling=sampling
        ),
        algorithm=algorithm,
        reference=actors.reference,
        accelerator=accelerator,
        seed=cell.seed,
    )
    rewards = {"proxy": reward, "gold": make_reward(cell.start.gold)}
    return learner, collector, HeldOut(run, actors, collector, held_out, rewards=rewards, cell=cell)


class HeldOut:
    """Measures gold, proxy and KL on the same answers to held-out prompts; as `Run.evaluate` it is called on the way.

    Attributes:
        curve: What `optimize` returns of it.
    """

    def __init__(
        self,
        run: Run,
        actors: Actors,
        collector: PromptCollector,
        prompts: Sequence[Prompt],
        *,
        rewards: dict[str, RewardFunction],
        cell: PolicyCell,
    ) -> None:
        self._run, self._actors, self._collector, self._prompts = run, actors, collector, prompts
        self._rewards, self._cell = rewards, cell
        names = ("iteration", "kl", "gold", "proxy", "gold_error", "length", "answers")
        self.curve: dict[str, list[Any]] = {name: [] for name in names}

    def __call__(self) -> dict[str, float]:
        """Draw answers, the same random numbers each time, and measure them."""
        count = self._cell.optimization.samples_per_prompt
        samples = sample_completions(
            self._actors.generator,
            self._actors.tokenizer,
            prompts=self._prompts,
            sampling=self._cell.start.sampling,
            group_size=count,
            device=self._collector.device,
            random=torch.Generator().manual_seed(mix_seed("evaluation", self._cell.seed)),
        )
        scores = {name: score_samples(reward, samples)[0] for name, reward in self._rewards.items()}
        means = scores["gold"].view(len(self._prompts), count).mean(dim=1)
        gold, error = mean_and_standard_error(means.tolist())
        metrics = {
            "kl": self._kl(samples),
            "gold": gold,
            "proxy": scores["proxy"].mean().item(),
            "gold_error": error,
            "length": samples.lengths.float().mean().item(),
        }
        for name, value in metrics.items():
            self.curve[name].append(value)
        self.curve["iteration"].append(self._run.completed)
        rows = range(0, count * min(SHOWN, len(self._prompts)), count)
        self.curve["answers"].append(
            [
                {
                    "prompt": text_of(samples.prompts[row].prompt),
                    "completion": text_of(samples.completions[row]),
                    **{name: values[row].item() for name, values in scores.items()},
                }
                for row in rows
            ]
        )
        return {f"{name}_mean" if name in scores else name: value for name, value in metrics.items()}

    def _kl(self, samples: Samples) -> float:
        """Mean over answers of the sum of log policy - log start over their tokens: unbiased, in nats per answer."""
        assert self._actors.reference is not None, "make_actors was asked to keep one"
        mask = samples.completion_mask
        inputs = {
            "prompt_ids": samples.prompt_ids,
            "prompt_mask": samples.prompt_mask,
            "completion_mask": mask,
        }
        start = measure_alone(
            self._actors.reference.log_probs,
            inputs,
            samples.completion_ids,
            tokens=self._collector.config.measure_tokens,
        )
        return ((samples.sampling_log_probs - start) * mask).sum(dim=1).mean().item()
