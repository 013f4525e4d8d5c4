"""FrozenLake in words: gymnasium's environment as a conversation, for language models.

It has the two methods of a text environment, `reset -> messages` and `step(completion) -> messages, reward,
terminated, truncated`, and lives here because only this package imports gymnasium; it knows nothing of language
models. Source of the game: https://gymnasium.farama.org/environments/toy_text/frozen_lake/.
"""

from __future__ import annotations

import random
from typing import Any

import gymnasium

WORDS = ("left", "down", "right", "up")
"""In the order of gymnasium's actions 0 to 3."""
UNKNOWN = "say left, down, right or up"
FELL, REACHED = "you fell", "you are there"

Message = dict[str, Any]


class FrozenLakeInWords:
    """Walk over the ice from S to G without falling into a hole H; the policy says left, down, right or up.

    Args:
        map_name: `4x4` or `8x8`.
        is_slippery: Whether one glides off to the sides in two of three steps.
        max_turns: Turns after which the episode is truncated: the player is not told, so it is no rule of the game.
        malformed_reward: Of what is none of the four words; one stays where one is, and the turn counts.
    """

    def __init__(
        self,
        *,
        map_name: str = "4x4",
        is_slippery: bool = False,
        max_turns: int = 12,
        malformed_reward: float = -0.1,
    ) -> None:
        """No walk has begun."""
        if max_turns < 1:
            raise ValueError("max_turns must be at least 1")
        # gymnasium's own time limit would count steps and not turns.
        self._environment: Any = gymnasium.make(
            "FrozenLake-v1", map_name=map_name, is_slippery=is_slippery, max_episode_steps=-1
        )
        self._rows = ["".join(field.decode() for field in row) for row in self._environment.unwrapped.desc]
        self.max_turns, self.malformed_reward = max_turns, malformed_reward
        said = [self._map(), UNKNOWN, FELL, REACHED, *WORDS, "row column 0123456789", "\n>"]
        self.alphabet = "".join(sorted(set("".join(said))))
        self._random = random.Random()
        self._place, self._turns = 0, 0

    def reset(self, *, seed: int | None = None) -> list[Message]:
        """Stand at the start; the first message shows the map."""
        self._place, _ = self._environment.reset(seed=None if seed is None else seed % 2**32)
        self._place, self._turns, self._random = int(self._place), 0, random.Random(seed)
        return [_say(f"{self._map()}\n{self._where()}")]

    def step(self, completion: str) -> tuple[list[Message], float, bool, bool]:
        """Walk where the policy says."""
        self._turns += 1
        word = completion.strip().lower()
        late = self._turns >= self.max_turns
        if word not in WORDS:
            return [_say(UNKNOWN)], self.malformed_reward, False, late
        place, reward, terminated, _, _ = self._environment.step(WORDS.index(word))
        self._place = int(place)
        if terminated:
            return [_say(REACHED if reward > 0 else FELL)], float(reward), True, False
        return [_say(self._where())], float(reward), False, late

    def demonstrate(self) -> str:
        """What somebody says who knows the words and nothing else."""
        return self._random.choice(WORDS)

    def _map(self) -> str:
        return "\n".join(self._rows)

    def _where(self) -> str:
        row, column = divmod(self._place, len(self._rows[0]))
        return f"row {row + 1} column {column + 1}"


def _say(content: str) -> Message:
    return {"role": "user", "content": content}
