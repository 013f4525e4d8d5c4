"""Errors of the temporal-difference family, and the evaluation of a policy from episodes.

Every update is `estimate <- estimate + step_size * error`. `discount` is 0 where the episode terminated, so that
nothing is bootstrapped from beyond the end; a truncated episode keeps its discount. Functions take numbers or
arrays [N] (values of actions [N, A]) alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from classic_rl.tabular.mdp import TabularMdp
from classic_rl.tabular.simulation import Simulator


def td_error(value: Any, reward: Any, discount: Any, next_value: Any) -> Any:
    """TD(0): `r + discount V(s') - V(s)` (Sutton 1988).

    >>> td_error(1.0, -1.0, 0.5, 2.0)
    -1.0
    """
    return reward + discount * next_value - value


def sarsa_error(value: Any, reward: Any, discount: Any, next_value: Any) -> Any:
    """SARSA: `r + discount Q(s', a') - Q(s, a)`, with the action a' that is really taken next (Rummery, Niranjan 1994).

    Args:
        value: Q(s, a).
        reward: r.
        discount: 0 where terminated.
        next_value: Q(s', a').

    >>> sarsa_error(1.0, 1.0, 1.0, 3.0)
    3.0
    """
    return td_error(value, reward, discount, next_value)


def expected_sarsa_error(value: Any, reward: Any, discount: Any, *, next_values: Any, probabilities: Any) -> Any:
    """Expected SARSA: `r + discount sum_a pi(a|s') Q(s', a) - Q(s, a)` (van Seijen et al. 2009).

    This, not Q-learning, is what a Q actor-critic's critic learns with a' drawn from the policy.

    Args:
        value: Q(s, a).
        reward: r.
        discount: 0 where terminated.
        next_values: Q(s', .), [..., A].
        probabilities: pi(.|s'), [..., A].
    """
    expected = (np.asarray(next_values) * np.asarray(probabilities)).sum(axis=-1)
    return td_error(value, reward, discount, expected)


def q_learning_error(value: Any, reward: Any, discount: Any, *, next_values: Any) -> Any:
    """Q-learning: `r + discount max_a Q(s', a) - Q(s, a)` (Watkins 1989).

    With step size alpha that is `Q <- (1 - alpha) Q + alpha (r + discount max Q')`.

    Args:
        value: Q(s, a).
        reward: r.
        discount: 0 where terminated.
        next_values: Q(s', .), [..., A].
    """
    return td_error(value, reward, discount, np.max(next_values, axis=-1))


def returns_of(rewards: list[float], *, discount: float) -> list[float]:
    """`G_t = r_t + discount G_{t+1}` of one episode.

    >>> returns_of([1.0, 0.0, 4.0], discount=0.5)
    [2.0, 2.0, 4.0]
    """
    returns, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + discount * following
        returns.append(following)
    return returns[::-1]


def td_evaluation(
    mdp: TabularMdp, policy: np.ndarray, *, discount: float, step_size: float, episodes: int, seed: int = 0
) -> np.ndarray:
    """[S] V^pi by TD(0) with a step size that falls to 0 in a line over the episodes."""
    values = [0.0] * mdp.num_states
    for episode, steps in enumerate(Simulator(mdp, seed=seed).episodes(policy, episodes)):
        rate = step_size * (1 - episode / episodes)
        for state, _, reward, following, terminated in steps:
            error = td_error(values[state], reward, 0.0 if terminated else discount, values[following])
            values[state] += rate * error
    return np.array(values)


def monte_carlo_evaluation(
    mdp: TabularMdp,
    policy: np.ndarray,
    *,
    discount: float,
    episodes: int,
    step_size: float | None = None,
    first_visit: bool = True,
    seed: int = 0,
) -> np.ndarray:
    """[S] V^pi as the average of returns: `V <- V + alpha (G - V)`.

    Source: Sutton and Barto 2018, section 5.1. Returns of truncated episodes lack what would have come after the cut.

    Args:
        mdp: The process.
        policy: [S, A].
        discount: gamma.
        episodes: How many to average over.
        step_size: alpha; None takes 1 / visits, which is the plain average.
        first_visit: Count only a state's first visit in an episode, which leaves the average unbiased.
        seed: Of the episodes.
    """
    values, visits = np.zeros(mdp.num_states), np.zeros(mdp.num_states)
    for steps in Simulator(mdp, seed=seed).episodes(policy, episodes):
        seen: set[int] = set()
        for (state, *_), return_ in zip(steps, returns_of([step[2] for step in steps], discount=discount), strict=True):
            if first_visit and state in seen:
                continue
            seen.add(state)
            visits[state] += 1
            values[state] += (step_size or 1 / visits[state]) * (return_ - values[state])
    return values
