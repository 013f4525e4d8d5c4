"""A model of the process, learned by counting: draws for Dyna-Q, and arrays to plan in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from classic_rl.tabular.dynamic_programming import action_values, value_iteration
from classic_rl.tabular.mdp import TabularMdp
from classic_rl.tabular.simulation import Step

Seen = tuple[float, int, bool]
"""Reward, next state, terminated."""


class EmpiricalModel:
    """What was seen after each state and action, with its frequencies.

    Args:
        num_states: S.
        num_actions: A.
    """

    def __init__(self, num_states: int, num_actions: int) -> None:
        self.num_states, self.num_actions = num_states, num_actions
        self._seen: dict[tuple[int, int], dict[Seen, int]] = {}
        self._pairs: list[tuple[int, int]] = []

    def add(self, state: int, action: int, reward: float, following: int, terminated: bool) -> None:
        """Count one step."""
        pair = (state, action)
        if pair not in self._seen:
            self._seen[pair] = {}
            self._pairs.append(pair)
        counts, outcome = self._seen[pair], (reward, following, terminated)
        counts[outcome] = counts.get(outcome, 0) + 1

    def draw(self, count: int, generator: random.Random) -> Iterator[Step]:
        """Yield `count` steps: pairs seen before, uniformly, and what the model says happens there."""
        for _ in range(count):
            state, action = generator.choice(self._pairs)
            counts = self._seen[state, action]
            outcome = next(iter(counts)) if len(counts) == 1 else generator.choices([*counts], [*counts.values()])[0]
            yield state, action, *outcome

    def mdp(self) -> TabularMdp:
        """The process with the observed frequencies as probabilities; pairs never seen end at once with reward 0."""
        shape = (self.num_states, self.num_actions)
        transitions, rewards = np.zeros((*shape, self.num_states)), np.zeros(shape)
        for (state, action), counts in self._seen.items():
            total = sum(counts.values())
            for (reward, following, terminated), times in counts.items():
                rewards[state, action] += reward * times / total
                if not terminated:
                    transitions[state, action, following] += times / total
        return TabularMdp(transitions, rewards, np.full(self.num_states, 1 / self.num_states), ())

    def solve(self, *, discount: float) -> np.ndarray:
        """[S, A] optimal action values of the learned process (certainty equivalence)."""
        mdp = self.mdp()
        return action_values(mdp, value_iteration(mdp, discount=discount, tolerance=1e-6).values, discount=discount)

    def state_dict(self) -> dict[str, Any]:
        """Rows of state, action, reward, next state, terminated, times."""
        return {
            "counts": [[*pair, *outcome, times] for pair in self._pairs for outcome, times in self._seen[pair].items()]
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s content, in its order."""
        self._seen, self._pairs = {}, []
        for first, action, reward, following, terminated, times in state["counts"]:
            self.add(int(first), int(action), float(reward), int(following), bool(terminated))
            self._seen[int(first), int(action)][float(reward), int(following), bool(terminated)] = int(times)
