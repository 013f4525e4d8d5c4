"""The start of an over-optimization experiment: a policy, reward models of its answers, and best-of-n against them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from reward_models.ensemble import Combine, EnsembleScorer, combine_scores
from reward_models.loading import make_reward_model, prepare_tokenizer
from reward_models.overoptimization.settings import StartConfig, Variant
from reward_models.scorer import RewardModelScorer
from reward_models.trainer import train_reward_model
from rlhf.config import Config, validate
from rlhf.data.records import Prompt, Ranking
from rlhf.lm.actors import make_generator, pick_tokenizer
from rlhf.lm.best_of_n import best_of_n_kl, best_of_n_mean
from rlhf.lm.evaluation import mean_and_standard_error
from rlhf.lm.loading import ModelConfig, load_causal_lm, load_tokenizer
from rlhf.lm.rankings import rank_samples, write_rankings
from rlhf.lm.samples import Samples, sample_completions, score_samples
from rlhf.lm.sft import train_sft
from rlhf.lm.sources import load_demonstration_sets, load_prompt_sets, make_reward
from rlhf.rewards.protocol import RewardFunction
from rlhf.training.distributed import seed_everything

MEMBER_SEEDS = 1000
"""Member i of seed s is trained with seed 1000 s + i, so that no two runs share a reward model."""
PROMPTS_AT_ONCE = 16
"""Held-out prompts whose many answers are drawn together."""


class StartCell(Config):
    """Settings of the cell."""

    start: StartConfig
    seed: int
    """Of weights, samples and orders."""
    folder: str
    """Where models go."""


def prepare(settings: dict[str, Any]) -> dict[str, Any]:
    """Fine-tune the policy, rank its answers by the gold scorer, train the reward models, try best-of-n.

    Writes `sft/`, `rankings.jsonl`, `reward_model_<i>/` and `log.txt` into the folder.

    Args:
        settings: Of `StartCell`.

    Returns:
        "gold" and "gold_error" of the start on held-out prompts; "rankings", how many were learnt from; "accuracy" of
        each member on held-out rankings; "best_of_n": {"n", "kl", and per way of choosing (`single` is the first
        member) {"gold", "gold_error", "proxy"}, each a list over n}.
    """
    cell = validate(StartCell, settings, where="the cell's settings")
    config, folder = cell.start, Path(cell.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with logged(folder / "log.txt"):
        seed_everything(cell.seed)
        model = _fine_tune(config, seed=cell.seed, folder=folder / "sft")
        sampler = _Sampler(model, config, seed=cell.seed)
        gold = make_reward(config.gold)
        train, held_out = load_prompt_sets(config.source)
        samples, learnt = sampler.rank(train[: config.ranked_prompts], gold)
        write_rankings(folder / "rankings.jsonl", learnt)
        _, unseen = sampler.rank(held_out, gold)
        accuracy = []
        for member in range(config.members):
            seed = MEMBER_SEEDS * cell.seed + member
            scorer, metrics = _train_member(model, learnt, held_out=unseen, config=config, seed=seed, samples=samples)
            scorer.save_pretrained(member_folder(folder, member))
            accuracy.append(metrics["evaluation/accuracy"])
        members = [RewardModelScorer.from_pretrained(member_folder(folder, i)) for i in range(config.members)]
        scores, values = sampler.judge(held_out, members, gold)
    start, error = mean_and_standard_error(values.mean(dim=1).tolist())
    return {
        "gold": start,
        "gold_error": error,
        "rankings": sum(not ranking.tied for ranking in learnt),
        "accuracy": accuracy,
        "best_of_n": _best_of_n(scores, values, config),
    }


def start_model(config: StartConfig, folder: str | Path) -> ModelConfig:
    """The policy that everything starts from."""
    if config.sft is None:
        return config.model
    return config.model.model_copy(update={"path": str(Path(folder) / "sft"), "config": None, "tokenizer": None})


def member_folder(folder: str | Path, member: int) -> str:
    """Where a reward model is."""
    return str(Path(folder) / f"reward_model_{member}")


def open_reward(variant: Variant, config: StartConfig, folder: str | Path) -> RewardFunction:
    """What a variant optimizes."""
    if variant.combine is None:
        return RewardModelScorer.from_pretrained(member_folder(folder, 0))
    folders = [member_folder(folder, member) for member in range(config.members)]
    return EnsembleScorer.from_pretrained(folders, combine=variant.combine, coefficient=config.variance_coefficient)


@contextlib.contextmanager
def logged(file: Path) -> Iterator[None]:
    """What a cell prints goes to a file: several of them run at once, and the console shows the experiment."""
    with file.open("w", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def _fine_tune(config: StartConfig, *, seed: int, folder: Path) -> ModelConfig:
    """Write the policy, where there is `sft`; return where it is."""
    if config.sft is not None:
        tokenizer = pick_tokenizer(config.model, config.source)
        model = load_causal_lm(config.model, tokenizer)
        train, held_out = load_demonstration_sets(config.source)
        train_sft(model, tokenizer, train, config=config.sft, folder=folder, held_out=held_out, seed=seed)
    return start_model(config, folder.parent)


class _Sampler:
    """Draws the start's answers, from one generator."""

    def __init__(self, model: ModelConfig, config: StartConfig, *, seed: int) -> None:
        self.config = config
        self.tokenizer = load_tokenizer(model)
        self.generator = make_generator(load_causal_lm(model, self.tokenizer), self.tokenizer)
        self.random = torch.Generator().manual_seed(seed)

    def draw(self, prompts: Sequence[Prompt], count: int) -> Samples:
        return sample_completions(
            self.generator,
            self.tokenizer,
            prompts=prompts,
            sampling=self.config.sampling,
            group_size=count,
            random=self.random,
        )

    def rank(self, prompts: Sequence[Prompt], gold: RewardFunction) -> tuple[Samples, list[Ranking]]:
        """Answers, and their order by the gold score; where all tie there is nothing to learn."""
        samples = self.draw(prompts, self.config.num_candidates)
        rankings = rank_samples(samples, score_samples(gold, samples)[0], num_candidates=self.config.num_candidates)
        return samples, [ranking for ranking in rankings if not ranking.tied]

    def judge(
        self, prompts: Sequence[Prompt], members: Sequence[RewardFunction], gold: RewardFunction
    ) -> tuple[Tensor, Tensor]:
        """Scores of each member [k, P, N] and gold scores [P, N] of N answers to each of P prompts."""
        scores, values = [], []
        for start in range(0, len(prompts), PROMPTS_AT_ONCE):
            part = prompts[start : start + PROMPTS_AT_ONCE]
            samples = self.draw(part, self.config.best_of_n.samples)
            judged = torch.stack([score_samples(member, samples)[0] for member in members])
            scores.append(judged.view(len(members), len(part), -1))
            values.append(score_samples(gold, samples)[0].view(len(part), -1))
        return torch.cat(scores, dim=1), torch.cat(values)


