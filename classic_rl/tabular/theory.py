"""Identities of policy optimization, computed exactly on finite processes.

    J(pi) = start . V^pi        d_pi = (1 - gamma) sum_t gamma^t Pr(S_t = s)  (normalised)
    b_pi = d_pi / (1 - gamma)   the discounted visits; sums over trajectories are sums over b_pi, not over d_pi

Lecture slides write `E_tau[sum gamma^t f] = E_{s ~ b}[f]`; with the normalised distribution a factor 1 / (1 - gamma)
belongs in front. Policies are [S, A].
"""

from __future__ import annotations

import numpy as np

from classic_rl.tabular.dynamic_programming import action_values, evaluate_exactly, under
from classic_rl.tabular.mdp import TabularMdp


def performance(mdp: TabularMdp, policy: np.ndarray, *, discount: float) -> float:
    """J(pi), the expected discounted return from the start."""
    return float(mdp.start @ evaluate_exactly(mdp, policy, discount=discount))


def discounted_visits(mdp: TabularMdp, policy: np.ndarray, *, discount: float) -> np.ndarray:
    """[S] `b(s) = sum_t gamma^t Pr(S_t = s)`, from `b = start + gamma P_pi^T b`; what terminated is gone."""
    transitions, _ = under(mdp, policy)
    return np.linalg.solve(np.eye(mdp.num_states) - discount * transitions.T, mdp.start)


def advantages(mdp: TabularMdp, policy: np.ndarray, *, discount: float) -> np.ndarray:
    """[S, A] `A(s, a) = Q(s, a) - V(s)`."""
    values = evaluate_exactly(mdp, policy, discount=discount)
    return action_values(mdp, values, discount=discount) - values[:, None]


def expected_gain(
    mdp: TabularMdp, new: np.ndarray, old: np.ndarray, *, discount: float, visits_of: np.ndarray
) -> float:
    """`sum_s b(s) sum_a new(a|s) A^old(s, a)`, with b the discounted visits of the policy `visits_of`.

    With the visits of the new policy this *is* J(new) - J(old): the performance difference lemma (Kakade and Langford
    2002). With those of the old one it is the surrogate of conservative policy iteration and TRPO, L(new) - J(old),
    which equals `E_old[sum_t gamma^t new/old(a_t|s_t) A^old]` and agrees with the difference to first order.
    """
    visits = discounted_visits(mdp, visits_of, discount=discount)
    return float(visits @ (new * advantages(mdp, old, discount=discount)).sum(axis=1))


def surrogate(mdp: TabularMdp, new: np.ndarray, old: np.ndarray, *, discount: float) -> float:
    """L(new) = J(old) + the gain over the old policy's states."""
    gain = expected_gain(mdp, new, old, discount=discount, visits_of=old)
    return performance(mdp, old, discount=discount) + gain


def importance_sampled_surrogate(mdp: TabularMdp, new: np.ndarray, old: np.ndarray, *, discount: float) -> float:
    """The same from the old policy's actions: `J(old) + sum b_old(s) old(a|s) [new(a|s) / old(a|s)] A^old(s, a)`."""
    visits = discounted_visits(mdp, old, discount=discount)
    ratio = np.divide(new, old, out=np.zeros_like(new), where=old > 0)
    gain = visits @ (old * ratio * advantages(mdp, old, discount=discount)).sum(axis=1)
    return performance(mdp, old, discount=discount) + float(gain)


def max_kl(old: np.ndarray, new: np.ndarray) -> float:
    """max_s KL(old(.|s) || new(.|s)), nats: the old policy comes first."""
    terms = np.where(old > 0, old * (np.log(np.maximum(old, 1e-300)) - np.log(np.maximum(new, 1e-300))), 0.0)
    return float(terms.sum(axis=1).max())


def monotonic_bound(mdp: TabularMdp, new: np.ndarray, old: np.ndarray, *, discount: float) -> float:
    """`L(new) - C max_s KL(old || new)`, C = 4 epsilon gamma / (1 - gamma)^2, epsilon = max |A^old|; at most J(new).

    Source: Schulman et al. 2015, https://arxiv.org/abs/1502.05477, theorem 1.
    """
    epsilon = np.abs(advantages(mdp, old, discount=discount)).max()
    penalty = 4 * epsilon * discount / (1 - discount) ** 2
    return surrogate(mdp, new, old, discount=discount) - penalty * max_kl(old, new)


def softmax(logits: np.ndarray) -> np.ndarray:
    """[S, A] probabilities."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def policy_gradient(mdp: TabularMdp, logits: np.ndarray, *, discount: float) -> np.ndarray:
    """[S, A] dJ/dlogits of a softmax policy, by the policy gradient theorem: `b(s) pi(a|s) A(s, a)`.

    Source: Sutton et al. 2000, theorem 1; the score of a softmax is 1[a = b] - pi(b|s).
    """
    policy = softmax(logits)
    visits = discounted_visits(mdp, policy, discount=discount)
    return visits[:, None] * policy * advantages(mdp, policy, discount=discount)


def restricted_step(gradient: np.ndarray, *, radius: float) -> np.ndarray:
    """`argmax g . step  subject to  1/2 |step|^2 <= radius`, which is `sqrt(2 radius) g / |g|`.

    Slides that write the constraint as `|step|^2 = 1/2 step . step` have one half too many on one side.
    """
    return np.sqrt(2 * radius) * gradient / np.linalg.norm(gradient)


def stationary_distribution(transitions: np.ndarray) -> np.ndarray:
    """[S] the solution of `d = P^T d`, sum 1, of a chain [S, S] with one recurrent class."""
    states = len(transitions)
    equations = np.vstack([np.eye(states) - transitions.T, np.ones(states)])
    return np.linalg.lstsq(equations, np.append(np.zeros(states), 1.0), rcond=None)[0]


def average_reward(mdp: TabularMdp, policy: np.ndarray) -> float:
    """`rho = sum_s d(s) sum_a pi(a|s) R(s, a)`, reward per step of the process that starts anew when it terminates."""
    transitions, rewards = under(mdp, policy)
    restarts = transitions + np.outer(1 - transitions.sum(axis=1), mdp.start)
    return float(stationary_distribution(restarts) @ rewards)
