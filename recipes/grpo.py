"""Train a language model with a group algorithm (GRPO, RLOO, DAPO, ...) and rewards that a program can verify."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlhf.cli import launch
from rlhf.config import Config
from rlhf.core.presets import AlgorithmChoice
from rlhf.lm.actors import make_actors, prepare_start, require_groups
from rlhf.lm.collector import PromptCollector
from rlhf.lm.collector_config import CollectorConfig
from rlhf.lm.evaluation import EvaluationConfig, make_evaluation
from rlhf.lm.loading import ModelConfig
from rlhf.lm.sft import SftConfig
from rlhf.lm.sources import RewardConfig, SourceConfig, load_prompt_sets, make_reward
from rlhf.training.distributed import make_accelerator
from rlhf.training.learner import Learner
from rlhf.training.loop import optimize_policy
from rlhf.training.run import Run, RunConfig
from rlhf.training.update_config import UpdateConfig


class GrpoConfig(Config):
    """A run: a model, prompts, rewards, an algorithm."""

    model: ModelConfig
    prompts: SourceConfig
    sft: SftConfig | None = None
    """Fine-tune the model on the source's demonstrations first; null starts from the model as it is."""
    reward: RewardConfig | list[RewardConfig]
    algorithm: AlgorithmChoice = Field("grpo", validate_default=True)
    collector: CollectorConfig = CollectorConfig(group_size=8)
    update: UpdateConfig = UpdateConfig(learning_rate=1e-6)
    iterations: int = Field(ge=1)
    """Rollouts; each is followed by one update."""
    evaluation: EvaluationConfig = EvaluationConfig()
    mixed_precision: Literal["no", "bf16"] | None = None
    """bf16 runs forwards in bfloat16; null takes the launcher's word."""
    run: RunConfig = RunConfig()


def main(config: GrpoConfig) -> dict[str, float]:
    """Train, evaluate, save the model to `<run directory>/model`."""
    require_groups(config.algorithm, config.collector)
    accelerator = make_accelerator(mixed_precision=config.mixed_precision)
    run = Run(config.run, resolved=config, iterations=config.iterations, accelerator=accelerator, recipe="grpo")
    prompts, held_out = load_prompt_sets(config.prompts)
    reward = make_reward(config.reward)
    start, tokenizer = prepare_start(
        config.model, config.prompts, sft=config.sft, folder=run.directory / "sft", run=run, accelerator=accelerator
    )
    sampling = config.collector.sampling
    algorithm = config.algorithm.with_length(sampling.max_completion_length)
    actors = make_actors(
        start, algorithm, temperature=sampling.temperature, tokenizer=tokenizer, accelerator=accelerator
    )
    learner = Learner(actors.policy, algorithm, config.update, accelerator=accelerator, seed=config.run.seed)
    collector = PromptCollector(
        prompts,
        policy=actors.policy,
        generator=actors.generator,
        tokenizer=tokenizer,
        reward=reward,
        config=config.collector,
        single_step=algorithm.epochs * algorithm.minibatches == 1,
        reference=actors.reference,
        accelerator=accelerator,
        seed=config.run.seed,
    )
    run.evaluate = make_evaluation(collector, held_out, {"score": reward}, config.evaluation)
    metrics = optimize_policy(collector, learner, run)
    actors.save(run.directory / "model", accelerator)
    return metrics


CONFIG = GrpoConfig

if __name__ == "__main__":
    launch(__file__)
