"""The keeper's command line and its systemd unit, checked before a root process starts with them.

The unit gives away what the keeper does not need. What it cannot give away: user root with CAP_SYS_ADMIN, the one thing
that NVIDIA's driver asks of whoever sets a clock (`NV_IS_SUSER` of its kernel module), and the driver's device files.
"""

from __future__ import annotations

import pwd
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pynvml

import throttllem
from throttllem.keeper.options import parse_gpu

PROGRAM = ("-I", "-m", "throttllem.keeper")
"""Isolated: neither the environment nor the folder that it is started in says what a root process imports."""
STATE = Path("/var/lib/throttllem")
RUN, LIB = Path("/run"), Path("/var/lib")
HOMES = (Path("/home"), Path("/root"), RUN / "user")

_CLOCKS = "UUID=LOWEST-HIGHEST"
_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""As NVML writes it: what is written otherwise names no GPU."""

_UNIT = """\
# throttllem's keeper of clocks: /etc/systemd/system/throttllem-keeper.service
# Made by `throttllem keeper --unit`; docs/keeper.md says what for.
{warnings}[Unit]
Description=throttllem's keeper: leases GPU clocks and restores them
After=systemd-modules-load.service nvidia-persistenced.service
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
# Whatever ends it, the next one restores what it left locked: within 2 s of its death or its silence.
Restart=always
RestartSec=100ms
WatchdogSec=750ms
TimeoutStopSec=8s
OOMScoreAdjust=-900
CPUWeight=1000

# What it may write, and `throttllem doctor` may read.
{folders}UMask=0022
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes

# NVIDIA's driver asks for CAP_SYS_ADMIN, not for user 0, when a clock is set. Nothing else of root is left.
CapabilityBoundingSet=CAP_SYS_ADMIN
AmbientCapabilities=
NoNewPrivileges=yes
DevicePolicy=closed
DeviceAllow=/dev/nvidiactl rw
DeviceAllow=char-nvidia rw
DeviceAllow=char-nvidiactl rw
DeviceAllow=char-nvidia-frontend rw

# It talks to one Unix socket of its own, and to systemd.
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
IPAddressDeny=any

# A process of its own that makes no other and leaves the host alone. ProcSubset is not pid: NVML reads /proc/driver.
SystemCallFilter=@system-service
SystemCallFilter=~@resources @privileged
SystemCallErrorNumber=EPERM
SystemCallArchitectures=native
MemoryDenyWriteExecute=yes
LockPersonality=yes
KeyringMode=private
PrivateMounts=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LimitCORE=0
LimitNOFILE=1024
MemoryMax=256M
MemorySwapMax=0
TasksMax=64

[Install]
WantedBy=multi-user.target
"""


def user_id(name: str) -> str:
    """Its number: the keeper looks nobody up, and the network, where users may be listed, is kept from it."""
    try:
        return name if name.isdecimal() else str(pwd.getpwnam(name).pw_uid)
    except KeyError as error:
        raise ValueError(f"--user {name}: there is no such user here; make it first, or give a number") from error


def unit_text(command: Sequence[str], socket: Path, state: Path, warnings: Sequence[str] = ()) -> str:
    """The unit of a keeper that is started so. Raises ValueError where it could not be kept to two folders."""
    folders = f"RuntimeDirectory={_below(RUN, socket.parent, '--socket', socket)}\nRuntimeDirectoryPreserve=yes\n"
    folders += f"StateDirectory={_below(LIB, state, '--state', state)}\n"
    homely = any(path.is_relative_to(home) for path in _imported() for home in HOMES)
    return _UNIT.format(
        command=" ".join(map(_quoted, command)),
        folders=folders,
        home="read-only" if homely else "yes",
        warnings="".join(f"# !! {warning}\n" for warning in warnings),
    )


def not_roots(paths: Sequence[Path] | None = None) -> Iterator[str]:
    """Where somebody else than root could change what the keeper runs, in words."""
    for place in _of_others(paths or _imported()):
        yield f"{place} is not root's alone: who may write there becomes root; install into a folder of root's"


def loose(*folders: Path) -> Iterator[str]:
    """Where somebody else than root could take away what the keeper writes, in words; they may not be there yet."""
    there = [
        next(place for place in (folder, *folder.parents) if place.exists()) for folder in map(Path.absolute, folders)
    ]
    for place in _of_others(there):
        yield f"{place} is not root's alone: who may write there can take journal and socket away; choose other folders"


def _of_others(paths: Sequence[Path]) -> Iterator[Path]:
    """Of these and what is above them, what others than root may write to."""
    for place in dict.fromkeys(place for path in paths for place in (path, *path.parents)):
        found = place.stat()
        open_to_all = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
        if found.st_uid or open_to_all:
            yield place


def _imported() -> tuple[Path, ...]:
    """What a root process will run: the interpreter, its environment, this package, NVML's bindings."""
    files = (sys.executable, sys.prefix, *throttllem.__path__, pynvml.__file__)
    return tuple({form for file in files for form in (Path(file), Path(file).resolve())})


def check_options(options: Sequence[tuple[str, str]]) -> None:
    """A mistake shows here, not when the service is started. Raises ValueError."""
    named: dict[str, set[str]] = {"--gpu": set(), "--normally": set()}
    for option, text in options:
        if option in named:
            uuid = _uuid(option, text)
            if uuid in named[option]:
                raise ValueError(f"{option} {text}: {uuid} has a range already; give each GPU one {option}")
            named[option].add(uuid)
    if strays := sorted(named["--normally"] - named["--gpu"]):
        raise ValueError(
            f"--normally {strays[0]}=...: the keeper may not set that GPU; name it by --gpu, too, or not here"
        )


def _uuid(option: str, text: str) -> str:
    """The GPU of an option. Raises ValueError where it is none, or has no range."""
    try:
        uuid, _ = parse_gpu(text)
    except ValueError as error:
        raise ValueError(f"{option} {text}: must be {_CLOCKS} in MHz, as in GPU-...=600-1410") from error
    if not _UUID.fullmatch(uuid):
        raise ValueError(
            f"{option} {text}: {uuid!r} is no UUID of a GPU (GPU-, then 8-4-4-4-12 of 0-9 and a-f); "
            "`throttllem doctor` shows those that are here"
        )
    return uuid


def _below(root: Path, folder: Path, option: str, value: Path) -> str:
    """The folder as systemd wants it, which makes it as root's."""
    if folder == root or not folder.is_relative_to(root) or ".." in folder.parts or not _plain(folder):
        raise ValueError(
            f"{option} {value}: in a unit it must be in a folder of its own under {root}: systemd makes it"
        )
    return str(folder.relative_to(root))


def _plain(path: Path) -> bool:
    return all(letter.isalnum() or letter in "/-_.@" for letter in str(path))


def _quoted(word: str) -> str:
    """For ExecStart=, whose % and $ mean something and whose words end at a space."""
    if any(ord(letter) < 32 for letter in word):
        raise ValueError(f"{word!r}: no control characters in a unit")
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"' if not word or any(letter in word for letter in " '\"\\;") else word
