"""Games a network plays against itself, and the window of positions it learns from."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from classic_rl.alphazero.games import BoardGame
from classic_rl.alphazero.search import Evaluate, Search, SearchConfig
from rlhf.config import Config


class SelfPlayConfig(Config):
    """How games are played for learning."""

    games: int = Field(64, ge=1)
    """Played side by side; a finished one is replaced by a new one."""
    moves_per_iteration: int = Field(16, ge=1)
    """Of every game, between two trainings."""
    temperature_moves: int = Field(12, ge=0)
    """First moves of a game that are drawn from the visits' shares; later ones are the most visited."""
    search: SearchConfig = SearchConfig()


class Positions(NamedTuple):
    """What the network learns from.

    Args:
        boards: [N, cells] int8, as the player to move saw them.
        policies: [N, A] the search's shares of visits, pi.
        outcomes: [N] z: 1 where that player won in the end, -1 where it lost, 0 drawn.
    """

    boards: np.ndarray
    policies: np.ndarray
    outcomes: np.ndarray


class SelfPlay:
    """Games in progress. A game's positions become examples when it ends and its outcome is known.

    Args:
        game: The rules.
        evaluate: The network's judgement.
        config: How.
        generator: Draws moves and noise.
    """

    def __init__(
        self, game: BoardGame, evaluate: Evaluate, config: SelfPlayConfig, *, generator: np.random.Generator
    ) -> None:
        self.game, self.config, self.generator = game, config, generator
        self.search = Search(game, evaluate, config.search, generator=generator)
        self.boards = game.initial(config.games)
        self.plies = np.zeros(config.games, dtype=np.int64)
        shape = (config.games, game.num_cells)  # a game has at most one move per cell
        self._past_boards = np.zeros((*shape, game.num_cells), dtype=np.int8)
        self._past_policies = np.zeros((*shape, game.num_actions), dtype=np.float32)

    def play(self) -> tuple[Positions, dict[str, float]]:
        """Play `moves_per_iteration` moves of every game.

        Returns:
            The positions of the games that ended, and metrics of these games.
        """
        finished: list[Positions] = []
        lengths: list[int] = []
        results: list[float] = []
        for _ in range(self.config.moves_per_iteration):
            policies = self.search.run(self.boards, explore=True).policy()
            games = np.arange(len(self.boards))
            self._past_boards[games, self.plies] = self.boards
            self._past_policies[games, self.plies] = policies
            moved = self.game.play(self.boards, self._choose(policies))
            self.boards = moved.boards
            self.plies += 1
            for index in np.flatnonzero(moved.won | moved.drawn):
                finished.append(self._harvest(index, won=bool(moved.won[index])))
                lengths.append(len(finished[-1].outcomes))
                results.append(float(finished[-1].outcomes[0]))
        metrics = {"games_finished": float(len(finished))}
        if finished:
            metrics |= {"game_length": float(np.mean(lengths)), "first_player_result": float(np.mean(results))}
        return _joined(finished, self.game), metrics

    def _choose(self, policies: np.ndarray) -> np.ndarray:
        """Draw from the shares early in a game, take the largest later."""
        drawn = (policies.cumsum(axis=1) > self.generator.random((len(policies), 1))).argmax(axis=1)
        return np.where(self.plies < self.config.temperature_moves, drawn, policies.argmax(axis=1))

    def _harvest(self, index: int, *, won: bool) -> Positions:
        """Return a finished game's positions and start a new one in its place.

        The player of the last move won, or nobody; players alternate, so the sign does too, counted from the end.
        """
        length = int(self.plies[index])
        signs = np.where(np.arange(length - 1, -1, -1) % 2 == 0, 1.0, -1.0)
        outcomes = (signs if won else np.zeros(length)).astype(np.float32)
        positions = Positions(
            self._past_boards[index, :length].copy(), self._past_policies[index, :length].copy(), outcomes
        )
        self.boards[index] = 0
        self.plies[index] = 0
        return positions

    def state_dict(self) -> dict[str, Any]:
        """Games in progress; the generator belongs to whoever made it."""
        return {
            "boards": self.boards,
            "plies": self.plies,
            "past_boards": self._past_boards,
            "past_policies": self._past_policies,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.boards, self.plies = state["boards"], state["plies"]
        self._past_boards, self._past_policies = state["past_boards"], state["past_policies"]


def _joined(games: list[Positions], game: BoardGame) -> Positions:
    if not games:
        empty = np.zeros((0, game.num_cells), np.int8), np.zeros((0, game.num_actions), np.float32)
        return Positions(*empty, np.zeros(0, np.float32))
    return Positions(*(np.concatenate(parts) for parts in zip(*games, strict=True)))


class Window:
    """The latest positions; the oldest are overwritten.

    Args:
        game: The rules, for sizes and symmetries.
        capacity: How many positions are kept.
    """

    def __init__(self, game: BoardGame, *, capacity: int) -> None:
        self.capacity, self.size, self._next = capacity, 0, 0
        self._kept = Positions(
            np.zeros((capacity, game.num_cells), np.int8),
            np.zeros((capacity, game.num_actions), np.float32),
            np.zeros(capacity, np.float32),
        )
        symmetries = game.symmetries()
        self._cell_orders = np.stack([cells for cells, _ in symmetries])
        self._action_orders = np.stack([actions for _, actions in symmetries])

    def __len__(self) -> int:
        """Positions kept."""
        return self.size

    def add(self, positions: Positions) -> None:
        """Keep positions; of more than fit, the latest."""
        count = min(len(positions.outcomes), self.capacity)
        places = (self._next + np.arange(count)) % self.capacity
        for kept, new in zip(self._kept, positions, strict=True):
            kept[places] = new[len(new) - count :]
        self._next = (self._next + count) % self.capacity
        self.size = min(self.size + count, self.capacity)

    def sample(self, count: int, *, generator: np.random.Generator) -> Positions:
        """Draw positions evenly, each turned by one of the game's symmetries."""
        rows = generator.integers(self.size, size=count)
        turns = generator.integers(len(self._cell_orders), size=count)
        return Positions(
            np.take_along_axis(self._kept.boards[rows], self._cell_orders[turns], axis=1),
            np.take_along_axis(self._kept.policies[rows], self._action_orders[turns], axis=1),
            self._kept.outcomes[rows],
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything kept."""
        return {"kept": tuple(self._kept), "size": self.size, "next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._kept = Positions(*state["kept"])
        self.size, self._next = state["size"], state["next"]
