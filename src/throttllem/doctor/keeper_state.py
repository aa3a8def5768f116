"""The keeper of this machine: whether it runs and accepts this user, what it holds, what a dead one left locked.

Requests its status through the socket and reads its journal; changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from throttllem.doctor.finding import Finding, note, ok, trouble
from throttllem.gpu.clock_range import ClockRange
from throttllem.gpu.keeper_client import KeeperError, keeper_status
from throttllem.keeper.journal import Journal, boot_id, journal_paths
from throttllem.keeper.log import log

NO_KEEPER_REMEDY = (
    "without one the gateway only does a dry run; `throttllem keeper --gpu UUID=MHZ-MHZ --user NAME --unit` prints its "
    "service (docs/keeper.md)"
)


class SocketState(StrEnum):
    """What a connection to the keeper's socket came to."""

    ANSWERS = "answers this user"
    REJECTS = "does not accept this user, or has no free connection"
    SILENT = "does not answer"
    DEAD = "has no process behind it"
    ABSENT = "does not exist"
    HIDDEN = "is in a folder that this user cannot enter"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeeperState:
    """`status`: the keeper's answer. `left`: the GPUs in its journal, which it has locked or may have, with their
    baselines. `journal_errors`: what is wrong with the journal. `kept`: damaged copies that a keeper has set aside.
    """

    path: Path
    socket: SocketState
    status: Mapping[str, Any] = field(default_factory=dict)
    left: Mapping[str, ClockRange | None] = field(default_factory=dict)
    journal_errors: tuple[str, ...] = ()
    kept: tuple[Path, ...] = ()

    @property
    def runs(self) -> bool:
        """As far as the socket shows."""
        return self.socket in (SocketState.ANSWERS, SocketState.REJECTS, SocketState.SILENT)

    def range_of(self, uuid: str) -> ClockRange | None:
        """The clocks that this user may set through it."""
        clocks = self.status.get("allowed", {}).get(uuid)
        return None if clocks is None else ClockRange(*clocks)

    def baseline_of(self, uuid: str) -> ClockRange | None:
        """The lock that its options state as the baseline."""
        clocks = self.status.get("normally", {}).get(uuid)
        return None if clocks is None else ClockRange(*clocks)

    def holder_of(self, uuid: str) -> str | None:
        """The client that has a lease on it."""
        held = self.status.get("held", {}).get(uuid)
        return None if held is None else str(held["by"])

    def set_mhz(self, uuid: str) -> int | None:
        """The clock that its client has set."""
        mhz = self.status.get("held", {}).get(uuid, {}).get("mhz")
        return None if mhz is None else int(mhz)

    def restoring(self, uuid: str) -> bool:
        """Whether it is being restored, and is not yet."""
        return uuid in self.status.get("returning", ())


def read_keeper_state(state: Path, socket: Path) -> KeeperState:
    """Takes up to 2 s, if the keeper does not answer."""
    with collected_log() as errors:
        try:
            left = open_journal(state, socket).read()
        except OSError as error:  # a folder that this user may not enter
            left = {}
            errors.append(f"the keeper's journal cannot be read: {error}")
    try:
        found, status = SocketState.ANSWERS, asyncio.run(keeper_status(socket))
    except KeeperError as error:
        found, status = _socket_state(error), {}
    kept = [path for copy in journal_paths(state, socket) for path in sorted(_kept(copy))]
    return KeeperState(
        path=socket, socket=found, status=status, left=left, journal_errors=tuple(errors), kept=tuple(kept)
    )


def _kept(copy: Path) -> list[Path]:
    try:
        return list(copy.parent.glob(f"{copy.name}.damaged-*"))
    except OSError:  # a folder that this user may not enter
        return []


def open_journal(state: Path, socket: Path) -> Journal:
    """The keeper's journal."""
    return Journal(journal_paths(state, socket), boot_id())


@contextmanager
def collected_log() -> Iterator[list[str]]:
    """The messages that the keeper's code logs while the context is open: the doctor reports them as findings."""
    collector = _Collector()
    log.addHandler(collector)
    try:
        yield collector.messages
    finally:
        log.removeHandler(collector)


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _socket_state(error: KeeperError) -> SocketState:
    match error.__cause__:
        case FileNotFoundError() | NotADirectoryError():
            return SocketState.ABSENT
        case PermissionError():
            return SocketState.HIDDEN
        case ConnectionRefusedError():
            return SocketState.DEAD
        case TimeoutError():
            return SocketState.SILENT
        case _:
            return SocketState.REJECTS


def keeper_findings(keeper: KeeperState, here: Mapping[str, str] | None, user: str) -> Iterator[Finding]:
    """About the keeper itself. `here`: by UUID, the names of the GPUs of this machine (None: not all are known)."""
    match keeper.socket:
        case SocketState.ANSWERS:
            yield ok("keeper", f"runs, and {keeper.path} answers {user}")
        case SocketState.REJECTS:
            yield trouble(
                "keeper",
                f"runs; {keeper.path} does not accept {user}, or has no free connection",
                f"start it with `--user` for {user}; `throttllem doctor` as root shows which clients are connected",
            )
        case SocketState.SILENT:
            yield trouble(
                "keeper",
                f"{keeper.path} does not answer",
                "`journalctl -u throttllem-keeper` shows why; systemd restarts one that hangs within 2 s",
            )
        case SocketState.HIDDEN:
            yield trouble("keeper", f"{keeper.path}: {user} may not enter its folder", "give the folder mode 0755")
        case SocketState.DEAD | SocketState.ABSENT:
            yield note("keeper", f"none runs: {keeper.path} {keeper.socket}", NO_KEEPER_REMEDY)
    yield from _socket_findings(keeper)
    for error in keeper.journal_errors:
        yield note("journal", error)
    for path in keeper.kept:
        yield note("journal", f"a damaged journal is kept as {path}", "remove it when its cause is known")
    for uuid in keeper.status.get("allowed", ()):
        if here is not None and uuid not in here:
            yield trouble("keeper", f"may set {uuid}, which is not here", "remove it from the service's options")


def _socket_findings(keeper: KeeperState) -> Iterator[Finding]:
    """Wrong permissions of the file and its folder: a user that can write there can pose as the keeper."""
    try:
        file, folder = keeper.path.lstat(), keeper.path.parent.stat()
    except OSError:
        return
    if keeper.runs and file.st_mode & 0o006 != 0o006:
        mode = stat.S_IMODE(file.st_mode)
        yield trouble("keeper", f"{keeper.path} has mode {mode:04o}", "restart the keeper: it sets 0666")
    if folder.st_uid or folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield note(
            "keeper",
            f"other users than root can write in {keeper.path.parent}, and so could pose as the keeper",
            "let systemd make the folder: `throttllem keeper ... --unit`",
        )


def left_locked(keeper: KeeperState, here: Mapping[str, str]) -> Iterator[Finding]:
    """What a dead keeper left locked."""
    if keeper.runs or keeper.socket is SocketState.HIDDEN:
        return
    for uuid, baseline in keeper.left.items():
        goal = f"restored to its baseline, {baseline}" if baseline else "unlocked"
        yield trouble(
            here.get(uuid, uuid),
            f"locked by a keeper that is gone; {uuid} is to be {goal}",
            "start it (`systemctl start throttllem-keeper`), or `throttllem doctor --restore` as root",
        )
