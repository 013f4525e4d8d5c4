"""Prioritized replay: transitions with large errors are drawn more often, and weigh less for it.

P(i) = p_i^alpha / sum_k p_k^alpha,  w_i = (N P(i))^-beta / max_j w_j,  beta rises to 1 over the run.
Source: Schaul et al. 2016, https://arxiv.org/abs/1511.05952. A priority queue orders the rank-based variant; the
proportional one draws through a sum tree.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from classic_rl.replay import ReplayBuffer, Transitions
from rlhf.errors import TrainingError

BRANCHES = 64
"""Children per node: three levels reach 262,144 leaves, and each level is a handful of NumPy calls for a whole batch,
where a binary tree would take eighteen."""


class SumTree:
    """Nonnegative numbers with their sum, drawn in proportion; every operation is for a whole batch at once.

    Args:
        size: How many leaves.
    """

    def __init__(self, size: int) -> None:
        self._levels = [np.zeros(-(-size // BRANCHES) * BRANCHES)]
        while len(self._levels[-1]) > BRANCHES:
            parents = len(self._levels[-1]) // BRANCHES
            self._levels.append(np.zeros(-(-parents // BRANCHES) * BRANCHES))

    @property
    def total(self) -> float:
        """Sum of all leaves."""
        return float(self._levels[-1].sum())

    @property
    def leaves(self) -> np.ndarray:
        """The numbers; change them through `set`."""
        return self._levels[0]

    def set(self, indices: np.ndarray, values: np.ndarray | float) -> None:
        """Set leaves; of an index that comes twice the last value counts. Sums are made anew, so no error adds up."""
        self._levels[0][indices] = values
        for below, level in zip(self._levels[:-1], self._levels[1:], strict=True):
            indices = indices // BRANCHES
            level[indices] = below.reshape(-1, BRANCHES)[indices].sum(axis=1)

    def find(self, prefixes: np.ndarray) -> np.ndarray:
        """Return for each prefix x in [0, total) the leaf in which the running sum passes x."""
        x = prefixes.copy()
        nodes = np.zeros(len(x), dtype=np.int64)
        for level in reversed(self._levels):
            running = level.reshape(-1, BRANCHES)[nodes].cumsum(axis=1)
            # Rounding may let x pass the last sum: then the last child that holds anything is meant.
            children = np.minimum((running <= x[:, None]).sum(axis=1), (running < running[:, -1:]).sum(axis=1))
            x -= np.where(children > 0, running[np.arange(len(x)), children - 1], 0.0)
            nodes = nodes * BRANCHES + children
        return nodes

    def rebuild(self) -> None:
        """Make all sums anew from the leaves."""
        for below, level in zip(self._levels[:-1], self._levels[1:], strict=True):
            level[: len(below) // BRANCHES] = below.reshape(-1, BRANCHES).sum(axis=1)


class PrioritizedReplayBuffer(ReplayBuffer):
    """Replay in which P(i) is proportional to p_i^alpha.

    proportional: p_i = |delta_i| + epsilon. rank_based: p_i = 1 / rank(i), ranks by |delta| (ordered anew after
    `sort_every` draws, as the paper's heap is sorted now and then).
    A new transition gets the largest priority so far. Draws are stratified: one from each of B equal parts of the mass.

    Args:
        capacity: As `ReplayBuffer`, with its other arguments.
        alpha: 0 is uniform.
        epsilon: Keeps transitions without error in play.
        rank_based: Which of the two.
        sort_every: Batches between orderings by rank.
        shared: Of `ReplayBuffer`.
    """

    def __init__(
        self,
        capacity: int,
        *,
        alpha: float = 0.6,
        epsilon: float = 1e-6,
        rank_based: bool = False,
        sort_every: int = 100,
        **shared: Any,
    ) -> None:
        super().__init__(capacity, **shared)
        self.alpha, self.epsilon, self.rank_based, self.sort_every = alpha, epsilon, rank_based, sort_every
        self.beta = 1.0
        """Exponent of the importance weights; the agent moves it."""
        self._largest = 1.0
        self._columns = np.arange(self.num_envs)
        places = self._rows * self.num_envs
        self._errors = np.zeros(places)
        self._tree = None if rank_based else SumTree(places)
        self._order, self._drawn = np.zeros(0, dtype=np.int64), 0

    def add(self, *, mask: np.ndarray, **step: Any) -> None:
        """Store a step as `ReplayBuffer.add` does; its transitions get the largest priority so far."""
        row = self._head
        super().add(mask=mask, **step)
        places = row * self.num_envs + self._columns
        self._errors[places] = np.where(mask, self._largest, 0.0)
        if self._tree is not None:
            self._tree.set(places, np.where(mask, self._largest**self.alpha, 0.0))

    def _advance(self) -> None:
        super()._advance()
        if self._filled == self._rows:  # the newest row, which may have held the oldest steps, cannot be drawn
            places = self._head * self.num_envs + self._columns
            self._errors[places] = 0.0
            if self._tree is not None:
                self._tree.set(places, 0.0)

    def sample(self, batch_size: int) -> Transitions:
        """Draw by priority, with importance weights of the present `beta`.

        Raises:
            TrainingError: Nothing is stored.
        """
        if len(self) == 0:
            raise TrainingError("nothing can be drawn from an empty replay buffer", where="ReplayBuffer.sample")
        strata = (np.arange(batch_size) + self._generator.random(batch_size)) / batch_size
        indices, probabilities = self._by_rank(strata) if self._tree is None else self._by_size(strata, self._tree)
        weights = (len(self) * probabilities) ** -self.beta
        return self._gather(indices, weights / weights.max())

    def _by_size(self, strata: np.ndarray, tree: SumTree) -> tuple[np.ndarray, np.ndarray]:
        total = tree.total
        indices = tree.find(strata * total)
        return indices, tree.leaves[indices] / total

    def _by_rank(self, strata: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw ranks with P(rank) proportional to rank^-alpha, and look up who holds them."""
        if self._drawn % self.sort_every == 0:
            self._sort()
        self._drawn += 1
        while True:
            ranks = np.searchsorted(self._rank_mass, strata, side="right").clip(max=len(self._order) - 1)
            gone = ~self._flat["valid"][self._order[ranks]]  # overwritten since the last ordering
            if not gone.any():
                break
            strata = np.where(gone, self._generator.random(len(strata)), strata)
        lower = np.where(ranks > 0, self._rank_mass[ranks - 1], 0.0)
        return self._order[ranks], self._rank_mass[ranks] - lower

    def _sort(self) -> None:
        """Order the valid places by |delta|, the largest first, and make the running mass of their ranks."""
        places = np.flatnonzero(self._flat["valid"])
        self._order = places[np.argsort(-self._errors[places], kind="stable")]
        mass = np.arange(1, len(places) + 1, dtype=np.float64) ** -self.alpha
        self._rank_mass = mass.cumsum() / mass.sum()

    def update_priorities(self, indices: np.ndarray, errors: np.ndarray) -> None:
        """Set the priorities of drawn transitions.

        Args:
            indices: [B], `Transitions.indices`.
            errors: [B], |delta| >= 0.

        Raises:
            TrainingError: An error that is not finite.
        """
        priorities = np.abs(np.asarray(errors, dtype=np.float64)) + self.epsilon
        largest = float(priorities.max())
        if not np.isfinite(largest):
            raise TrainingError("errors of prioritized replay are not finite", where="update_priorities")
        self._largest = max(self._largest, largest)
        self._errors[indices] = priorities
        if self._tree is not None:
            self._tree.set(indices, priorities**self.alpha)

    def state_dict(self) -> dict[str, Any]:
        """With priorities, and the present order of ranks."""
        own = {"errors": self._errors.copy(), "largest": self._largest, "order": self._order, "drawn": self._drawn}
        leaves = None if self._tree is None else self._tree.leaves.copy()
        return {**super().state_dict(), **own, "beta": self.beta, "leaves": leaves}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`'s content."""
        super().load_state_dict(state)
        self._errors[:], self._largest, self.beta = state["errors"], state["largest"], state["beta"]
        self._order, self._drawn = state["order"], state["drawn"]
        if self._tree is not None:
            self._tree.leaves[:] = state["leaves"]
            self._tree.rebuild()
        elif len(self._order):
            mass = np.arange(1, len(self._order) + 1, dtype=np.float64) ** -self.alpha
            self._rank_mass = mass.cumsum() / mass.sum()
