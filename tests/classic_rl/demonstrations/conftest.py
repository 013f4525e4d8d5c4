"""A process small enough to write down every episode, with its probability."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from classic_rl.tabular.mdp import make_mdp
from rlhf.core.types import Rollout

HORIZON = 3
TRANSITIONS = np.array([[[0.7, 0.3], [0.2, 0.8]], [[0.5, 0.5], [0.9, 0.1]]])
REWARDS = np.array([[1.0, -0.5], [0.3, 2.0]])


@dataclass
class Episodes:
    """Every episode of three steps from state 0, as rows: [64, 3] states, actions, rewards."""

    states: Tensor
    actions: Tensor
    rewards: Tensor
    dynamics: Tensor
    """[64] probability of the transitions, given the actions."""

    def log_probs(self, logits: Tensor) -> Tensor:
        """[64, 3] of the actions."""
        return torch.log_softmax(logits, dim=-1)[self.states, self.actions]

    def probabilities(self, logits: Tensor) -> Tensor:
        """[64], sum 1."""
        return self.dynamics * self.log_probs(logits).sum(dim=1).exp()

    def objective(self, logits: Tensor, discount: float) -> Tensor:
        """J by enumeration."""
        powers = discount ** torch.arange(HORIZON, dtype=torch.float64)
        return (self.probabilities(logits) * (self.rewards * powers).sum(dim=1)).sum()

    def true_gradient(self, logits: Tensor, discount: float = 1.0) -> Tensor:
        """dJ / dlogits, by autograd through the enumeration: no likelihood ratio is involved."""
        return torch.autograd.grad(self.objective(logits, discount), logits)[0]

    def expected_estimate(self, logits: Tensor, coefficients: Tensor, *, under: Tensor | None = None) -> Tensor:
        """E[sum_t d log pi_t coefficient_t], over the episodes of the policy `under` (None: of `logits`)."""
        weights = self.probabilities(logits if under is None else under).detach()
        surrogate = (weights * (self.log_probs(logits) * coefficients.detach()).sum(dim=1)).sum()
        return torch.autograd.grad(surrogate, logits)[0]

    def rollout(self, logits: Tensor, values: Tensor | None = None) -> Rollout:
        """As a collector would give them."""
        rows = len(self.states)
        ends = torch.zeros(rows, HORIZON, dtype=torch.bool)
        ends[:, -1] = True
        return Rollout(
            inputs={"observations": self.states.unsqueeze(-1)},
            actions=self.actions,
            action_mask=torch.ones(rows, HORIZON, dtype=torch.bool),
            rewards=self.rewards,
            old_log_probs=self.log_probs(logits).detach(),
            episode_ends=ends,
            values=None if values is None else values[self.states],
            next_values=None if values is None else torch.zeros(rows, HORIZON, dtype=torch.float64),
        )


@pytest.fixture(scope="session")
def episodes() -> Episodes:
    states, actions, rewards, dynamics = [], [], [], []
    for path in product((0, 1), repeat=HORIZON):
        for taken in product((0, 1), repeat=HORIZON):
            visited = (0, *path)
            states.append(visited[:HORIZON])
            actions.append(taken)
            rewards.append([REWARDS[s, a] for s, a in zip(visited, taken, strict=False)])
            steps = zip(visited[:-1], taken, visited[1:], strict=True)
            dynamics.append(np.prod([TRANSITIONS[s, a, following] for s, a, following in steps]))
    return Episodes(
        torch.tensor(states),
        torch.tensor(actions),
        torch.tensor(rewards, dtype=torch.float64),
        torch.tensor(np.array(dynamics)),
    )


@pytest.fixture
def logits() -> Tensor:
    return torch.tensor([[0.3, -0.4], [-0.2, 0.5]], dtype=torch.float64, requires_grad=True)


@pytest.fixture
def behaviour() -> Tensor:
    return torch.tensor([[-1.5, 0.8], [1.6, -0.9]], dtype=torch.float64)


@pytest.fixture(scope="session")
def two_states():
    """The same dynamics without end, as a tabular process from state 0."""
    outcomes = {
        s: {a: [(float(TRANSITIONS[s, a, k]), k, float(REWARDS[s, a]), False) for k in (0, 1)] for a in (0, 1)}
        for s in (0, 1)
    }
    return make_mdp(outcomes, [1.0, 0.0])
