"""Reinforcement learning of a language model, from settings to a saved folder: what `grpo` and `ppo_rlhf` share.

The two recipes differ in their defaults only; which algorithm runs is a row of settings, not a class.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
from rlhf.training.run import Run
from rlhf.training.run_config import RunConfig
from rlhf.training.update_config import UpdateConfig


class FineTuningConfig(Config):
    """A run: a model, prompts, rewards, an algorithm."""

    model: ModelConfig
    critic: str = "head"
    """`head` on the policy's hidden states, `copy` of the policy, or the folder of a reward model to start from; not
    read where the algorithm trains no critic."""
    prompts: SourceConfig
    sft: SftConfig | None = None
    """Fine-tune the model on the source's demonstrations first; null starts from the model as it is."""
    reward: RewardConfig | list[RewardConfig]
    """What is optimized; a reward model: `reward_models:RewardModelScorer.from_pretrained`."""
    gold: RewardConfig | None = None
    """A scorer that only evaluation looks at: where the reward rises and it falls, there is over-optimization."""
    algorithm: AlgorithmChoice
    collector: CollectorConfig = CollectorConfig()
    update: UpdateConfig = UpdateConfig(learning_rate=1e-6)
    iterations: int = Field(ge=1)
    """Rollouts; each is followed by one update."""
    evaluation: EvaluationConfig = EvaluationConfig()
    mixed_precision: Literal["no", "bf16"] | None = None
    """bf16 runs forwards in bfloat16; null takes the launcher's word."""
    run: RunConfig = RunConfig()


def fine_tune(config: FineTuningConfig, *, recipe: str) -> dict[str, float]:
    """Train, evaluate, save the model to `<run directory>/model`.

    Args:
        config: The whole run.
        recipe: Name of the recipe, part of the default run directory.

    Returns:
        The metrics of summary.json.

    Raises:
        UserError: Settings, data, model or rewards that cannot be used, before anything is trained.
    """
    require_groups(config.algorithm, config.collector)
    accelerator = make_accelerator(mixed_precision=config.mixed_precision)
    run = Run(config.run, resolved=config, iterations=config.iterations, accelerator=accelerator, recipe=recipe)
    prompts, held_out = load_prompt_sets(config.prompts)
    reward = make_reward(config.reward)
    start, tokenizer = prepare_start(
        config.model, config.prompts, sft=config.sft, folder=run.directory / "sft", run=run, accelerator=accelerator
    )
    sampling = config.collector.sampling
    algorithm = config.algorithm.with_length(sampling.max_completion_length)
    actors = make_actors(
        start,
        algorithm,
        temperature=sampling.temperature,
        critic=config.critic,
        tokenizer=tokenizer,
        accelerator=accelerator,
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
    rewards = {"score": reward} | ({"gold": make_reward(config.gold)} if config.gold is not None else {})
    run.evaluate = make_evaluation(collector, held_out, rewards, config.evaluation)
    metrics = optimize_policy(collector, learner, run)
    actors.save(run.directory / "model", accelerator)
    return metrics
