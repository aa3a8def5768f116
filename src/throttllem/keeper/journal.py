"""What each locked GPU was before, written before it is locked: whoever starts after a kill puts it back.

Two copies, each whole or not there. It is not forced to the disk: what outlives every process but no boot of the host
is just what a lock does, and entries of another boot mean nothing.
"""

import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path

from throttllem.gpu.nvml import Lock

log = logging.getLogger("throttllem.keeper")


def places(state: Path, socket: Path) -> tuple[Path, Path]:
    """Where the copies are."""
    return state / "keeper.journal", socket.with_suffix(".copy")


class Journal:
    """The newest whole copy of `paths` counts. `boot` names this boot of the host."""

    def __init__(self, paths: tuple[Path, ...], boot: str) -> None:
        self._paths, self._boot, self._number = paths, boot, 0

    def read(self) -> dict[str, Lock | None]:
        """What has to be put back; what is broken is said and not used."""
        found = dict[str, Lock | None]()
        for path in filter(Path.exists, self._paths):
            try:
                checksum, _, body = path.read_bytes().rstrip(b"\n").partition(b" ")
                if zlib.crc32(body) != int(checksum, 16):
                    raise ValueError("it is torn")
                number, boot, before = json.loads(body)
                if number > self._number:
                    found = {uuid: lock and Lock(*lock) for uuid, lock in before.items()} if boot == self._boot else {}
                    self._number = number
            except (OSError, ValueError, TypeError, AttributeError) as error:
                log.error("journal %s is not used: %s", path, error)
        return found

    def write(self, before: Mapping[str, Lock | None]) -> None:
        """Write both copies. Raises OSError if neither could be written; one that could not is said."""
        self._number += 1
        body, troubles = json.dumps([self._number, self._boot, before]).encode(), []
        for path in self._paths:
            try:
                aside = path.with_suffix(".part")
                aside.write_bytes(b"%08x %s\n" % (zlib.crc32(body), body))
                aside.replace(path)
            except OSError as error:
                log.warning("journal %s is not written: %s", path, error)
                troubles.append(error)
        if len(troubles) == len(self._paths):
            raise OSError(f"no lock without a journal: {troubles[0]}")
