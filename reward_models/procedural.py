"""Rankings of random answers to a procedural task, by its hidden gold scorer: data that needs no file and no model."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlhf.data.records import Prompt, Ranking
from rlhf.errors import ConfigError
from rlhf.lm.tasks import PROMPT_END, Task, rank_by_score


def rank_random_answers(
    task: Task, prompts: Sequence[Prompt], *, num_candidates: int = 4, seed: int = 0
) -> list[Ranking]:
    """Answer each prompt with random words that begin with its stem, and rank them by the task's gold scorer.

    Args:
        task: From `make_task`; of the shipped ones, only `vowel_words` grades random answers.
        prompts: The task's prompts, or some of them.
        num_candidates: K, answers per prompt.
        seed: Of the letters.

    Returns:
        At most one ranking per prompt; prompts whose answers all tie are left out.

    Raises:
        ConfigError: The gold scorer cannot tell random answers apart.
    """
    generator = random.Random(seed)
    letters = task.alphabet.replace(PROMPT_END, "")
    length = task.max_completion_length - 1  # without the end token
    candidates = []
    for prompt in prompts:
        stem = str(prompt.prompt).removesuffix(PROMPT_END)
        words = ["".join(generator.choices(letters, k=length - len(stem))) for _ in range(num_candidates)]
        candidates.append([stem + word for word in words])
    rankings = rank_by_score(prompts, candidates, task.gold)
    if not rankings:
        raise ConfigError(
            "random answers to this task all score the same, so there is nothing to rank",
            where="task.name",
            got=task.name,
            remedy="Use vowel_words, or rank samples of a trained model.",
        )
    return rankings
