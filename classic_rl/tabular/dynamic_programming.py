"""Exact answers for known processes: value iteration, policy evaluation, policy iteration, finite horizons.

A policy is [S, A], probabilities of actions; a greedy one has a single 1 per row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from classic_rl.tabular.mdp import TabularMdp
from rlhf.errors import TrainingError


class Solution(NamedTuple):
    """Values and how much work they took."""

    values: np.ndarray
    """[S]."""
    policy: np.ndarray
    """[S, A] greedy with respect to the values, or the policy that was evaluated."""
    iterations: int
    """Sweeps over all states (or improvements, in policy iteration)."""


def action_values(mdp: TabularMdp, values: np.ndarray, *, discount: float) -> np.ndarray:
    """`Q(s, a) = R(s, a) + discount * sum_s' P(s'|s, a) V(s')`, [S, A]."""
    return mdp.rewards + discount * (mdp.transitions.reshape(-1, mdp.num_states) @ values).reshape(mdp.rewards.shape)


def greedy_policy(values: np.ndarray) -> np.ndarray:
    """[S, A] with probability 1 on the first action of the highest value."""
    return np.eye(values.shape[1])[values.argmax(axis=1)]


def value_iteration(
    mdp: TabularMdp, *, discount: float, tolerance: float = 1e-10, max_sweeps: int = 100_000
) -> Solution:
    """`V <- max_a [R + discount P V]` in all states at once until no value moves by `tolerance`; O(S^2 A) a sweep.

    Source: Bellman 1957, Dynamic Programming; Sutton and Barto 2018, section 4.4.

    Args:
        mdp: The process.
        discount: gamma. 1 needs every policy that the sweeps come across to end.
        tolerance: On the largest change in a sweep. The values are then within tolerance / (1 - discount) of V*.
        max_sweeps: Give up after so many.

    Raises:
        TrainingError: The values have not settled.
    """
    values = np.zeros(mdp.num_states)
    for sweep in range(1, max_sweeps + 1):
        backed_up = action_values(mdp, values, discount=discount)
        change = np.abs(backed_up.max(axis=1) - values).max()
        values = backed_up.max(axis=1)
        if change < tolerance:
            return Solution(values, greedy_policy(action_values(mdp, values, discount=discount)), sweep)
    raise _unsettled("value iteration", max_sweeps)


def evaluate_iteratively(
    mdp: TabularMdp, policy: np.ndarray, *, discount: float, tolerance: float = 1e-10, max_sweeps: int = 1_000_000
) -> Solution:
    """`V <- sum_a pi(a|s) [R + discount P V]` until no value moves by `tolerance` or more.

    Source: Sutton and Barto 2018, section 4.1. The result equals `evaluate_exactly`'s.

    Raises:
        TrainingError: The values have not settled.
    """
    values, (transitions, rewards) = np.zeros(mdp.num_states), under(mdp, policy)
    for sweep in range(1, max_sweeps + 1):
        new = rewards + discount * transitions @ values
        change = np.abs(new - values).max()
        values = new
        if change < tolerance:
            return Solution(values, policy, sweep)
    raise _unsettled("policy evaluation", max_sweeps)


def evaluate_exactly(mdp: TabularMdp, policy: np.ndarray, *, discount: float) -> np.ndarray:
    """[S], the solution of `(I - discount P_pi) V = R_pi`.

    Raises:
        TrainingError: discount is 1 and the policy never ends from some state, so that its value is not defined.
    """
    transitions, rewards = under(mdp, policy)
    try:
        return np.linalg.solve(np.eye(mdp.num_states) - discount * transitions, rewards)
    except np.linalg.LinAlgError as error:
        raise TrainingError(
            "without discount, a policy that never ends has no value", where="evaluate_exactly", got=discount
        ) from error


def policy_iteration(mdp: TabularMdp, *, discount: float, max_improvements: int = 1000) -> Solution:
    """Evaluate exactly, improve greedily, until no action is better than the policy's own.

    Each improvement is one: Q^pi(s, pi'(s)) >= V^pi(s) everywhere implies V^pi' >= V^pi (Howard 1960; Sutton and Barto
    2018, section 4.2). A policy is kept where its action is as good as the best, so rounding cannot make it cycle.

    Raises:
        TrainingError: It has not settled.
    """
    policy = greedy_policy(mdp.rewards)
    everywhere = np.arange(mdp.num_states)
    for improvement in range(1, max_improvements + 1):
        values = evaluate_exactly(mdp, policy, discount=discount)
        candidates = action_values(mdp, values, discount=discount)
        chosen = policy.argmax(axis=1)
        better = candidates.max(axis=1) > candidates[everywhere, chosen] + 1e-12
        if not better.any():
            return Solution(values, policy, improvement)
        policy = np.eye(mdp.num_actions)[np.where(better, candidates.argmax(axis=1), chosen)]
    raise _unsettled("policy iteration", max_improvements)


def finite_horizon_optimum(mdp: TabularMdp, *, horizon: int) -> tuple[np.ndarray, np.ndarray]:
    """The best undiscounted return within `horizon` steps, by backward induction.

    Returns:
        [S] values with all steps left, and [horizon, S] best actions at time 0, 1, ...: unlike the infinite horizon's,
        the best policy looks at the clock.
    """
    values, actions = np.zeros(mdp.num_states), np.zeros((horizon, mdp.num_states), dtype=np.int64)
    for time in reversed(range(horizon)):
        candidates = action_values(mdp, values, discount=1.0)
        actions[time], values = candidates.argmax(axis=1), candidates.max(axis=1)
    return values, actions


def expected_return(mdp: TabularMdp, policy: np.ndarray, *, horizon: int | None = None, discount: float = 1.0) -> float:
    """The exact expected return of an episode from the start distribution.

    Args:
        mdp: The process.
        policy: [S, A].
        horizon: Steps after which the episode is cut; None takes the environment's limit, and where there is none, the
            episode goes on until it terminates.
        discount: gamma.
    """
    horizon = horizon or mdp.limit
    if horizon is None:
        return float(mdp.start @ evaluate_exactly(mdp, policy, discount=discount))
    transitions, rewards = under(mdp, policy)
    values = np.zeros(mdp.num_states)
    for _ in range(horizon):
        values = rewards + discount * transitions @ values
    return float(mdp.start @ values)


def under(mdp: TabularMdp, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """P_pi [S, S] and R_pi [S]: the Markov chain that a policy makes of the process."""
    return np.einsum("sa,sat->st", policy, mdp.transitions), (policy * mdp.rewards).sum(axis=1)


def _unsettled(what: str, limit: int) -> TrainingError:
    return TrainingError(
        f"{what} has not settled",
        got=f"{limit} iterations",
        remedy="Use a discount below 1, or a larger tolerance: without discount, returns may grow without end.",
    )
