"""Guess a number: the smallest game in which a policy must use what it was told in earlier turns.

With N numbers and k guesses, bisection always wins if N <= 2^k - 1; guesses at random among the N numbers win
k/N of the games, and fewer if they repeat themselves.
"""

from __future__ import annotations

import random

from rlhf.data.records import Message
from rlhf.lm.text_environments import TextStep, characters_of

RULES = "guess 1 to {highest}"
HIGHER, LOWER, RIGHT, NO_NUMBER, OVER = "higher", "lower", "right", "no number", "over"


class GuessingGame:
    """The environment draws a number; the policy guesses, and hears whether it is higher or lower.

    Running out of guesses is a rule of the game that the player can count along, so it terminates the episode.

    Args:
        highest: Numbers 1 to this are in play.
        guesses: How many the policy has.
        right_reward: Of the guess that is right.
        wrong_reward: Of every other number.
        malformed_reward: Of what is no number in range; it costs a guess, too.
        heeding: Probability that `demonstrate` heeds what it was told; otherwise it names any number.
    """

    def __init__(
        self,
        *,
        highest: int = 15,
        guesses: int = 4,
        right_reward: float = 1.0,
        wrong_reward: float = 0.0,
        malformed_reward: float = -0.1,
        heeding: float = 0.5,
    ) -> None:
        """No game has begun."""
        if highest < 2 or guesses < 1 or not 0 <= heeding <= 1:
            raise ValueError("highest must be at least 2, guesses at least 1, heeding in [0, 1]")
        self.highest, self.guesses, self.heeding = highest, guesses, heeding
        self.right_reward, self.wrong_reward, self.malformed_reward = right_reward, wrong_reward, malformed_reward
        self.alphabet = characters_of(
            [RULES.format(highest=""), HIGHER, LOWER, RIGHT, NO_NUMBER, OVER, "0123456789", "\n>"]
        )
        self._random = random.Random()
        self._secret, self._left, self._low, self._high = 0, 0, 1, highest

    def reset(self, *, seed: int | None = None) -> list[Message]:
        """Draw a number."""
        self._random = random.Random(seed)
        self._secret, self._left = self._random.randint(1, self.highest), self.guesses
        self._low, self._high = 1, self.highest
        return [_say(RULES.format(highest=self.highest))]

    def step(self, completion: str) -> TextStep:
        """Judge a guess."""
        self._left -= 1
        guess = self._read(completion)
        if guess == self._secret:
            return [_say(RIGHT)], self.right_reward, True, False
        if guess is None:
            answer, reward = NO_NUMBER, self.malformed_reward
        elif guess < self._secret:
            answer, reward, self._low = HIGHER, self.wrong_reward, max(self._low, guess + 1)
        else:
            answer, reward, self._high = LOWER, self.wrong_reward, min(self._high, guess - 1)
        over = self._left == 0
        return [_say(OVER if over else answer)], reward, over, False

    def demonstrate(self) -> str:
        """What a distracted player says: with probability `heeding` a number that is still possible, else any."""
        heeds = self._random.random() < self.heeding
        return str(self._random.randint(self._low, self._high) if heeds else self._random.randint(1, self.highest))

    def _read(self, completion: str) -> int | None:
        """The number, or None; `int` alone would also take "+7", "0_7" and digits of other scripts."""
        said = completion.strip()
        if not (said.isascii() and said.isdigit()) or len(said) > len(str(self.highest)):
            return None
        return int(said) if 1 <= int(said) <= self.highest else None


def _say(content: str) -> Message:
    return {"role": "user", "content": content}
