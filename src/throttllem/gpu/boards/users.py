"""Whether an engine runs on the GPUs that are named as its own: by the processes that NVML lists, and by activity.

Reads /proc. Knows nothing of clocks.
"""

# The question and its answers
#
# Joules and clocks of the wrong GPU look like any others. CUDA and NVML number GPUs differently (CUDA_DEVICE_ORDER:
# fastest first; NVML: by bus), and CUDA_VISIBLE_DEVICES renumbers, so `gpus = 0` is easily not the engine's GPU.
#
# An engine's processes are the one that listens on its port, and its descendants; a launcher (mpirun) or a parent that
# is an engine, too, is taken with all its descendants. NVML lists process ids of the host: in a container without the
# host's ids they match nothing. Then, and where the listening process belongs to another user, it cannot be checked.
# A GPU of the engine's processes that is not named, or a named one with other processes alone, is WRONG. Whatever else
# is not RIGHT is UNKNOWN: a warning that may be false would be ignored when it is true.
#
# Activity is independent of processes: a GPU that shows no utilization while its engine has worked for IDLE_S has no
# part in that work.

from __future__ import annotations

import math
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

from throttllem.gpu.nvml import Nvml, NvmlError, NvmlGpu

ENGINES = ("vllm", "sglang", "trtllm", "tritonserver", "text-generation", "lmdeploy", "llama-server", "ollama", "ray::")
"""Words in the command line of an engine's process."""
IDLE_S = 5.0
_LATE_S = 1.0
"""NVML's utilization is that of up to a second before."""
_LAUNCHERS = ("mpirun", "mpiexec", "orted", "prte", "prted", "torchrun")
_LISTENS = "0A"
_ORDER = "CUDA and NVML number GPUs differently (CUDA_DEVICE_ORDER=PCI_BUS_ID makes them agree): name UUIDs"


class Place(Enum):
    """Whether an engine runs on the GPUs that are named."""

    RIGHT = "ok"
    UNKNOWN = "--"
    WRONG = "!!"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The answer, and why."""

    place: Place
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process of this machine. `command`: its command line in lower case, never shown: it may hold secrets."""

    parent: int
    name: str
    command: str = ""

    @property
    def is_engine(self) -> bool:
        """Whether its command line names an engine."""
        return any(engine in self.command for engine in ENGINES)


def placement(nvml: Nvml, uuids: Sequence[str], url: str, proc: Path = Path("/proc")) -> Placement:
    """Whether the engine at `url` runs on these GPUs. Raises nothing: what cannot be read cannot be checked."""
    try:
        numbered = {uuid: number for number, uuid in nvml.gpus().items() if isinstance(uuid, str)}
        used = {number: NvmlGpu(nvml, uuid).processes() for uuid, number in numbered.items()}
    except NvmlError as error:
        return _unknown(str(error))
    processes = read_processes(proc)
    return judge([numbered[uuid] for uuid in uuids if uuid in numbered], used, processes, listener(url, proc), url)


def judge(
    named: Sequence[int],
    used: Mapping[int, tuple[int, ...] | None],
    processes: Mapping[int, Process],
    listening: int | None,
    url: str,
) -> Placement:
    """`named`: the engine's GPUs by number. `used`: of every GPU here, the processes on it (None: not listed).
    `processes`: those that can be seen. `listening`: the one that answers at `url`; None: it cannot be seen.
    """
    if any(used.get(number) is None for number in named):
        return _unknown("NVML does not list processes here")
    on = {number: set(pids) for number, pids in used.items() if pids is not None}
    if listening is None:
        return _by_occupation(named, on, processes, url)
    family = _family(listening, processes)
    without = [number for number in named if not on[number] & family]
    beside = [number for number in on if number not in named and on[number] & family]
    who = f"the engine at {url} (process {listening}, {processes[listening].name})"
    if beside:
        missing = f", and not on {_gpus(without)}" if without else ""
        return _wrong(f"{who} computes on {_gpus(beside)}, which is not among its `gpus`{missing}")
    if not without:
        return Placement(place=Place.RIGHT, text=f"{who} computes on {_gpus(named)}")
    others = {pid for number in without for pid in on[number]}
    if others and all(pid in processes and not processes[pid].is_engine for pid in others):
        are = ", ".join(f"process {pid} ({processes[pid].name})" for pid in sorted(others))
        return _wrong(f"{who} does not compute on {_gpus(without)}; {are} does")
    if others:
        return _unknown(f"on {_gpus(without)} compute processes that cannot be matched with {who}: another container?")
    return _unknown(f"NVML lists no process on {_gpus(without)}: {who} is not there yet, or is in a container")


