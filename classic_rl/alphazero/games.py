"""Two-player board games on arrays: many games at once, each seen by the player to move.

A board is a row of cells: 1 the mover's stones, -1 the opponent's, 0 empty. After a move the board is turned round, so
that the next player sees its own stones as 1.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

GameName = Literal["tictactoe", "connect_four"]


class Moved(NamedTuple):
    """What moves led to.

    Args:
        boards: [N, cells] int8, as the next player sees them.
        won: [N] True where the move won the game for who made it.
        drawn: [N] True where the board is full and nobody won.
    """

    boards: np.ndarray
    won: np.ndarray
    drawn: np.ndarray


class BoardGame:
    """A game of stones that stay where they were put, won by `in_a_row` of one's own in a line.

    Args:
        rows, columns: Of the board.
        in_a_row: How many win.
    """

    num_actions: int

    def __init__(self, *, rows: int, columns: int, in_a_row: int) -> None:
        self.rows, self.columns, self.num_cells = rows, columns, rows * columns
        self.in_a_row = in_a_row
        self._lines = _lines(rows, columns, in_a_row)

    def initial(self, count: int) -> np.ndarray:
        """Return `count` empty boards [N, cells]."""
        return np.zeros((count, self.num_cells), dtype=np.int8)

    def legal(self, boards: np.ndarray) -> np.ndarray:
        """Return which actions are allowed, [N, A]."""
        raise NotImplementedError

    def cells(self, boards: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Return the cell that each action fills, [N]."""
        raise NotImplementedError

    def symmetries(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return (order of cells, order of actions) of each symmetry: `boards[:, cells]` and `policies[:, actions]`."""
        raise NotImplementedError

    def play(self, boards: np.ndarray, actions: np.ndarray) -> Moved:
        """Put the movers' stones.

        Args:
            boards: [N, cells], games that are not over.
            actions: [N] legal actions.
        """
        after = boards.copy()
        after[np.arange(len(boards)), self.cells(boards, actions)] = 1
        won = ((after == 1).astype(np.float32) @ self._lines).max(axis=1) == self.in_a_row
        drawn = ~won & (after != 0).all(axis=1)
        return Moved(-after, won, drawn)

    def planes(self, boards: np.ndarray) -> np.ndarray:
        """Return what a network sees: own stones, the opponent's, [N, 2, rows, columns] float32."""
        shaped = boards.reshape(-1, self.rows, self.columns)
        return np.stack([shaped == 1, shaped == -1], axis=1).astype(np.float32)

    def picture(self, board: np.ndarray) -> str:
        """Draw one board: x the mover's stones, o the opponent's."""
        marks = np.array(["o", ".", "x"])[board.reshape(self.rows, self.columns) + 1]
        return "\n".join(" ".join(row) for row in marks)


class TicTacToe(BoardGame):
    """Three in a row on 3 x 3; an action is a cell, row by row.

    >>> game = TicTacToe()
    >>> boards = np.array([[1, 1, 0, -1, -1, 0, 0, 0, 0]], dtype=np.int8)
    >>> bool(game.play(boards, np.array([2])).won[0])
    True
    """

    num_actions = 9

    def __init__(self) -> None:
        super().__init__(rows=3, columns=3, in_a_row=3)

    def legal(self, boards: np.ndarray) -> np.ndarray:
        """Every empty cell."""
        return boards == 0

    def cells(self, boards: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The action is the cell."""
        return actions

    def symmetries(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Four rotations, and each mirrored."""
        square = np.arange(9).reshape(3, 3)
        turned = [np.rot90(square, k) for k in range(4)]
        orders = [board.ravel() for grid in turned for board in (grid, grid[:, ::-1])]
        return [(order, order) for order in orders]


class ConnectFour(BoardGame):
    """Four in a row on 6 x 7; an action is a column, and the stone falls to its lowest empty cell."""

    num_actions = 7

    def __init__(self) -> None:
        super().__init__(rows=6, columns=7, in_a_row=4)

    def legal(self, boards: np.ndarray) -> np.ndarray:
        """Every column whose top cell is empty."""
        return boards[:, : self.columns] == 0

    def cells(self, boards: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The lowest empty cell of the column; row 0 is the top."""
        filled = boards.reshape(-1, self.rows, self.columns)[np.arange(len(boards)), :, actions] != 0
        return (self.rows - 1 - filled.sum(axis=1)) * self.columns + actions

    def symmetries(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """The board and its mirror image."""
        grid = np.arange(self.num_cells).reshape(self.rows, self.columns)
        columns = np.arange(self.columns)
        return [(grid.ravel(), columns), (grid[:, ::-1].ravel(), columns[::-1])]


GAMES: dict[GameName, type[BoardGame]] = {"tictactoe": TicTacToe, "connect_four": ConnectFour}


def _lines(rows: int, columns: int, length: int) -> np.ndarray:
    """Return every line of `length` cells as a column of 0 and 1, [cells, lines]: a matrix product counts stones."""
    lines = []
    for row in range(rows):
        for column in range(columns):
            for down, right in ((0, 1), (1, 0), (1, 1), (1, -1)):
                cells = [(row + k * down, column + k * right) for k in range(length)]
                if all(0 <= r < rows and 0 <= c < columns for r, c in cells):
                    line = np.zeros(rows * columns, dtype=np.float32)
                    line[[r * columns + c for r, c in cells]] = 1
                    lines.append(line)
    return np.stack(lines, axis=1)
