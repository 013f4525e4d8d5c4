"""Prompts of reasoning-gym's procedural tasks, by name."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from rlhf.config import Config
from rlhf.data.records import Prompt, Text
from rlhf.errors import ConfigError
from rlhf.rewards.reasoning import load_reasoning_gym

INSTRUCTION = "Think first, then give the answer alone between <answer> and </answer>."


class ReasoningGymConfig(Config):
    """Which tasks, and how many prompts of each; reward them with `rlhf.rewards.reasoning:ReasoningGym`."""

    tasks: dict[str, dict[str, Any]] = Field(min_length=1)
    """A task's name -> its own settings, such as `{chain_sum: {max_terms: 3}}`; {} takes the defaults."""
    train: int = Field(1000, ge=1)
    """Training prompts of each task."""
    held_out: int = Field(100, ge=1)
    """Held-out prompts of each task; none of them is among the training prompts."""
    seed: int = 0
    """Of the prompts; independent of the run's seed."""
    chat: bool = True
    """Make chat prompts, with the instruction to answer between <answer> tags as the system message."""


def make_reasoning_prompts(config: ReasoningGymConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Draw training and held-out prompts; the column `entry` holds the whole record for the verifier.

    Raises:
        RewardError: reasoning-gym is not installed.
        ConfigError: No such task, settings it does not take, or only held-out prompts are left.
    """
    held_out = _draw(config, config.held_out, seed=config.seed + 1)
    seen = {prompt.columns["entry"]["question"] for prompt in held_out}
    drawn = _draw(config, config.train, seed=config.seed)
    train = [prompt for prompt in drawn if prompt.columns["entry"]["question"] not in seen]
    if not train:
        raise ConfigError(
            "the tasks have so few prompts that all of them are held out",
            where="prompts.reasoning_gym",
            got=f"{len(held_out)} held out",
            remedy="Lower held_out, or make the tasks larger.",
        )
    return train, held_out


def _draw(config: ReasoningGymConfig, size: int, *, seed: int) -> list[Prompt]:
    package = load_reasoning_gym()
    prompts = []
    for name, settings in config.tasks.items():
        try:
            records = package.create_dataset(name, size=size, seed=seed, **settings)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(
                f"reasoning-gym refuses the task: {error}", where=f"prompts.reasoning_gym.tasks.{name}", got=settings
            ) from error
        prompts += [_prompt(dict(record), chat=config.chat) for record in records]
    return prompts


def _prompt(record: dict[str, Any], *, chat: bool) -> Prompt:
    question: Text = str(record["question"])
    if chat:
        question = [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": str(record["question"])}]
    return Prompt(prompt=question, columns={"entry": record, "answer": record.get("answer")})
