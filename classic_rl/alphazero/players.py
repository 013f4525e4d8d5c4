"""Who plays: a search with any judge, random rollouts, the perfect player of small games; and matches between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from classic_rl.alphazero.games import BoardGame
from classic_rl.alphazero.search import Evaluate, Search, SearchConfig

Player = Callable[[np.ndarray], np.ndarray]
"""Boards [N, cells] -> actions [N]."""


class Score(NamedTuple):
    """How many games the first player of a match won, drew and lost."""

    won: int
    drawn: int
    lost: int

    def mean(self) -> float:
        """Return points per game: a win 1, a draw 1/2."""
        return (self.won + 0.5 * self.drawn) / sum(self)


def searching_player(game: BoardGame, evaluate: Evaluate, config: SearchConfig) -> Player:
    """Return a player that takes the most visited move, without noise."""
    search = Search(game, evaluate, config)
    return lambda boards: search.run(boards).best()


def pure_mcts(game: BoardGame, *, rollouts: int, seed: int, c: float = 2**0.5) -> Player:
    """Return a player that judges positions by random play alone: UCB1, one rollout per simulation.

    Source: Kocsis and Szepesvari 2006, Bandit based Monte-Carlo Planning.
    """
    generator = np.random.default_rng(seed)
    config = SearchConfig(simulations=rollouts, rule="ucb1", c_puct=c, noise_fraction=0.0)
    return searching_player(game, lambda boards: _roll_out(game, boards, generator), config)


def random_player(game: BoardGame, *, seed: int) -> Player:
    """Return a player of random legal moves."""
    generator = np.random.default_rng(seed)
    return lambda boards: _random_moves(game, boards, generator)


def _random_moves(game: BoardGame, boards: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the legal move with the largest of uniform draws: each is equally likely."""
    return np.where(game.legal(boards), generator.random((len(boards), game.num_actions)), -1.0).argmax(axis=1)


def _roll_out(game: BoardGame, boards: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Play every board to its end at random; uniform priors, and the outcome for the player to move."""
    outcomes = np.zeros(len(boards))
    playing, sign = np.arange(len(boards)), 1.0
    current = boards
    while len(playing):
        moved = game.play(current, _random_moves(game, current, generator))
        outcomes[playing[moved.won]] = sign
        goes_on = ~(moved.won | moved.drawn)
        current, playing, sign = moved.boards[goes_on], playing[goes_on], -sign
    return np.full((len(boards), game.num_actions), 1 / game.num_actions), outcomes


def play_match(game: BoardGame, first: Player, second: Player, *, openings: np.ndarray) -> Score:
    """Play one game from every opening.

    Args:
        game: The rules.
        first: Who moves first.
        second: Who answers.
        openings: [N, cells] boards with `first` to move.

    Returns:
        The score of `first`.
    """
    won = drawn = lost = 0
    boards, players, mover = openings, (first, second), 0
    while len(boards):
        moved = game.play(boards, players[mover](boards))
        won += int(moved.won.sum()) if mover == 0 else 0
        lost += int(moved.won.sum()) if mover == 1 else 0
        drawn += int(moved.drawn.sum())
        boards, mover = moved.boards[~(moved.won | moved.drawn)], 1 - mover
    return Score(won, drawn, lost)


def play_both_sides(game: BoardGame, one: Player, other: Player, *, openings: np.ndarray) -> Score:
    """Play every opening twice, `one` moving first and second; returns the score of `one`."""
    first = play_match(game, one, other, openings=openings)
    second = play_match(game, other, one, openings=openings)
    return Score(first.won + second.lost, first.drawn + second.drawn, first.lost + second.won)


def random_openings(game: BoardGame, *, count: int, moves: int, seed: int) -> np.ndarray:
    """Return `count` boards after `moves` random moves of games that are not over: deterministic players need them."""
    generator = np.random.default_rng(seed)
    boards = np.zeros((0, game.num_cells), dtype=np.int8)
    while len(boards) < count:
        current = game.initial(count)
        for _ in range(moves):
            moved = game.play(current, _random_moves(game, current, generator))
            current = moved.boards[~(moved.won | moved.drawn)]
        boards = np.concatenate([boards, current])
    return boards[:count]


class PerfectPlayer:
    """Minimax over the whole game, every position once: for games as small as TicTacToe.

    V(s) = max_a -V(s'), with V = -1 where the player to move has lost and 0 where the board is full.

    Args:
        game: The rules.
    """

    def __init__(self, game: BoardGame) -> None:
        self.game = game
        self._values: dict[bytes, int] = {}
        self.value(game.initial(1)[0])

    def value(self, board: np.ndarray) -> int:
        """Return the outcome for the player to move under perfect play: 1, 0 or -1; the game must not be over."""
        known = self._values.get(board.tobytes())
        if known is None:
            known = max(self.action_values(board).values())
            self._values[board.tobytes()] = known
        return known

    def action_values(self, board: np.ndarray) -> dict[int, int]:
        """Return the outcome of each legal move."""
        actions = np.flatnonzero(self.game.legal(board[None])[0])
        moved = self.game.play(np.repeat(board[None], len(actions), axis=0), actions)
        return {
            int(action): 1 if moved.won[k] else 0 if moved.drawn[k] else -self.value(moved.boards[k])
            for k, action in enumerate(actions)
        }

    def __call__(self, boards: np.ndarray) -> np.ndarray:
        """Return a best move for each board; of several the first."""
        choices = [self.action_values(board) for board in boards]
        return np.array([max(values, key=lambda action: (values[action], -action)) for values in choices])


def worst_outcome(game: BoardGame, player: Player, *, moves_first: bool) -> int:
    """Return the player's worst result against every possible opponent, by playing all of the opponent's moves.

    Args:
        game: The rules; the player must be deterministic.
        player: Who is tested.
        moves_first: Whether the player opens.

    Returns:
        1 if it always wins, 0 if it never loses, -1 if some opponent beats it.
    """
    boards, players_turn, worst = game.initial(1), moves_first, 1
    while len(boards):
        if players_turn:
            moved = game.play(boards, player(boards))
        else:
            rows, actions = np.nonzero(game.legal(boards))
            moved = game.play(boards[rows], actions)
        if moved.won.any() and not players_turn:
            return -1
        worst = min(worst, 0) if moved.drawn.any() else worst
        boards, players_turn = np.unique(moved.boards[~(moved.won | moved.drawn)], axis=0), not players_turn
    return worst
