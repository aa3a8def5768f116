"""A few words of memory that the lane writes and the keeper's process reads at every step: what is to go wrong there.

They lie in a mapped file, so that a keeper that is started anew sees them too.
"""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

POINTS = (
    *(f"open.{when}.{copy}" for copy in (0, 1) for when in ("before", "after")),
    *(f"write.{when}.{copy}" for copy in (0, 1) for when in ("before", "half", "after")),
    *(f"replace.{when}.{copy}" for copy in (0, 1) for when in ("before", "after")),
    *(
        f"{step}.{when}"
        for step in ("note", "lock", "restore", "reply", "entry", "recover")
        for when in ("before", "after")
    ),
)
"""Where the keeper can be made to die. A journal copy's number comes last."""
TRAPS = 4


class Board(ctypes.Structure):
    """`traps`: each 1 + the number of a point, where the keeper dies as it passes for the `passes`th time; 0: nowhere.

    `failing` has bit n set while writing journal copy n fails with `error`; `short`: half of it is written first.
    `block_s`: the keeper's event loop is to stand still for so long, once. `shift_s`: what the host's clock is off by.
    `hoard`: all memory that can be had is to be taken. `slow_s`: so long writing a copy takes.
    """

    traps: ctypes.Array[ctypes.c_int32]
    passes: ctypes.Array[ctypes.c_int32]
    failing: int
    error: int
    short: int
    hoard: int
    block_s: float
    shift_s: float
    slow_s: float
    _fields_ = (
        ("traps", ctypes.c_int32 * TRAPS),
        ("passes", ctypes.c_int32 * TRAPS),
        ("failing", ctypes.c_int32),
        ("error", ctypes.c_int32),
        ("short", ctypes.c_int32),
        ("hoard", ctypes.c_int32),
        ("block_s", ctypes.c_double),
        ("shift_s", ctypes.c_double),
        ("slow_s", ctypes.c_double),
    )

    def arm(self, point: str, passes: int) -> int:
        """A trap; which one it is. Raises ValueError if there is none left."""
        free = list(self.traps).index(0)
        self.passes[free], self.traps[free] = passes, 1 + POINTS.index(point)
        return free


def make_board(file: Path) -> Board:
    """A new one, on which nothing is to go wrong."""
    file.write_bytes(bytes(ctypes.sizeof(Board)))
    return open_board(file)


def open_board(file: Path) -> Board:
    """One that was made; it stays mapped as long as it is used."""
    with file.open("r+b") as opened:
        return Board.from_buffer(mmap.mmap(opened.fileno(), ctypes.sizeof(Board)))