def _train_member(
    model: ModelConfig,
    rankings: list[Ranking],
    *,
    held_out: list[Ranking],
    config: StartConfig,
    seed: int,
    samples: Samples,
) -> tuple[RewardModelScorer, dict[str, float]]:
    """A reward model on the start's body, normalised on the start's answers: 0 is their mean, 1 their deviation."""
    tokenizer = prepare_tokenizer(load_tokenizer(model))
    reward_model = make_reward_model(model, tokenizer, seed=seed)
    settings = config.reward_model
    metrics = train_reward_model(reward_model, tokenizer, rankings, held_out=held_out, settings=settings, seed=seed)
    scorer = RewardModelScorer(reward_model, tokenizer)
    scorer.normalize_on([prompt.prompt for prompt in samples.prompts], samples.completions)
    return scorer, metrics


def _best_of_n(scores: Tensor, values: Tensor, config: StartConfig) -> dict[str, Any]:
    """Gold and proxy of the best of n by each way of choosing."""
    ns = config.best_of_n.ns
    ways = {"single": scores[0]}
    for combine in get_args(Combine):
        ways[combine] = combine_scores(scores, combine=combine, coefficient=config.variance_coefficient)
    report: dict[str, Any] = {"n": ns, "kl": [best_of_n_kl(n) for n in ns]}
    for name, proxy in ways.items():
        gold = [mean_and_standard_error(best_of_n_mean(proxy, values, n).tolist()) for n in ns]
        report[name] = {
            "gold": [mean for mean, _ in gold],
            "gold_error": [error for _, error in gold],
            "proxy": [best_of_n_mean(proxy, proxy, n).mean().item() for n in ns],
        }
    return report
