"""Linear policies whose scores d log pi / d theta have closed forms.

With `network: {hidden_sizes: []}` the recipes train such policies in any environment; here stand the formulas, which
tests hold against autograd.
"""

from __future__ import annotations

import numpy as np


def softmax_probabilities(theta: np.ndarray, features: np.ndarray) -> np.ndarray:
    """`pi(a) = exp(phi_a . theta) / sum_b exp(phi_b . theta)`.

    Args:
        theta: [F].
        features: [A, F], phi(s, a) of each action.

    Returns:
        [A].

    >>> softmax_probabilities(np.array([np.log(3.0)]), np.array([[1.0], [0.0]])).round(2).tolist()
    [0.75, 0.25]
    """
    preferences = features @ theta
    powers = np.exp(preferences - preferences.max())
    return powers / powers.sum()


def softmax_score(theta: np.ndarray, features: np.ndarray, *, action: int) -> np.ndarray:
    """[F] `phi_a - E_{b ~ pi}[phi_b]`.

    >>> softmax_score(np.array([0.0]), np.array([[1.0], [0.0]]), action=0).tolist()
    [0.5]
    """
    return features[action] - softmax_probabilities(theta, features) @ features


def gaussian_score(theta: np.ndarray, features: np.ndarray, *, action: float, std: float) -> np.ndarray:
    """[F] of a ~ N(phi . theta, std^2): `(a - phi . theta) phi / std^2`.

    Args:
        theta: [F].
        features: [F], phi(s).
        action: a.
        std: Standard deviation, fixed.

    >>> gaussian_score(np.array([1.0, 0.0]), np.array([1.0, 2.0]), action=2.0, std=0.5).tolist()
    [4.0, 8.0]
    """
    return (action - features @ theta) * features / std**2


def network_score(jacobian: np.ndarray, probabilities: np.ndarray, *, action: int) -> np.ndarray:
    """[D] of a softmax over a network's outputs f: `df_a - E_{b ~ pi}[df_b]`.

    A credit multiplies the whole difference; slides that leave the expectation outside the bracket lose half of it.

    Args:
        jacobian: [A, D], df_b / dtheta.
        probabilities: [A], softmax of f.
        action: a.
    """
    return jacobian[action] - probabilities @ jacobian
