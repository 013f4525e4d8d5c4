"""Rules against known counts, and the perfect player."""

from __future__ import annotations

import numpy as np
import pytest

from classic_rl.alphazero.games import ConnectFour, TicTacToe
from classic_rl.alphazero.players import (
    PerfectPlayer,
    play_both_sides,
    play_match,
    pure_mcts,
    random_openings,
    random_player,
    worst_outcome,
)


def children(game, boards):
    """Every legal move of every board."""
    rows, actions = np.nonzero(game.legal(boards))
    return game.play(boards[rows], actions)


def test_all_games_of_tictactoe_are_counted():
    # 255,168 games: 131,184 won by who moves first, 77,904 by the other, 46,080 drawn
    # (Schaefer 2002, https://www.mathrec.org/old/2002jan/solutions.html).
    game, counts = TicTacToe(), {"first": 0, "second": 0, "drawn": 0}
    boards = game.initial(1)
    for ply in range(9):
        moved = children(game, boards)
        counts["first" if ply % 2 == 0 else "second"] += int(moved.won.sum())
        counts["drawn"] += int(moved.drawn.sum())
        boards = moved.boards[~(moved.won | moved.drawn)]
    assert counts == {"first": 131_184, "second": 77_904, "drawn": 46_080}


def test_positions_of_connect_four_are_counted():
    # Distinct positions after n moves, https://oeis.org/A212693: 1, 7, 49, 238, 1120, 4263.
    game = ConnectFour()
    boards, counts = game.initial(1), []
    for _ in range(5):
        moved = children(game, boards)
        counts.append(len(np.unique(moved.boards, axis=0)))
        boards = np.unique(moved.boards[~(moved.won | moved.drawn)], axis=0)
    assert counts == [7, 49, 238, 1120, 4263]


@pytest.mark.parametrize(
    "columns",
    [
        [0, 0, 1, 1, 2, 2, 3],
        [6, 0, 6, 0, 6, 0, 6],
        [0, 1, 1, 2, 2, 3, 2, 3, 3, 6, 3],
        [3, 2, 2, 1, 1, 0, 1, 0, 0, 6, 0],
    ],
    ids=["row", "column", "rising", "falling"],
)
def test_four_in_a_line_wins(columns):
    game = ConnectFour()
    boards = game.initial(1)
    for index, column in enumerate(columns):
        moved = game.play(boards, np.array([column]))
        assert bool(moved.won[0]) == (index == len(columns) - 1)
        boards = moved.boards


def test_a_full_column_is_closed():
    game = ConnectFour()
    boards = game.initial(1)
    for _ in range(6):
        boards = game.play(boards, np.array([4])).boards
    assert game.legal(boards)[0].tolist() == [True, True, True, True, False, True, True]


@pytest.mark.parametrize("game", [TicTacToe(), ConnectFour()], ids=["tictactoe", "connect_four"])
def test_turning_the_board_and_moving_commute(game):
    boards = random_openings(game, count=20, moves=4, seed=0)
    for cells, actions in game.symmetries():
        turned = boards[:, cells]
        np.testing.assert_array_equal(game.legal(turned), game.legal(boards)[:, actions])
        for turned_action, action in enumerate(actions):
            rows = game.legal(boards)[:, action]
            after = game.play(boards[rows], np.full(rows.sum(), action)).boards
            np.testing.assert_array_equal(
                game.play(turned[rows], np.full(rows.sum(), turned_action)).boards, after[:, cells]
            )


def test_the_perfect_player_draws_against_itself_and_is_never_beaten():
    game = TicTacToe()
    perfect = PerfectPlayer(game)
    assert perfect.value(game.initial(1)[0]) == 0
    assert len(perfect._values) == 5_478 - 958  # reachable positions less those where the game is over
    assert play_match(game, perfect, perfect, openings=game.initial(1)) == (0, 1, 0)
    assert [worst_outcome(game, perfect, moves_first=first) for first in (True, False)] == [0, 0]


def test_a_player_that_can_be_beaten_is_found_out():
    game = TicTacToe()
    assert worst_outcome(game, lambda boards: game.legal(boards).argmax(axis=1), moves_first=True) == -1


def test_random_rollouts_beat_random_moves_and_scores_are_of_the_first_named():
    game = ConnectFour()
    openings = random_openings(game, count=10, moves=0, seed=0)
    score = play_both_sides(game, pure_mcts(game, rollouts=30, seed=1), random_player(game, seed=2), openings=openings)
    assert sum(score) == 20
    assert score.won >= 17
