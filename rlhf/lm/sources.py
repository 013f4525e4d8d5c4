"""Where a recipe's records and rewards come from: data files, a procedural task, or reasoning-gym."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, model_validator

from rlhf.config import Config
from rlhf.data.loading import DataConfig, load_demonstrations, load_prompts, split_holdout
from rlhf.data.records import Demonstration, Prompt
from rlhf.errors import ConfigError
from rlhf.lm.reasoning import ReasoningGymConfig, make_reasoning_prompts
from rlhf.lm.tasks import Task, TaskConfig, make_task
from rlhf.rewards.combination import CombinedReward, RewardPart
from rlhf.rewards.loading import load_reward
from rlhf.rewards.protocol import RewardFunction

TASK_JUDGES = "rlhf.lm.tasks:"
"""Where the scorers of the procedural tasks lie."""

Record = TypeVar("Record", Prompt, Demonstration)


class SourceConfig(Config):
    """Records to learn from and records held out: a procedural task, reasoning-gym or data files, exactly one."""

    task: TaskConfig | None = None
    """A procedural task; it brings its own held-out records."""
    data: DataConfig | None = None
    """A file, a folder or a hub id."""
    reasoning_gym: ReasoningGymConfig | None = None
    """Tasks of reasoning-gym by name; prompts only."""
    held_out_data: DataConfig | None = None
    """Held-out records of their own; None takes `held_out` off `data`."""
    held_out: int = Field(200, ge=1)
    """How many records of `data` are held out."""
    seed: int = 0
    """Decides which; not the run's seed, so that runs of several seeds are evaluated on the same records."""

    @model_validator(mode="after")
    def _refuse_two_sources(self) -> Self:
        if sum(source is not None for source in (self.task, self.data, self.reasoning_gym)) != 1:
            raise ValueError(
                "give exactly one of task (a procedural task), data (a file, folder or hub id) and reasoning_gym"
            )
        if self.data is None and self.held_out_data is not None:
            raise ValueError("a task brings its own held-out records; remove held_out_data")
        return self

    def make_task(self) -> Task | None:
        """The procedural task, where there is one."""
        return None if self.task is None else make_task(self.task)


def load_prompt_sets(source: SourceConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and those held out.

    Raises:
        DataError: The data cannot be read, or rows are bad.
    """
    if source.reasoning_gym is not None:
        return make_reasoning_prompts(source.reasoning_gym)
    task = source.make_task()
    return (task.prompts, task.held_out_prompts) if task is not None else _load_split(source, load_prompts)


def load_demonstration_sets(source: SourceConfig) -> tuple[list[Demonstration], list[Demonstration]]:
    """Demonstrations to train on, and those held out.

    Raises:
        DataError: The data cannot be read, or rows are bad.
    """
    task = source.make_task()
    if task is not None:
        return task.demonstrations, task.held_out_demonstrations
    return _load_split(source, load_demonstrations)


def _load_split(source: SourceConfig, load: Callable[[DataConfig], list[Record]]) -> tuple[list[Record], list[Record]]:
    if source.data is None:
        raise ConfigError(
            "reasoning-gym has prompts and no demonstrations",
            where="prompts.reasoning_gym",
            remedy="Remove sft, or give it data of its own.",
        )
    records = load(source.data)
    if source.held_out_data is not None:
        return records, load(source.held_out_data)
    return split_holdout(records, count=source.held_out, seed=source.seed)


class RewardConfig(Config):
    """One reward function by name."""

    function: str
    """`module:function` or `file.py:function`. A reward model: `reward_models:RewardModelScorer.from_pretrained`."""
    arguments: dict[str, Any] = {}
    """Settings: bound to the function, or given to the class or factory that makes it."""
    weight: float = 1.0
    """Factor, where several rewards are combined."""
    role: Literal["reward", "gate", "penalty"] = "reward"
    """Gates multiply the sum of the rewards, penalties are added outside it."""
    name: str | None = None
    """For the metrics; None takes the function's own."""


def refuse_judge_of_a_task(source: SourceConfig, rewards: Sequence[RewardConfig], *, remedy: str) -> None:
    """Refuse a procedural task's own judge for records from elsewhere, to which it gives 0 whatever the answer.

    A config that ships with such a judge keeps it when only the data are replaced.

    Raises:
        ValueError: For a config's validator, with the remedy.
    """
    judges = [reward.function for reward in rewards if reward.function.startswith(TASK_JUDGES)]
    if judges and source.task is None:
        raise ValueError(f"{judges[0]} judges answers of a procedural task only, the records are others; {remedy}")


def make_reward(config: RewardConfig | Sequence[RewardConfig]) -> RewardFunction:
    """Import a reward function, or several as their combination.

    Raises:
        RewardError: One cannot be imported or made.
    """
    if isinstance(config, RewardConfig) and config.weight == 1.0 and config.role == "reward":
        return load_reward(config.function, arguments=config.arguments)
    parts = [config] if isinstance(config, RewardConfig) else config
    return CombinedReward(
        [
            RewardPart(load_reward(part.function, arguments=part.arguments), part.weight, part.role, part.name)
            for part in parts
        ]
    )
