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
        heeding: Probability that `demonstrate` names a step of a shortest way; otherwise it names any word.
    """

    def __init__(
        self,
        *,
        map_name: str = "4x4",
        is_slippery: bool = False,
        max_turns: int = 12,
        malformed_reward: float = -0.1,
        heeding: float = 0.5,
    ) -> None:
        """No walk has begun."""
        if max_turns < 1 or not 0 <= heeding <= 1:
            raise ValueError("max_turns must be at least 1, heeding in [0, 1]")
        # gymnasium's own time limit would count steps and not turns.
        self._environment: Any = gymnasium.make(
            "FrozenLake-v1", map_name=map_name, is_slippery=is_slippery, max_episode_steps=-1
        )
        self._rows = ["".join(field.decode() for field in row) for row in self._environment.unwrapped.desc]
        self.max_turns, self.malformed_reward, self.heeding = max_turns, malformed_reward, heeding
        self._steps = steps_to_goal(self._rows)
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
        """What a distracted walker says: with probability `heeding` a step of a shortest way, else any word."""
        if self._random.random() >= self.heeding:
            return self._random.choice(WORDS)
        return min(WORDS, key=lambda word: self._steps.get(neighbour(self._rows, self._place, word), len(self._steps)))

    def _map(self) -> str:
        return "\n".join(self._rows)

    def _where(self) -> str:
        row, column = divmod(self._place, len(self._rows[0]))
        return f"row {row + 1} column {column + 1}"


def neighbour(rows: list[str], place: int, word: str) -> int:
    """The field one step away on ice that does not slip; at the edge one stays.

    >>> neighbour(["SF", "HG"], 0, "right"), neighbour(["SF", "HG"], 0, "up")
    (1, 0)
    """
    row, column = divmod(place, len(rows[0]))
    down, right = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}[word]
    row, column = min(max(row + down, 0), len(rows) - 1), min(max(column + right, 0), len(rows[0]) - 1)
    return row * len(rows[0]) + column


def steps_to_goal(rows: list[str]) -> dict[int, int]:
    """Steps of a shortest way to G from every field that has one, on ice that does not slip.

    >>> steps_to_goal(["SF", "HG"])
    {3: 0, 1: 1, 0: 2}
    """
    fields = "".join(rows)
    steps = {fields.index("G"): 0}
    frontier = list(steps)
    while frontier:
        reached = [
            place
            for place in range(len(fields))
            if fields[place] in "SF" and place not in steps
            if any(neighbour(rows, place, word) in frontier for word in WORDS)
        ]
        steps |= dict.fromkeys(reached, steps[frontier[0]] + 1)
        frontier = reached
    return steps


def _say(content: str) -> Message:
    return {"role": "user", "content": content}
