"""Where schedules are played, one after the other: folders in memory, a port for the engine, the fork server.

The folder of sockets is a small file system, as /run is, where mounting is allowed; it goes with this process.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tools.nvml import build
from tools.nvml.machine import Part, a100
from tools.soak.evidence import Gap
from tools.testbed.fork_server import ForkServer, fork_server
from tools.testbed.private import private_base
from tools.testbed.processes import free_port

MOST_GPUS = 6
SWITCH_MS = (9.0, 26.0)
"""Twice what was measured: no reader may trust a clock that is still switching."""
PULSE_S, GAP_S = 0.02, 0.1
_SMALL_KIB = 64
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x20000, 0x4000, 0x40000, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sandbox:
    """For one schedule at a time. `library` is the folder of the fake NVML; `small`: the folder of sockets can be
    filled.
    """

    folder: Path
    library: Path
    server: ForkServer
    parts: tuple[Part, ...]
    engine_port: int
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
        for path in self.folder.glob("gateway-*"):
            shutil.rmtree(path, ignore_errors=True)
        for log in self.folder.glob("*.log"):
            log.unlink()


@contextmanager
def sandboxes(
    count: int, *, roles: str = "tools.soak.roles", library: Path | None = None, mounts: bool = True, **environment: str
) -> Iterator[list[Sandbox]]:
    """`count` of them, with one fork server. `library`: where the fake NVML is compiled (None: anywhere);
    `mounts`: this thread may have its own, for ever.
    """
    with ExitStack() as stack:
        folder = _folder(stack, private_base())
        built = build.library(library or _folder(stack, None))
        places, small = [folder / str(number) for number in range(count)], mounts and _own_mounts()
        for place in places:
            for each in (place, place / "state", place / "run"):
                each.mkdir()
                each.chmod(0o755)  # other users may come as far as the socket
            small = small and _mounted(place / "run", stack)
        seen = {"LD_LIBRARY_PATH": f"{built}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")}
        server = stack.enter_context(fork_server(roles, environment=seen | environment))
        parts, pulse = a100(MOST_GPUS, switch_ms=SWITCH_MS), Pulse()
        yield [
            Sandbox(
                folder=place,
                library=built,
                server=server,
                parts=parts,
                engine_port=free_port(),
                pulse=pulse,
                small=small,
            )
            for place in places
        ]


def _folder(stack: ExitStack, where: Path | None) -> Path:
    """A new one, which other users may pass through."""
    made = tempfile.TemporaryDirectory(dir=where, prefix="soak-", ignore_cleanup_errors=True)
    folder = Path(stack.enter_context(made))
    folder.chmod(0o755)
    return folder


def _own_mounts() -> bool:
    """Whether this thread and its processes have mounts of their own from now on."""
    c = ctypes.CDLL(None)
    if os.geteuid() != 0 or c.unshare(_CLONE_NEWNS) != 0:
        return False
    return bool(c.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None) == 0)


def _mounted(folder: Path, stack: ExitStack) -> bool:
    c, options = ctypes.CDLL(None), f"size={_SMALL_KIB}k,mode=755".encode()
    if c.mount(b"soak", bytes(folder), b"tmpfs", ctypes.c_ulong(0), options) != 0:
        return False
    stack.callback(c.umount2, bytes(folder), _MNT_DETACH)
    return True


# ---- whether the machine is ours -----------------------------------------------------------------------------


def waited_s() -> float:
    """How long the threads of this process have been ready to run, and had no core."""
    tasks = Path("/proc/self/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[1]) for task in tasks) / 1e9


class Pulse:
    """A task that only sleeps, and notices when it slept too long: then nothing here could act."""

    def __init__(self) -> None:
        self._gaps = deque[Gap](maxlen=1000)

    def gaps(self, since_s: float) -> list[Gap]:
        """Those that ended after this time."""
        return [gap for gap in self._gaps if gap.at_s + gap.lasted_s > since_s]

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            before_s = time.monotonic()
            await asyncio.sleep(PULSE_S)
            lasted_s = time.monotonic() - before_s
            if lasted_s > GAP_S:
                self._gaps.append(Gap(at_s=before_s, lasted_s=lasted_s))
