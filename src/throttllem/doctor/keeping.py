"""The keeper of this machine: whether it runs and lets this user in, what it holds, what a dead one left behind.

Asks through its socket and reads its journal; changes nothing.
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
from throttllem.gpu.keeper_client import KeeperError, keeper_status
from throttllem.gpu.nvml import Lock
from throttllem.keeper.__main__ import BOOT
from throttllem.keeper.journal import Journal, log, places


class Door(StrEnum):
    """What the keeper's socket is like."""

    OPEN = "answers this user"
    SHUT = "lets this user not in, or has no place left"
    SILENT = "does not answer"
    DEAD = "has nobody behind it"
    ABSENT = "is not there"
    HIDDEN = "is in a folder that this user cannot enter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeper:
    """What is known of it. `left`: by its journal, GPUs that it has locked or may have, and their baselines."""

    socket: Path
    door: Door
    status: Mapping[str, Any] = field(default_factory=dict)
    left: Mapping[str, Lock | None] = field(default_factory=dict)
    troubles: tuple[str, ...] = ()

    @property
    def runs(self) -> bool:
        """As far as the socket tells."""
        return self.door in (Door.OPEN, Door.SHUT, Door.SILENT)

    def range_of(self, uuid: str) -> tuple[int, int] | None:
        """What may be set through it, by this user."""
        low_high = self.status.get("allowed", {}).get(uuid)
        return None if low_high is None else (int(low_high[0]), int(low_high[1]))

    def holder_of(self, uuid: str) -> str | None:
        """Who holds it now."""
        held = self.status.get("held", {}).get(uuid)
        return None if held is None else str(held["by"])

    def set_mhz(self, uuid: str) -> int | None:
        """What its holder has set it to."""
        mhz = self.status.get("held", {}).get(uuid, {}).get("mhz")
        return None if mhz is None else int(mhz)

    def returning(self, uuid: str) -> bool:
        """Whether it is being restored, and is not yet."""
        return uuid in self.status.get("returning", ())


class Listener(logging.Handler):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.words.append(record.getMessage())


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the keeper's own code says meanwhile: it is told as findings, and nowhere else."""
    handler = Listener()
    log.addHandler(handler)
    try:
        yield handler.words
    finally:
        log.removeHandler(handler)


def journal_of(state: Path, socket: Path) -> Journal:
    """The keeper's, in its two copies."""
    return Journal(places(state, socket), BOOT.read_text(encoding="utf-8").strip())


def ask_keeper(state: Path, socket: Path) -> Keeper:
    """Within about 2 s."""
    with heard() as troubles:
        try:
            left = journal_of(state, socket).read()
        except OSError as error:  # a folder that this user may not enter
            left = {}
            troubles.append(f"the keeper's journal cannot be read: {error}")
    try:
        status = asyncio.run(keeper_status(socket))
    except KeeperError as error:
        return Keeper(socket=socket, door=_door(error), left=left, troubles=tuple(troubles))
    return Keeper(socket=socket, door=Door.OPEN, status=status, left=left, troubles=tuple(troubles))


def _door(error: KeeperError) -> Door:
    match error.__cause__:
        case FileNotFoundError() | NotADirectoryError():
            return Door.ABSENT
        case PermissionError():
            return Door.HIDDEN
        case ConnectionRefusedError():
            return Door.DEAD
        case TimeoutError():
            return Door.SILENT
        case _:
            return Door.SHUT


def keeper_findings(keeper: Keeper, here: Mapping[str, str] | None, who: str) -> Iterator[Finding]:
    """Of the keeper itself; `here`: how the GPUs of this machine are called, by UUID (None: not all can be told)."""
    match keeper.door:
        case Door.OPEN:
            yield ok("keeper", f"runs, and {keeper.socket} answers {who}")
        case Door.SHUT:
            remedy = f"start it with `--user` for {who}, or look who holds its places: `throttllem doctor` as root"
            yield trouble("keeper", f"runs; {keeper.socket} lets {who} not in, or has no place left", remedy)
        case Door.SILENT:
            remedy = "`journalctl -u throttllem-keeper` tells why; systemd restarts one that hangs within 2 s"
            yield trouble("keeper", f"{keeper.socket} does not answer", remedy)
        case Door.HIDDEN:
            yield trouble("keeper", f"{keeper.socket}: {who} may not enter its folder", "give the folder mode 0755")
        case Door.DEAD | Door.ABSENT:
            remedy = (
                "clocks are only advised without one; `throttllem keeper --gpu UUID=MHZ-MHZ --user NAME --unit` "
                "prints its service (docs/keeper.md)"
            )
            yield note("keeper", f"none runs: {keeper.socket} {keeper.door}", remedy)
    yield from _socket(keeper)
    for trouble_text in keeper.troubles:
        yield note("journal", trouble_text)
    for uuid in keeper.status.get("allowed", ()):
        if here is not None and uuid not in here:
            yield trouble("keeper", f"may set {uuid}, which is not here", "take it out of the service's options")


def _socket(keeper: Keeper) -> Iterator[Finding]:
    """What is odd about the file and its folder; whoever can write there can stand in for the keeper."""
    try:
        file, folder = keeper.socket.lstat(), keeper.socket.parent.stat()
    except OSError:
        return
    if keeper.runs and file.st_mode & 0o006 != 0o006:
        yield trouble(
            "keeper", f"{keeper.socket} has mode {stat.S_IMODE(file.st_mode):04o}", "restart it: it sets 0666"
        )
    if folder.st_uid or folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        yield note(
            "keeper",
            f"others than root can write in {keeper.socket.parent}, and so could pose as the keeper",
            "let systemd make the folder: `throttllem keeper ... --unit`",
        )


def left_behind(keeper: Keeper, here: Mapping[str, str]) -> Iterator[Finding]:
    """What a dead keeper left locked."""
    if keeper.runs or keeper.door is Door.HIDDEN:
        return
    for uuid, baseline in keeper.left.items():
        goal = f"restored to its baseline, {baseline[0]} to {baseline[1]} MHz" if baseline else "unlocked"
        yield trouble(
            here.get(uuid, uuid),
            f"locked by a keeper that is gone; {uuid} is to be {goal}",
            "start it (`systemctl start throttllem-keeper`), or `throttllem doctor --restore` as root",
        )
