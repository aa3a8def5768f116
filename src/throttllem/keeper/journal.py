"""What each locked GPU was before, on disk before it is locked: whoever starts after a kill puts it back.

Two copies, each whole or not there. Locks do not outlive the host's boot: entries of another boot mean nothing.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path

from throttllem.gpu.nvml import Lock


class Journal:
    """The newest whole copy of `paths` counts. `boot` names this boot of the host."""

    def __init__(self, paths: tuple[Path, ...], boot: str) -> None:
        self._paths, self._boot, self._number = paths, boot, 0

    def read(self) -> tuple[dict[str, Lock | None], list[str]]:
        """What has to be put back, and what was found broken, in words."""
        found, troubles = dict[str, Lock | None](), []
        for path in self._paths:
            try:
                checksum, _, body = path.read_bytes().rstrip(b"\n").partition(b" ")
                if zlib.crc32(body) != int(checksum, 16):
                    raise ValueError("it is torn")
                number, boot, before = json.loads(body)
                if number > self._number:
                    found = {uuid: lock and Lock(*lock) for uuid, lock in before.items()} if boot == self._boot else {}
                    self._number = number
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, AttributeError) as error:
                troubles.append(f"{path} is not used: {error}")
        return found, troubles

    def write(self, before: Mapping[str, Lock | None]) -> list[str]:
        """Write both copies; what went wrong with one. Raises OSError if neither could be written."""
        self._number += 1
        body, troubles = json.dumps([self._number, self._boot, before]).encode(), []
        for path in self._paths:
            try:
                _replace(path, b"%08x %s\n" % (zlib.crc32(body), body))
            except OSError as error:
                troubles.append(f"{path}: {error.strerror}")
        if len(troubles) == len(self._paths):
            raise OSError(f"no lock without a journal: {'; '.join(troubles)}")
        return troubles


def _replace(path: Path, text: bytes) -> None:
    aside = path.with_suffix(".part")
    with aside.open("wb", buffering=0) as file:
        if file.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    aside.replace(path)
