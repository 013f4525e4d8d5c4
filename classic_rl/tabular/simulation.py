"""Drawing steps from a finite process: plain lists and one uniform number per step, about a tenth of gymnasium's time.

The learner sees what an environment would show it: next state, reward, whether the episode ended. Transitions are
drawn as gymnasium's toy text draws them, from the same table.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

import numpy as np

from classic_rl.tabular.mdp import TabularMdp

Step = tuple[int, int, float, int, bool]
"""State, action, reward, next state, terminated."""


class Simulator:
    """One environment.

    Args:
        mdp: The process.
        seed: Of the draws of `episodes`; `first` and `step` take uniform numbers from their caller.
    """

    def __init__(self, mdp: TabularMdp, *, seed: int = 0) -> None:
        self.mdp, self.seed = mdp, seed
        self._start = _cumulated(mdp.start.tolist())
        self._outcomes = [
            [(_cumulated([outcome[0] for outcome in row]), [(s, r, end) for _, s, r, end in row]) for row in by_action]
            for by_action in mdp.outcomes
        ]

    def first(self, uniform: float) -> int:
        """Return the state an episode starts in."""
        return bisect_right(self._start, uniform)

    def step(self, state: int, action: int, uniform: float) -> tuple[int, float, bool]:
        """Return next state, reward, terminated."""
        cumulated, results = self._outcomes[state][action]
        return results[0] if len(results) == 1 else results[bisect_right(cumulated, uniform)]

    def episodes(self, policy: np.ndarray, count: int) -> Iterator[list[Step]]:
        """Yield the steps of `count` episodes of a policy [S, A], each cut at the environment's limit."""
        generator = np.random.default_rng(self.seed)
        actions = [_cumulated(row) for row in policy.tolist()]
        for _ in range(count):
            steps: list[Step] = []
            state, terminated = self.first(generator.random()), False
            while not terminated and (self.mdp.limit is None or len(steps) < self.mdp.limit):
                action = bisect_right(actions[state], generator.random())
                following, reward, terminated = self.step(state, action, generator.random())
                steps.append((state, action, reward, following, terminated))
                state = following
            yield steps


def _cumulated(probabilities: list[float]) -> list[float]:
    """Partial sums whose last positive one is above any uniform number, whatever the rounding."""
    sums = list(accumulate(probabilities))
    last = max(index for index, probability in enumerate(probabilities) if probability > 0)
    sums[last:] = [2.0] * (len(sums) - last)
    return sums
