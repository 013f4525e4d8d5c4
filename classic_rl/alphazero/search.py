"""Monte Carlo tree search for many games at once: every simulation goes down all trees together.

    a* = argmax_a Q(s, a) + U(s, a),    U = c_puct P(s, a) sqrt(sum_b N(s, b)) / (1 + N(s, a))      (PUCT)

Sources: Silver et al. 2017, Mastering Chess and Shogi by Self-Play with a General Reinforcement Learning Algorithm,
https://arxiv.org/abs/1712.01815; the formulas stand in Silver et al. 2017, Nature 550, Methods, "Search algorithm".
Pure MCTS selects by UCB1 instead: Kocsis and Szepesvari 2006, Bandit based Monte-Carlo Planning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from classic_rl.alphazero.games import BoardGame
from rlhf.config import Config

Evaluate = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Boards [N, cells] -> (priors [N, A], values [N] in [-1, 1] for the player to move)."""

UNVISITED = -1


class SearchConfig(Config):
    """How a move is searched for."""

    simulations: int = Field(64, ge=1)
    """Paths from the root per move."""
    c_puct: float = Field(1.5, gt=0)
    """Weight of exploration."""
    rule: Literal["puct", "ucb1"] = "puct"
    """puct follows priors; ucb1 tries every move first and then adds c_puct sqrt(ln N(s) / N(s, a))."""
    dirichlet_alpha: float = Field(1.0, gt=0)
    """Of the noise at the root; the paper scales it with 10 / (number of moves), about 1 here."""
    noise_fraction: float = Field(0.25, ge=0, le=1)
    """Share of the noise in the root's priors where exploration is asked for; 0 leaves them as they are."""


class Found(NamedTuple):
    """What a search found.

    Args:
        visits: [G, A] how often each move was tried.
        values: [G] mean outcome for the player to move, in [-1, 1].
    """

    visits: np.ndarray
    values: np.ndarray

    def policy(self) -> np.ndarray:
        """Return visits as shares, [G, A]: what the network learns to foresee."""
        return self.visits / self.visits.sum(axis=1, keepdims=True)

    def best(self) -> np.ndarray:
        """Return the most visited moves [G]; of several the first."""
        return self.visits.argmax(axis=1)


