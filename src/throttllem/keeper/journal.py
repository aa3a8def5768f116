"""The journal: which GPUs may be locked now, and to which baseline each is restored.

Knows nothing of leases and of GPUs but their UUIDs.
"""

import contextlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from throttllem.gpu.clock_range import ClockRange
from throttllem.keeper.folder import keep_aside, open_folder, read_file, write_file
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
# A copy that is damaged, or that another user can write to, is not used. What it named is not known then, so the keeper
# restores every GPU that it may set, and the copy stays beside the new one under another name (`.damaged-`, and the
# time of its last change), to find the cause by.
#
# A copy is one line, "CRC32 [number, boot id, {UUID: [low, high] or null}, true]". An older version wrote three
# elements; it inferred baselines from clocks, so they are read as null.

MOST_GPUS = 32
"""More than a host has. Each GPU has a thread, so an absurd number of them would end the keeper at every start."""
_UUID_LETTERS = 80
_MOST = 2**32
"""Numbers are below it: those of copies, and clocks in MHz, which NVML takes as 32 bits."""

Baselines = Mapping[str, ClockRange | None]
"""By UUID: the clocks that a GPU is locked to when it is restored; None: they are reset."""


def boot_id() -> str:
    """Names this boot of the host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()


def journal_paths(state: Path, socket: Path) -> tuple[Path, Path]:
    """Where the two copies are: in the state folder, and beside the socket."""
    return state / "keeper.journal", socket.with_suffix(".copy")


class Journal:
    """The copies at `paths`; `boot` is that of `boot_id`. `damaged`: those that the last `read` found so, and why."""

    def __init__(self, paths: tuple[Path, ...], boot: str) -> None:
        self._paths, self._boot = paths, boot
        self._number = 0
        self.damaged: dict[Path, str] = {}

    def read(self) -> dict[str, ClockRange | None]:
        """The newest intact copy: the GPUs to restore, with their baselines. A damaged copy is logged and ignored."""
        newest: dict[str, ClockRange | None] = {}
        self.damaged = {}
        for path in self._paths:
            try:
                with open_folder(path.parent) as folder:
                    content = read_file(folder, path.name, path)
                number, baselines = _parsed(content, self._boot)
            except FileNotFoundError:
                continue
            except PermissionError as error:
                log.error("the keeper's journal cannot be read: %s: %s", path, error)
                continue
            except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
                log.error("journal %s is not used: %.200s", path, error)
                self.damaged[path] = str(error)
                continue
            if number > self._number:
                self._number, newest = number, baselines
        return newest

    def replace_damaged(self, baselines: Baselines) -> None:
        """Keep the damaged copies under other names, and write these GPUs instead. Failures are logged."""
        for path in self.damaged:
            try:
                with open_folder(path.parent) as folder:
                    log.error("journal %s is kept as %s", path, keep_aside(folder, path.name))
            except OSError as error:
                log.error("journal %s is not kept aside: %s", path, error)
        with contextlib.suppress(OSError):  # logged; what it named is restored all the same
            self.write(baselines)

    def write(self, baselines: Baselines) -> None:
        """Write both copies. Raises OSError if neither could be written; a single failure is logged."""
        self._number += 1
        body = json.dumps([self._number, self._boot, baselines, True]).encode()
        line = b"%08x %s\n" % (zlib.crc32(body), body)
        errors = []
        for path in self._paths:
            try:
                with open_folder(path.parent) as folder:
                    write_file(folder, path.name, line)
            except OSError as error:
                log.warning("journal %s is not written: %s", path, error)
                errors.append(error)
        if len(errors) == len(self._paths):
            raise OSError(f"no lock without a journal: {errors[0]}")


def _parsed(line: bytes, boot: str) -> tuple[int, dict[str, ClockRange | None]]:
    """Number and baselines of one copy; none if it is of another boot. Raises ValueError, TypeError, RecursionError."""
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    if int(checksum, 16) != zlib.crc32(body):
        raise ValueError("its checksum is wrong")
    number, its_boot, gpus, *stated = json.loads(body)
    if type(number) is not int or not 0 < number < _MOST or not isinstance(its_boot, str):
        raise TypeError(f"its number is {number!r:.40}, its boot {its_boot!r:.40}")
    if stated not in ([], [True]) or not isinstance(gpus, dict):
        raise ValueError("it is of another version")
    if its_boot != boot:
        return number, {}
    if len(gpus) > MOST_GPUS:
        raise ValueError(f"it names {len(gpus)} GPUs, more than {MOST_GPUS}")
    return number, {_uuid(uuid): _clocks(clocks) if stated else None for uuid, clocks in gpus.items()}


def _uuid(uuid: str) -> str:
    if not uuid.isascii() or not uuid.isprintable() or not 0 < len(uuid) <= _UUID_LETTERS:
        raise ValueError("it names a GPU that cannot be")
    return uuid


def _clocks(clocks: object) -> ClockRange | None:
    match clocks:
        case None:
            return None
        case [int(low_mhz), int(high_mhz)] if high_mhz < _MOST and not isinstance(low_mhz, bool):
            return ClockRange(low_mhz, high_mhz)
    raise ValueError(f"a baseline is {clocks!r:.40}")
