"""A trained network as a player of single games; `classic_rl.load` returns it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from classic_rl.alphazero.network import BoardNetwork, load_network, load_search
from classic_rl.alphazero.search import Search, SearchConfig


class TrainedPlayer:
    """Searches with a network's judgement.

    Args:
        network: What judges positions.
        search: How a move is searched for.
    """

    def __init__(self, network: BoardNetwork, search: SearchConfig) -> None:
        self.network, self.game, self.search = network, network.game, search
        self._generator = np.random.default_rng()

    def predict(self, observation: Any, *, deterministic: bool = True, simulations: int | None = None) -> int:
        """Return the move in one position.

        Args:
            observation: [cells] or [rows, columns], 1 the mover's stones, -1 the opponent's, 0 empty; not over.
            deterministic: True takes the most visited move, False draws one by the visits' shares.
            simulations: Of the search; None takes those it was trained with.
        """
        search = self.search if simulations is None else self.search.model_copy(update={"simulations": simulations})
        board = np.asarray(observation, dtype=np.int8).reshape(1, self.game.num_cells)
        found = Search(self.game, self.network.evaluate, search).run(board)
        if deterministic:
            return int(found.best()[0])
        return int(self._generator.choice(self.game.num_actions, p=found.policy()[0]))


def load_player(folder: Path) -> TrainedPlayer:
    """Read what `BoardNetwork.save` wrote.

    Raises:
        ModelError: The folder lacks a file, or a file is not what `save` writes.
    """
    return TrainedPlayer(load_network(folder), load_search(folder))