class Search:
    """Trees of a batch of games, as arrays [games, nodes, actions].

    Args:
        game: The rules.
        evaluate: Judges positions; it sees games that are not over only.
        config: How.
        generator: Draws the noise; None where no search explores.
    """

    def __init__(
        self,
        game: BoardGame,
        evaluate: Evaluate,
        config: SearchConfig,
        *,
        generator: np.random.Generator | None = None,
    ) -> None:
        self.game, self.evaluate, self.config, self.generator = game, evaluate, config, generator

    def run(self, boards: np.ndarray, *, explore: bool = False) -> Found:
        """Search from every board.

        Args:
            boards: [G, cells], games that are not over.
            explore: Mix Dirichlet noise into the roots' priors.
        """
        trees = _Trees(self.game, boards, nodes=self.config.simulations + 1)
        everywhere = np.arange(len(boards))
        priors, _ = self._judge(boards)
        if explore and self.config.noise_fraction > 0:
            priors = self._with_noise(priors, boards)
        trees.expand(everywhere, np.zeros(len(boards), dtype=np.int64), priors)
        for _ in range(self.config.simulations):
            self._simulate(trees)
        return Found(trees.visits[:, 0].copy(), trees.sums[:, 0].sum(axis=1) / self.config.simulations)

    def _simulate(self, trees: _Trees) -> None:
        """Go down every tree to a new or final position, judge it, and tell the path."""
        path = self._descend(trees)
        leaf_values = trees.leaf_values
        new = np.flatnonzero(trees.is_new)
        if len(new):
            nodes = trees.leaves[new]
            priors, values = self._judge(trees.boards[new, nodes])
            trees.expand(new, nodes, priors)
            leaf_values[new] = values
        # The leaf's value is for the player to move there; one step up it counts for the other one.
        for depth, (games, nodes, actions) in enumerate(path):
            sign = np.where((trees.depths[games] - depth) % 2 == 0, 1.0, -1.0)
            trees.visits[games, nodes, actions] += 1
            trees.sums[games, nodes, actions] += sign * leaf_values[games]

    def _descend(self, trees: _Trees) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Follow the rule in all trees until each has left its known part; returns (games, nodes, actions) by depth."""
        games = np.arange(trees.count)
        nodes = np.zeros(trees.count, dtype=np.int64)
        trees.is_new[:] = False
        path = []
        while len(games):
            actions = self._select(trees, games, nodes)
            path.append((games, nodes, actions))
            trees.depths[games] = len(path)
            children = trees.children[games, nodes, actions]
            fresh = children == UNVISITED
            if fresh.any():
                children[fresh] = trees.add(games[fresh], nodes[fresh], actions[fresh])
            over = trees.outcomes[games, children]
            ends = fresh | ~np.isnan(over)
            trees.leaves[games[ends]] = children[ends]
            trees.leaf_values[games[ends]] = over[ends]
            trees.is_new[games[fresh & np.isnan(over)]] = True
            games, nodes = games[~ends], children[~ends]
        return path

    def _select(self, trees: _Trees, games: np.ndarray, nodes: np.ndarray) -> np.ndarray:
        """Return the action that each tree's rule prefers at its node."""
        visits, sums = trees.visits[games, nodes], trees.sums[games, nodes]
        total = visits.sum(axis=1, keepdims=True)
        means = sums / np.maximum(visits, 1)
        if self.config.rule == "puct":
            # At a node without visits the priors alone decide, as 1 under the root sign makes them.
            bonus = trees.priors[games, nodes] * np.sqrt(np.maximum(total, 1)) / (1 + visits)
        else:
            with np.errstate(divide="ignore"):
                bonus = np.where(visits > 0, np.sqrt(np.log(np.maximum(total, 1)) / np.maximum(visits, 1)), np.inf)
        preference = means + self.config.c_puct * bonus
        preference[trees.illegal[games, nodes]] = -math.inf
        return preference.argmax(axis=1)

    def _judge(self, boards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate, with the priors of illegal moves taken out."""
        priors, values = self.evaluate(boards)
        legal = self.game.legal(boards)
        priors = np.where(legal, priors, 0.0)
        total = priors.sum(axis=1, keepdims=True)
        uniform = legal / legal.sum(axis=1, keepdims=True)
        return np.where(total > 0, priors / np.where(total > 0, total, 1.0), uniform), values

    def _with_noise(self, priors: np.ndarray, boards: np.ndarray) -> np.ndarray:
        """(1 - e) P + e Dirichlet(alpha) over the legal moves."""
        assert self.generator is not None, "exploration draws noise"
        gammas = self.generator.standard_gamma(self.config.dirichlet_alpha, size=priors.shape)
        gammas *= self.game.legal(boards)
        noise = gammas / gammas.sum(axis=1, keepdims=True)
        return (1 - self.config.noise_fraction) * priors + self.config.noise_fraction * noise


class _Trees:
    """Node 0 of each tree is its root; a simulation adds at most one node to each."""

    def __init__(self, game: BoardGame, roots: np.ndarray, *, nodes: int) -> None:
        self.game, self.count = game, len(roots)
        shape = (self.count, nodes, game.num_actions)
        self.visits = np.zeros(shape)
        self.sums = np.zeros(shape)
        self.priors = np.zeros(shape)
        self.children = np.full(shape, UNVISITED)
        self.illegal = np.ones(shape, dtype=bool)
        self.boards = np.zeros((self.count, nodes, game.num_cells), dtype=np.int8)
        self.boards[:, 0] = roots
        self.outcomes = np.full((self.count, nodes), np.nan)
        """For the player to move, where the game is over: -1 lost, 0 drawn; NaN where it goes on."""
        self.sizes = np.ones(self.count, dtype=np.int64)
        self.leaves = np.zeros(self.count, dtype=np.int64)
        self.leaf_values = np.zeros(self.count)
        self.depths = np.zeros(self.count, dtype=np.int64)
        self.is_new = np.zeros(self.count, dtype=bool)

    def add(self, games: np.ndarray, parents: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Make the nodes that these moves lead to and return their numbers."""
        nodes = self.sizes[games]
        self.sizes[games] += 1
        moved = self.game.play(self.boards[games, parents], actions)
        self.boards[games, nodes] = moved.boards
        self.outcomes[games, nodes] = np.where(moved.won, -1.0, np.where(moved.drawn, 0.0, np.nan))
        self.children[games, parents, actions] = nodes
        return nodes

    def expand(self, games: np.ndarray, nodes: np.ndarray, priors: np.ndarray) -> None:
        """Open positions: their moves can be tried from now on."""
        self.priors[games, nodes] = priors
        self.illegal[games, nodes] = ~self.game.legal(self.boards[games, nodes])