def _by_occupation(
    named: Sequence[int], on: Mapping[int, set[int]], processes: Mapping[int, Process], url: str
) -> Placement:
    """Without the engine's process: whether named GPUs are free while others are not."""
    free, busy = [number for number in named if not on[number]], [n for n in on if n not in named and on[n]]
    if free and busy:
        pids = sorted(pid for number in busy for pid in on[number])
        are = ", ".join(f"process {pid}" + (f" ({processes[pid].name})" if pid in processes else "") for pid in pids)
        return _wrong(f"no process computes on {_gpus(free)}, and {are} on {_gpus(busy)}, not among `gpus`")
    return _unknown(
        f"the process that listens at {url} cannot be seen (not started, or of another user, container or machine)"
    )


def _family(root: int, processes: Mapping[int, Process]) -> set[int]:
    """A process, its descendants, and those of a launcher or an engine above it."""
    while (parent := processes.get(processes[root].parent)) and (parent.is_engine or parent.name in _LAUNCHERS):
        root = processes[root].parent
    family, found = set[int](), {root}
    while found:
        family |= found
        found = {pid for pid, process in processes.items() if process.parent in found} - family
    return family


def _gpus(numbers: Iterable[int]) -> str:
    listed = [str(number) for number in numbers]
    return f"GPU {listed[0]}" if len(listed) == 1 else f"GPUs {', '.join(listed)}"


def _wrong(text: str) -> Placement:
    return Placement(place=Place.WRONG, text=f"{text}: joules and clocks are those of the wrong GPU; {_ORDER}")


def _unknown(why: str) -> Placement:
    return Placement(place=Place.UNKNOWN, text=f"whether the engine runs on these GPUs cannot be checked: {why}")


# ---- /proc -------------------------------------------------------------------------------------------------------


def read_processes(proc: Path) -> dict[int, Process]:
    """The processes that this one can see."""
    found = {}
    for folder in proc.iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            stat = (folder / "stat").read_text(errors="replace")
            command = (folder / "cmdline").read_bytes().decode(errors="replace").lower()
        except OSError:  # it has ended
            continue
        name, _, rest = stat[stat.index("(") + 1 :].rpartition(")")
        found[int(folder.name)] = Process(parent=int(rest.split()[1]), name=name, command=command)
    return found


def listener(url: str, proc: Path = Path("/proc")) -> int | None:
    """The process that listens at `url`; None: it cannot be seen, or is on another machine."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not _is_here(parts.hostname or ""):
        return None
    sockets = {f"socket:[{inode}]" for inode in _listening(port, proc)}
    for folder in proc.iterdir() if sockets else ():
        if folder.name.isdecimal() and _holds(folder / "fd", sockets):
            return int(folder.name)
    return None


def _is_here(host: str) -> bool:
    """Whether an address of this machine has that name: only those can be bound."""
    try:
        for family, kind, _, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind) as tried:
                tried.bind(address)
            return True
    except OSError:
        return False
    return False


def _listening(port: int, proc: Path) -> Iterable[str]:
    """Inodes of the sockets that listen on a TCP port."""
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (proc / table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if columns[3] == _LISTENS and int(columns[1].rpartition(":")[2], 16) == port:
                yield columns[9]


def _holds(folder: Path, sockets: set[str]) -> bool:
    """Whether one of the open files in /proc/PID/fd is one of these sockets."""
    try:
        names = list(folder.iterdir())
    except OSError:  # another user's
        return False
    for name in names:
        try:
            if str(name.readlink()) in sockets:
                return True
        except OSError:
            continue
    return False


# ---- activity ----------------------------------------------------------------------------------------------------


class Activity:
    """Whether GPUs are busy while their engine works. Times are of one clock, in seconds."""

    def __init__(self, gpus: int) -> None:
        self._busy_s = [-math.inf] * gpus
        """When each GPU was last seen busy."""
        self._idle_s = [0.0] * gpus
        """For how long the engine has worked since then."""

    def saw(self, now_s: float, busy: Sequence[bool | None]) -> None:
        """A reading. None: the GPU does not report its utilization, so that nothing can be concluded."""
        for place, is_busy in enumerate(busy):
            if is_busy is not False:
                self._busy_s[place], self._idle_s[place] = now_s, 0.0

    def worked(self, now_s: float, seconds: float) -> None:
        """The engine has worked for that long until now; work may be reported when it is over."""
        for place, busy_s in enumerate(self._busy_s):
            if busy_s < now_s - seconds - _LATE_S:
                self._idle_s[place] += seconds

    def idle(self) -> int | None:
        """The place of a GPU that was idle all the time while the engine worked; None: there is none."""
        return next((place for place, idle_s in enumerate(self._idle_s) if idle_s >= IDLE_S), None)
