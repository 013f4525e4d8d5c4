"""Make K-way rankings of a model's own completions by a scorer: stand-in for human labellers."""

from __future__ import annotations

import torch
from pydantic import Field

from rlhf.cli import launch
from rlhf.config import Config
from rlhf.data.records import Prompt
from rlhf.lm.actors import make_generator
from rlhf.lm.generation import bring_up_to_date
from rlhf.lm.generator_config import GeneratorConfig, TransformersGeneratorConfig
from rlhf.lm.loading import ModelConfig, load_causal_lm, load_tokenizer
from rlhf.lm.rankings import rank_samples, write_rankings
from rlhf.lm.samples import sample_completions, score_samples
from rlhf.lm.sampling import SamplingConfig
from rlhf.lm.sources import RewardConfig, SourceConfig, load_prompt_sets, make_reward
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig


class RankingsConfig(Config):
    """Whose completions are ranked, how many, and by what."""

    model: ModelConfig
    source: SourceConfig
    """Prompts; those held out get a file of their own."""
    scorer: RewardConfig | list[RewardConfig] | None = None
    """What orders the completions; null takes the task's gold scorer."""
    num_candidates: int = Field(4, ge=2)
    """K, completions per prompt."""
    min_score_gap: float = Field(0.0, ge=0)
    """Scores nearer than this to the next one tie."""
    sampling: SamplingConfig
    generator: GeneratorConfig = TransformersGeneratorConfig()
    """What writes the completions: the model itself, or vLLM."""
    prompts_per_batch: int = Field(256, ge=1)
    """Prompts answered at once."""
    run: RunConfig = RunConfig()


def main(config: RankingsConfig) -> dict[str, float]:
    """Write `<run directory>/rankings.jsonl` and `held_out.jsonl`."""
    run = Run(config.run, resolved=config, iterations=0, recipe="rankings")
    tokenizer = load_tokenizer(config.model)
    model = load_causal_lm(config.model, tokenizer).to(run.accelerator.device)
    generator = make_generator(
        model, tokenizer, config=config.generator, accelerator=run.accelerator, seed=config.run.seed
    )
    bring_up_to_date(generator)
    task = config.source.make_task()
    scorer = task.gold if config.scorer is None and task is not None else make_reward(config.scorer)
    random = torch.Generator().manual_seed(config.run.seed)

    def write(name: str, prompts: list[Prompt]) -> dict[str, float]:
        samples = sample_completions(
            generator,
            tokenizer,
            prompts=prompts,
            sampling=config.sampling,
            group_size=config.num_candidates,
            prompts_per_batch=config.prompts_per_batch,
            device=run.accelerator.device,
            random=random,
        )
        scores, _ = score_samples(scorer, samples)
        rankings = rank_samples(samples, scores, num_candidates=config.num_candidates, min_gap=config.min_score_gap)
        tied = write_rankings(run.directory / f"{name}.jsonl", rankings)
        run.say(f"{name}.jsonl: {len(rankings) - tied} rankings of {config.num_candidates}; {tied} all tied, left out")
        return {f"{name}": len(rankings) - tied, f"{name}_tied": tied, f"{name}_score_mean": scores.mean().item()}

    train, held_out = load_prompt_sets(config.source)
    return run.finish(**write("rankings", train), **write("held_out", held_out))


CONFIG = RankingsConfig

if __name__ == "__main__":
    launch(__file__)
