"""Finite Markov decision processes as arrays, read from gymnasium's toy-text environments.

    P[s, a, s'] = Pr(s' | s, a and the episode goes on),    R[s, a] = E[r | s, a],    start[s] = Pr(S_0 = s)

The rows of P sum to 1 minus the probability that the episode terminates, so `R + discount * P @ V` is the Bellman
backup without any case for terminal states: their value is the missing mass times 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

from rlhf.errors import ConfigError

Outcome = tuple[float, int, float, bool]
"""Probability, next state, reward, whether the episode terminates: an entry of gymnasium's `P[s][a]`."""


@dataclass(frozen=True)
class TabularMdp:
    """(S, A, P, R) with a start distribution; the discount belongs to the question, not to the process.

    Args:
        transitions: [S, A, S] probabilities of going on in s'.
        rewards: [S, A] expected rewards.
        start: [S] probabilities of the first state.
        outcomes: `outcomes[s][a]`, what can happen, for drawing from it.
        limit: Steps after which the environment truncates an episode; None where it never does.
    """

    transitions: np.ndarray
    rewards: np.ndarray
    start: np.ndarray
    outcomes: Sequence[Sequence[Sequence[Outcome]]]
    limit: int | None = None

    @property
    def num_states(self) -> int:
        """S."""
        return self.rewards.shape[0]

    @property
    def num_actions(self) -> int:
        """A."""
        return self.rewards.shape[1]


def make_mdp(
    outcomes: Mapping[int, Mapping[int, Sequence[Any]]], start: Any, *, limit: int | None = None
) -> TabularMdp:
    """Build the arrays from `{state: {action: [(probability, next state, reward, terminated), ...]}}`.

    Args:
        outcomes: gymnasium's `P`.
        start: [S] start distribution.
        limit: As in `TabularMdp`.

    Raises:
        ConfigError: Probabilities of a state and action, or of the start, do not sum to 1.
    """
    states, actions = len(outcomes), len(outcomes[0])
    transitions, rewards = np.zeros((states, actions, states)), np.zeros((states, actions))
    table: list[list[list[Outcome]]] = []
    for state in range(states):
        table.append([])
        for action in range(actions):
            row = [(float(p), int(s), float(r), bool(end)) for p, s, r, end in outcomes[state][action]]
            total = sum(probability for probability, *_ in row)
            if abs(total - 1) > 1e-6:
                raise ConfigError("probabilities must sum to 1", where=f"P[{state}][{action}]", got=total)
            for probability, following, reward, terminated in row:
                rewards[state, action] += probability * reward
                if not terminated:
                    transitions[state, action, following] += probability
            table[state].append(row)
    start = np.asarray(start, dtype=np.float64)
    if start.shape != (states,) or abs(start.sum() - 1) > 1e-6:
        raise ConfigError("the start distribution must be one number per state with sum 1", got=start.shape)
    return TabularMdp(transitions, rewards, start, table, limit)


def load_mdp(identifier: str, *, kwargs: Mapping[str, Any] | None = None, max_steps: int | None = None) -> TabularMdp:
    """Read the process of a toy-text environment: FrozenLake-v1, FrozenLake8x8-v1, Taxi-v4, CliffWalking-v1.

    Args:
        identifier: A gymnasium id.
        kwargs: Passed to the environment, such as {"is_slippery": False}.
        max_steps: Overrides the environment's limit of steps.

    Raises:
        ConfigError: Unknown id, or an environment that does not tell its dynamics as `P`.
    """
    try:
        environment = gymnasium.make(identifier, **(kwargs or {}))
    except (gymnasium.error.Error, TypeError) as error:
        raise ConfigError(f"the environment cannot be made: {error}", where="environment.id", got=identifier) from error
    inner: Any = environment.unwrapped
    if not hasattr(inner, "P") or not hasattr(inner, "initial_state_distrib"):
        raise ConfigError(
            "the environment does not tell its dynamics",
            where="environment.id",
            got=identifier,
            expected="one with `P` and `initial_state_distrib`, as gymnasium's toy text has",
        )
    limit = max_steps or (environment.spec.max_episode_steps if environment.spec is not None else None)
    return make_mdp(inner.P, inner.initial_state_distrib, limit=limit)
