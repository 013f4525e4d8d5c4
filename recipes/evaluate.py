"""Evaluate a model folder: accuracy, pass@k, majority votes, win rate against another model, perplexity."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from rlhf.cli import launch
from rlhf.config import Config
from rlhf.data.loading import load_demonstrations, load_prompts
from rlhf.data.settings import DataConfig
from rlhf.lm.actors import make_generator
from rlhf.lm.evaluation import EvaluationConfig, Rows, answer_prompts, compare_rows, summarize
from rlhf.lm.generator_config import GeneratorConfig, TransformersGeneratorConfig
from rlhf.lm.loading import ModelConfig, load_causal_lm, load_tokenizer
from rlhf.lm.perplexity import perplexity
from rlhf.lm.sampling import SamplingConfig
from rlhf.lm.sources import RewardConfig, SourceConfig, load_prompt_sets, make_reward
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig


class EvaluateConfig(Config):
    """Which model, and what it is held against."""

    model: ModelConfig
    against: ModelConfig | None = None
    """Another model that answers the same prompts; the win rate against it is reported for each reward."""
    prompts: SourceConfig | None = None
    """Its held-out prompts are answered."""
    data: DataConfig | None = None
    """All of its prompts are answered, in place of `prompts`."""
    rewards: dict[str, RewardConfig] = {}
    """Name -> what judges the answers."""
    sampling: SamplingConfig = SamplingConfig()
    generator: GeneratorConfig = TransformersGeneratorConfig()
    """What writes the answers: the model itself, or vLLM."""
    evaluation: EvaluationConfig = EvaluationConfig()
    texts: DataConfig | None = None
    """Demonstrations whose completions are predicted, for the perplexity."""
    max_text_length: int | None = None
    """Tokens of a text that are looked at; null looks at all."""
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _refuse_what_would_not_be_read(self) -> Self:
        if self.prompts is not None and self.data is not None:
            raise ValueError("give prompts (its held-out part is answered) or data (all of it), not both")
        answers = self.prompts is not None or self.data is not None
        if not answers and self.texts is None:
            raise ValueError("there is nothing to evaluate; give data (prompts to answer), texts (for the perplexity)")
        if not answers and (self.rewards or self.against is not None):
            raise ValueError("rewards and against judge answers, and no prompt is answered; give data or prompts")
        if self.against is not None and not self.rewards:
            raise ValueError("against needs rewards: a win is a higher reward")
        return self


def main(config: EvaluateConfig) -> dict[str, float]:
    """Write the metrics to `<run directory>/summary.json`."""
    run = Run(config.run, resolved=config, iterations=0, recipe="evaluate")
    rows, metrics = answer(config, config.model, run)
    if config.against is not None:
        metrics |= compare_rows(rows, answer(config, config.against, run)[0])
    if config.texts is not None:
        tokenizer = load_tokenizer(config.model)
        model = load_causal_lm(config.model, tokenizer).to(run.accelerator.device).eval()
        texts = load_demonstrations(config.texts)
        metrics |= perplexity(model, tokenizer, demonstrations=texts, max_length=config.max_text_length)
    for name, value in metrics.items():
        run.say(f"{name}: {value:.4g}")
    return run.finish(**{f"evaluation/{name}": value for name, value in metrics.items()})


def answer(config: EvaluateConfig, chosen: ModelConfig, run: Run) -> tuple[Rows, dict[str, float]]:
    """One model's judged answers, and what they come to; nothing where there are no prompts."""
    if config.data is None and config.prompts is None:
        return {}, {}
    tokenizer = load_tokenizer(chosen)
    model = load_causal_lm(chosen, tokenizer).to(run.accelerator.device).eval()
    rows, reported = answer_prompts(
        make_generator(model, tokenizer, config=config.generator, accelerator=run.accelerator),
        tokenizer,
        prompts=load_prompts(config.data) if config.prompts is None else load_prompt_sets(config.prompts)[1],
        rewards={name: make_reward(reward) for name, reward in config.rewards.items()},
        sampling=config.sampling,
        config=config.evaluation,
        device=run.accelerator.device,
        accelerator=run.accelerator,
    )
    return rows, summarize(rows, config.evaluation) | reported


CONFIG = EvaluateConfig

if __name__ == "__main__":
    launch(__file__)
