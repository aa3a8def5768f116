"""The journal: which GPUs may be locked now, and to which baseline each is restored.

Knows nothing of leases and of GPUs but their UUIDs.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from throttllem.gpu.clock_range import ClockRange
from throttllem.keeper.log import log

# Why there is a journal
#
# A locked clock outlives the process that locked it, so a keeper that is killed leaves GPUs locked. Whatever it may
# have locked is therefore written down first, and removed only after it was restored. The next keeper reads the
# journal when it starts and restores every GPU in it. An entry too many costs one needless reset; an entry too few
# costs a GPU that stays slow until an operator notices.
#
# There are two copies, on the disk and in /run. Each is replaced as a whole (written to a second file, then renamed)
# and carries a checksum and a number; the copy with the highest number that is intact counts. So a full or broken
# disk, or a kill at any moment, leaves one of them readable.
#
# The file is not forced to the disk (fsync). It has to outlive processes, not boots: a reboot removes the lock together
# with its entry. Entries of another boot are ignored for the same reason.
#
# A copy is one line, "CRC32 [number, boot id, {UUID: [low, high] or null}, true]". An older version wrote three
# elements; it inferred baselines from clocks, so they are read as null.

Baselines = Mapping[str, ClockRange | None]
"""By UUID: the clocks that a GPU is locked to when it is restored; None: they are reset."""


def boot_id() -> str:
    """Names this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def journal_paths(state: Path, socket: Path) -> tuple[Path, Path]:
    """Where the two copies are: in the state folder, and beside the socket."""
    return state / "keeper.journal", socket.with_suffix(".copy")


class Journal:
    """The copies at `paths`; `boot` is that of `boot_id`."""

    def __init__(self, paths: tuple[Path, ...], boot: str) -> None:
        self._paths, self._boot = paths, boot
        self._number = 0

    def read(self) -> dict[str, ClockRange | None]:
        """The newest intact copy: the GPUs to restore, with their baselines. A damaged copy is logged and ignored."""
        newest: dict[str, ClockRange | None] = {}
        for path in filter(Path.exists, self._paths):
            try:
                number, baselines = _parsed(path.read_bytes(), self._boot)
            except (OSError, ValueError, TypeError, AttributeError) as error:
                log.error("journal %s is not used: %s", path, error)
                continue
            if number > self._number:
                self._number, newest = number, baselines
        return newest

    def write(self, baselines: Baselines) -> None:
        """Write both copies. Raises OSError if neither could be written; a single failure is logged."""
        self._number += 1
        body = json.dumps([self._number, self._boot, baselines, True]).encode()
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        errors = []
        for path in self._paths:
            part = path.with_suffix(".part")
            try:
                part.write_bytes(line)
                part.replace(path)
            except OSError as error:
                log.warning("journal %s is not written: %s", path, error)
                errors.append(error)
        if len(errors) == len(self._paths):
            raise OSError(f"no lock without a journal: {errors[0]}")


def _parsed(line: bytes, boot: str) -> tuple[int, dict[str, ClockRange | None]]:
    """Number and baselines of one copy; none if it is of another boot. Raises ValueError, TypeError, AttributeError."""
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    if int(checksum, 16) != zlib.crc32(body):
        raise ValueError("its checksum is wrong")
    number, its_boot, gpus, *stated = json.loads(body)
    if not isinstance(number, int):
        raise TypeError(f"its number is {number!r}")
    if its_boot != boot:
        return number, {}
    return number, {uuid: ClockRange(*clocks) if clocks and stated else None for uuid, clocks in gpus.items()}
