"""Evaluate a model folder on held-out prompts and texts: scores, lengths, perplexity; no training."""

from __future__ import annotations

from rlhf.cli import launch
from rlhf.config import Config
from rlhf.data.loading import load_demonstrations
from rlhf.data.settings import DataConfig
from rlhf.lm.actors import make_generator
from rlhf.lm.evaluation import EvaluationConfig, evaluate_policy, perplexity
from rlhf.lm.loading import ModelConfig, load_causal_lm, load_tokenizer
from rlhf.lm.sampling import SamplingConfig
from rlhf.lm.sources import RewardConfig, SourceConfig, load_prompt_sets, make_reward
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig


class EvaluateConfig(Config):
    """Which model, and what it is held against."""

    model: ModelConfig
    prompts: SourceConfig | None = None
    """Its held-out prompts are answered."""
    rewards: dict[str, RewardConfig] = {}
    """Name -> what judges the answers."""
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    texts: DataConfig | None = None
    """Demonstrations whose completions are predicted, for the perplexity."""
    max_text_length: int | None = None
    """Tokens of a text that are looked at; null looks at all."""
    run: RunConfig = RunConfig()


def main(config: EvaluateConfig) -> dict[str, float]:
    """Write the metrics to `<run directory>/summary.json`."""
    run = Run(config.run, resolved=config, iterations=0, recipe="evaluate")
    device = run.accelerator.device
    tokenizer = load_tokenizer(config.model)
    model = load_causal_lm(config.model, tokenizer).to(device).eval()
    metrics: dict[str, float] = {}
    if config.prompts is not None:
        metrics |= evaluate_policy(
            make_generator(model, tokenizer),
            tokenizer,
            prompts=load_prompt_sets(config.prompts)[1],
            rewards={name: make_reward(reward) for name, reward in config.rewards.items()},
            sampling=config.sampling,
            config=config.evaluation,
            device=device,
            accelerator=run.accelerator,
        )
    if config.texts is not None:
        texts = load_demonstrations(config.texts)
        metrics |= perplexity(model, tokenizer, demonstrations=texts, max_length=config.max_text_length)
    for name, value in metrics.items():
        run.say(f"{name}: {value:.4g}")
    return run.finish(**{f"evaluation/{name}": value for name, value in metrics.items()})


CONFIG = EvaluateConfig

if __name__ == "__main__":
    launch(__file__)
