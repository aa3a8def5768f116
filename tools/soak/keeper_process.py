"""The keeper's process: the real keeper, with traps and failing disks put around what it calls.

Production code has no hooks: the calls themselves are replaced, in this process only. What is to go wrong stands on a
board, a mapped file that the soak writes and every keeper of the schedule reads at each step.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import mmap
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from throttllem.gpu.locks import LockableGpu
from throttllem.keeper import __main__ as keeper
from throttllem.keeper import journal, leases, systemd
from tools.testbed.fork_server import Order

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
    `block_s`: for how long the keeper's event loop is to stand still, once. `shift_s`: what the host's clock is off by.
    `hoard`: all memory that can be had is to be taken. `slow_s`: how long writing a copy takes.
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


# ---- traps ----------------------------------------------------------------------------------------------------

HOARD_BYTES = (1 << 20, 1 << 16, 1 << 12, 256)


def run(order: Order) -> None:
    """The keeper with these "arguments"; "board" and "copies" are files, of the board and of the journal."""
    set_traps(open_board(Path(order["board"])), [Path(copy) for copy in order["copies"]])
    keeper.main(order["arguments"])


def set_traps(board: Board, copies: list[Path]) -> None:
    """From here on the board is heeded."""
    traps = _Traps(board, copies)
    _around_files(traps)
    _around_gpus(traps)
    _around_answers(traps)
    _around_loop(board)
    real_time = time.time
    time.time = lambda: real_time() + board.shift_s


class _Traps:
    def __init__(self, board: Board, copies: list[Path]) -> None:
        self.board, self.parts = board, [copy.with_suffix(".part") for copy in copies]

    def __call__(self, point: str) -> None:
        """Die here if the board demands it."""
        board = self.board
        for index, trap in enumerate(board.traps):
            if trap and POINTS[trap - 1] == point:
                board.passes[index] -= 1
                if board.passes[index] <= 0:
                    board.traps[index] = 0
                    os.kill(os.getpid(), signal.SIGKILL)

    def copy(self, path: Path) -> int | None:
        """The journal's copy that this is the beginning of."""
        return self.parts.index(path) if path in self.parts else None

    def fails(self, copy: int) -> OSError | None:
        """The error of the disk."""
        if not self.board.failing >> copy & 1:
            return None
        return OSError(self.board.error, os.strerror(self.board.error))


def _around_files(traps: _Traps) -> None:
    """A file that is to become a copy of the journal; half of it is on the disk when the trap in the middle springs."""
    real_open, real_write, real_close, real_rename = os.open, os.write, os.close, os.rename
    written: dict[int, int] = {}

    def place(name: str, folder: int | None) -> Path:
        return Path(name) if folder is None else Path(f"/proc/self/fd/{folder}").readlink() / name

    def opened(name: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        copy = traps.copy(place(name, dir_fd)) if flags & os.O_CREAT and dir_fd is not None else None
        if copy is None:
            return real_open(name, flags, mode, dir_fd=dir_fd)
        traps(f"open.before.{copy}")
        handle = real_open(name, flags, mode, dir_fd=dir_fd)
        written[handle] = copy
        traps(f"open.after.{copy}")
        return handle

    def wrote(handle: int, text: bytes) -> int:
        copy = written.get(handle)
        if copy is None:
            return real_write(handle, text)
        traps(f"write.before.{copy}")
        time.sleep(traps.board.slow_s)
        error = traps.fails(copy)
        if error and not (traps.board.short and error.errno == errno.ENOSPC):
            raise error
        done = real_write(handle, text[: len(text) // 2])
        if error:
            raise error
        traps(f"write.half.{copy}")
        done += real_write(handle, text[len(text) // 2 :])
        traps(f"write.after.{copy}")
        return done

    def closed(handle: int) -> None:
        written.pop(handle, None)
        real_close(handle)

    def renamed(name: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        copy = traps.copy(place(name, src_dir_fd))
        traps(f"replace.before.{copy}")
        real_rename(name, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        traps(f"replace.after.{copy}")

    os.open, os.write, os.close, os.rename = opened, wrote, closed, renamed  # type: ignore[assignment]


def _between(traps: _Traps, point: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        traps(f"{point}.before")
        found = real(*arguments)
        traps(f"{point}.after")
        return found

    return call


def _around_gpus(traps: _Traps) -> None:
    for method, point in (("check", "note"), ("lock", "lock"), ("restore", "restore")):
        setattr(LockableGpu, method, _between(traps, point, getattr(LockableGpu, method)))
    real_write, shorter = journal.Journal.write, _between(traps, "entry", journal.Journal.write)
    real_restore, recovers = leases.Leases.restore, _between(traps, "recover", leases.Leases.restore)
    entries, begun = 0, False

    def written(it: journal.Journal, baselines: Any) -> None:
        nonlocal entries
        write, entries = shorter if len(baselines) < entries else real_write, len(baselines)
        write(it, baselines)

    def restored(it: leases.Leases, gpus: Any) -> None:
        nonlocal begun
        restore, begun = real_restore if begun else recovers, True
        restore(it, gpus)

    journal.Journal.write = written  # type: ignore[method-assign, assignment]
    leases.Leases.restore = restored  # type: ignore[method-assign, assignment]


def _around_answers(traps: _Traps) -> None:
    writer = asyncio.StreamWriter  # only the server has one in this process
    writer.write = _between(traps, "reply", writer.write)  # type: ignore[method-assign]


def _around_loop(board: Board) -> None:
    """The keeper notifies systemd several times a second: there its event loop is caught."""
    blocks: list[object] = [None] * 20_000
    real = systemd.notify

    def notified(message: bytes) -> None:
        if board.block_s:
            lasts_s, board.block_s = board.block_s, 0.0
            time.sleep(lasts_s)
        if board.hoard:
            board.hoard = 0
            _take_all(blocks)
        real(message)

    systemd.notify = notified


def _take_all(blocks: list[object]) -> None:
    """Until nothing is left, from large to small. Does nothing where there is no limit."""
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        return
    used = 0
    for size in HOARD_BYTES:
        try:
            while used < len(blocks):
                blocks[used] = bytearray(size)
                used += 1
        except MemoryError:
            continue
