"""The scoreboard's columns as compiled loops read them, by name, for tests."""

import numpy as np

_ROWS = {"start": 0, "tokens_at_start": 1, "widths": 3}


def column(board, name):
    """One value for each running sequence."""
    return board.columns[_ROWS[name], : len(board.running)]


def same_columns(one, other):
    """Whether two scoreboards hold the same running sequences, in the same order."""
    return len(one.running) == len(other.running) and all(
        np.array_equal(mine[:, : len(one.running)], its[:, : len(one.running)])
        for mine, its in ((one.columns, other.columns), (one.limits, other.limits))
    )
