"""What can happen to the journal: no space, errors, slowness, copies torn, deleted, or in the way of writing."""

from __future__ import annotations

import errno
import shutil
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from tools.soak.bed import SoakBed
from tools.soak.faults.kind import Journal, Kind, lasting
from tools.soak.schedule import Fault

_ERRORS = {"full": errno.ENOSPC, "full halfway": errno.ENOSPC, "broken": errno.EIO}
_SLOW_S = 0.15
_READ_S = 1.0
"""A keeper that began so short ago may not have read its journal yet."""


def _copies(bed: SoakBed, fault: Fault, both: bool) -> tuple[Path, ...]:
    return bed.copies if both else (bed.copies[fault.copy],)


async def _no_space(bed: SoakBed, fault: Fault, both: bool = False) -> None:
    board, bits = bed.board, 3 if both else 1 << fault.copy
    board.error, board.short = _ERRORS[fault.which], fault.which == "full halfway"
    board.failing |= bits
    await lasting(bed, fault)
    board.failing &= ~bits


async def _filled(bed: SoakBed, fault: Fault) -> None:
    """The file system of the sockets, really; where there is none that is small enough, as if."""
    if not bed.sandbox.small:
        await _no_space(bed, fault)
        return
    filler = bed.sandbox.run / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    await lasting(bed, fault)
    filler.unlink()


async def _slow(bed: SoakBed, fault: Fault) -> None:
    bed.board.slow_s = _SLOW_S
    await lasting(bed, fault)
    bed.board.slow_s = 0.0


async def _torn(bed: SoakBed, fault: Fault, both: bool = False) -> None:
    """While no keeper runs; the next one must log it."""
    with bed.without_keeper():
        bed.keeper.send(signal.SIGKILL)
        await bed.keeper.dead.wait()
        copies = _copies(bed, fault, both)
        for path in copies:
            _tear(path, fault.which, bed.draw.randbytes(64))
        if both:
            bed.observer.journal_gone = bed.evidence.forgot = True
        bed.evidence.must_log += [f"{path} is not used" for path in copies]


def _tear(path: Path, how: str, noise: bytes) -> None:
    """Also where the disk is full: then it is emptied."""
    with suppress(OSError):
        _write(path, how, noise)


def _write(path: Path, how: str, noise: bytes) -> None:
    text = path.read_bytes() if path.exists() else b"nothing yet"
    match how:
        case "truncated":
            path.write_bytes(text[: len(text) // 2])
        case "empty":
            path.write_bytes(b"")
        case "zeros":
            path.write_bytes(bytes(len(text)))
        case "one bit":
            path.write_bytes(bytes([*text[:-3], text[-3] ^ 4, *text[-2:]]))
        case _:
            path.write_bytes(noise)


async def _deleted(bed: SoakBed, fault: Fault, both: bool = False) -> None:
    for path in _copies(bed, fault, both):
        path.unlink(missing_ok=True)
    if both:
        begins = not bed.keeper.alive or time.monotonic() - bed.keeper.began_s < _READ_S
        bed.observer.journal_gone, bed.evidence.forgot = True, bed.evidence.forgot or begins


async def _unwritable(bed: SoakBed, fault: Fault, both: bool = False) -> None:
    """A folder stands where the new copy is to be written."""
    parts = [path.with_suffix(".part") for path in _copies(bed, fault, both)]
    for part in parts:
        while not part.is_dir():
            part.unlink(missing_ok=True)
            with suppress(FileExistsError):
                part.mkdir()
    await lasting(bed, fault)
    for part in parts:
        shutil.rmtree(part, ignore_errors=True)


_HOW = ("truncated", "empty", "zeros", "one bit", "noise")
_LASTS_S = (0.1, 0.9)
_ONE, _ALL = Journal.ONE, Journal.BOTH

KINDS = (
    Kind(name="disk: no space, one copy", inject=_no_space, lasts_s=_LASTS_S, which=tuple(_ERRORS), journal=_ONE),
    Kind(
        name="disk: no space, both copies",
        inject=partial(_no_space, both=True),
        lasts_s=_LASTS_S,
        which=tuple(_ERRORS),
    ),
    Kind(name="disk: filled", inject=_filled, lasts_s=_LASTS_S, which=("full",), journal=_ONE),
    Kind(name="disk: slow", inject=_slow, lasts_s=_LASTS_S),
    Kind(name="journal: one copy torn", inject=_torn, which=_HOW, journal=_ONE),
    Kind(name="journal: both copies torn", inject=partial(_torn, both=True), which=_HOW, journal=_ALL),
    Kind(name="journal: one copy deleted", inject=_deleted, journal=_ONE),
    Kind(name="journal: both copies deleted", inject=partial(_deleted, both=True), journal=_ALL),
    Kind(name="journal: one copy unwritable", inject=_unwritable, lasts_s=_LASTS_S, journal=_ONE),
    Kind(name="journal: both copies unwritable", inject=partial(_unwritable, both=True), lasts_s=_LASTS_S),
)
