"""GPUs that may be locked, and their baselines, written before they are locked: after a kill the next keeper restores
them.

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
        """GPUs to restore, with their stated baselines (None: reset). Damaged copies are logged and not used. An older
        version inferred what was there before: of its entries only the GPUs count.
        """
        found = dict[str, Lock | None]()
        for path in filter(Path.exists, self._paths):
            try:
                checksum, _, body = path.read_bytes().rstrip(b"\n").partition(b" ")
                if zlib.crc32(body) != int(checksum, 16):
                    raise ValueError("it is torn")
                number, boot, gpus, stated = (*json.loads(body), None)[:4]  # an older version wrote three
                if number > self._number:
                    found = {uuid: stated and lock and Lock(*lock) for uuid, lock in gpus.items() if boot == self._boot}
                    self._number = number
            except (OSError, ValueError, TypeError, AttributeError) as error:
                log.error("journal %s is not used: %s", path, error)
        return found

    def write(self, baselines: Mapping[str, Lock | None]) -> None:
        """Write both copies. Raises OSError if neither could be written; a single failure is logged."""
        self._number += 1
        body, troubles = json.dumps([self._number, self._boot, baselines, True]).encode(), []
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
