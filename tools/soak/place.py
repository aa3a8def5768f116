"""Where one lane plays: its folders, the compiled NVML, the process that forks; and whether the lane itself runs.

The folder of sockets is a small file system of its own, as /run is, where mounting is allowed; it goes with the lane.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

from tools.nvml.machine import Part, a100
from tools.soak.evidence import Gap
from tools.soak.zygote import Zygote

MOST_GPUS = 6
PULSE_S, GAP_S = 0.02, 0.1
SWITCH_MS = (9.0, 26.0)
"""Twice what was measured."""
BOOST_MHZ = 1260
"""Every second card stays at this clock under load without a lock, as GeForce does: that is no lock to restore."""
_SMALL_KIB = 64
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 0x4000, 0x40000, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """All that schedules of a lane have in common. `small`: the folder of sockets can be filled."""

    folder: Path
    library: Path
    zygote: Zygote
    parts: tuple[Part, ...]
    pulse: Pulse
    small: bool

    @property
    def state(self) -> Path:
        """The keeper's, with one copy of the journal."""
        return self.folder / "state"

    @property
    def run(self) -> Path:
        """Of sockets, with the other copy."""
        return self.folder / "run"

    def clear(self) -> None:
        """As it was before the last schedule."""
        for folder in (self.state, self.run):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for log in self.folder.glob("*.log"):
            log.unlink()

    def end(self) -> None:
        """Nothing of it runs or is mounted any more."""
        self.zygote.end()
        if self.small:
            ctypes.CDLL(None).umount2(bytes(self.run), _MNT_DETACH)


def make_place(folder: Path, library: Path) -> Place:
    """A new place in a folder that is there; forks, so that there must be no other thread yet."""
    folder.chmod(0o755)  # other users may come as far as the socket
    for name in ("state", "run"):
        (folder / name).mkdir()
        (folder / name).chmod(0o755)
    small = _small(folder / "run")
    parts = a100(MOST_GPUS, switch_ms=SWITCH_MS)
    return Place(
        folder=folder,
        library=library,
        zygote=Zygote.start(),
        parts=tuple(replace(part, boost_mhz=BOOST_MHZ if index % 2 else None) for index, part in enumerate(parts)),
        pulse=Pulse(),
        small=small,
    )


def _small(folder: Path) -> bool:
    """Mount a small file system, for this process and its children only."""
    c = ctypes.CDLL(None)
    if os.geteuid() != 0 or c.unshare(_CLONE_NEWNS) != 0:
        return False
    if c.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None) != 0:
        return False
    options = f"size={_SMALL_KIB}k,mode=755".encode()
    return bool(c.mount(b"soak", bytes(folder), b"tmpfs", ctypes.c_ulong(0), options) == 0)


def waited_s() -> float:
    """So long the threads of this process have been ready to run, and had no core."""
    tasks = Path("/proc/self/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[1]) for task in tasks) / 1e9


class Pulse:
    """A thread that only sleeps, and notices when it slept too long: then nobody here had the machine."""

    def __init__(self) -> None:
        self._gaps = deque[Gap](maxlen=1000)
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """From now on."""
        self._thread.start()

    def gaps(self, since_s: float) -> list[Gap]:
        """That ended after this time."""
        return [gap for gap in list(self._gaps) if gap.at_s + gap.lasted_s > since_s]

    def _run(self) -> None:
        while True:
            before_s = time.monotonic()
            time.sleep(PULSE_S)
            lasted_s = time.monotonic() - before_s
            if lasted_s > GAP_S:
                self._gaps.append(Gap(at_s=before_s, lasted_s=lasted_s))
