"""The keeper's systemd unit and the checks of its options, made before a root process starts. Not loaded by it.

The unit drops every right that the keeper does not need. It needs user root with CAP_SYS_ADMIN, which NVIDIA's driver
requires of a process that sets a clock (`NV_IS_SUSER` of its kernel module), and the driver's device files.
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
"""Isolated: neither the environment nor the current folder decides what a root process imports."""
STATE = Path("/var/lib/throttllem")
RUN, LIB = Path("/run"), Path("/var/lib")
HOMES = (Path("/home"), Path("/root"), RUN / "user")

_CLOCKS = "UUID=LOWEST-HIGHEST"
_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""As NVML writes it; no GPU is found by any other spelling."""

_UNIT = """\
# throttllem's keeper: /etc/systemd/system/throttllem-keeper.service
# Made by `throttllem keeper --unit`; see docs/keeper.md.
{warnings}[Unit]
Description=throttllem's keeper: leases GPU clocks and restores them
After=systemd-modules-load.service nvidia-persistenced.service
StartLimitIntervalSec=0

[Service]
Type=notify
NotifyAccess=main
ExecStart={command}
# Whatever ends the keeper, or stops its reports to the watchdog: the next one restores the GPUs within 2 s.
Restart=always
RestartSec=100ms
WatchdogSec=750ms
TimeoutStopSec=8s
OOMScoreAdjust=-900
CPUWeight=1000

# The folders that it may write to, and `throttllem doctor` may read.
{folders}UMask=0022
ProtectSystem=strict
ProtectHome={home}
PrivateTmp=yes

# NVIDIA's driver requires CAP_SYS_ADMIN, not user 0, to set a clock. Every other right of root is dropped.
CapabilityBoundingSet=CAP_SYS_ADMIN
AmbientCapabilities=
NoNewPrivileges=yes
DevicePolicy=closed
DeviceAllow=/dev/nvidiactl rw
DeviceAllow=char-nvidia rw
DeviceAllow=char-nvidiactl rw
DeviceAllow=char-nvidia-frontend rw

# It uses one Unix socket, and that of systemd.
PrivateNetwork=yes
RestrictAddressFamilies=AF_UNIX
IPAddressDeny=any

# It starts no other process and changes nothing on the host. ProcSubset is not pid: NVML reads /proc/driver.
SystemCallFilter=@system-service
SystemCallFilter=~@resources @privileged
SystemCallErrorNumber=EPERM
SystemCallArchitectures=native
MemoryDenyWriteExecute=yes
LockPersonality=yes
KeyringMode=private
PrivateIPC=yes
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
LimitNOFILE=4096
MemoryMax=256M
MemorySwapMax=0
TasksMax=64

[Install]
WantedBy=multi-user.target
"""


def user_id(name: str) -> str:
    """The number of a user: the keeper itself looks up no names, which may need the network. Raises ValueError."""
    try:
        return name if name.isdecimal() else str(pwd.getpwnam(name).pw_uid)
    except KeyError as error:
        raise ValueError(f"--user {name}: there is no such user here; create it first, or give a number") from error


def unit_text(command: Sequence[str], socket: Path, state: Path, warnings: Sequence[str] = ()) -> str:
    """The unit of a keeper with this command. Raises ValueError where it could not be confined to its two folders."""
    folders = f"RuntimeDirectory={_below(RUN, socket.parent, '--socket', socket)}\nRuntimeDirectoryPreserve=yes\n"
    folders += f"StateDirectory={_below(LIB, state, '--state', state)}\n"
    in_home = any(path.is_relative_to(home) for path in _program_paths() for home in HOMES)
    return _UNIT.format(
        command=" ".join(map(_quoted, command)),
        folders=folders,
        home="read-only" if in_home else "yes",
        warnings="".join(f"# !! {warning}\n" for warning in warnings),
    )


def program_warnings(paths: Sequence[Path] | None = None) -> Iterator[str]:
    """One for each file or folder where another user than root could change what the keeper runs."""
    below = paths or _program_paths()
    for path in dict.fromkeys(each for leaf in below for each in (leaf, *leaf.parents)):
        found = path.stat()
        if found.st_uid or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):  # sticky, too: modules can be added there
            why = "can be changed by other users than root, who so become root"
            yield f"{path} {why}; install where only root can write"


def _program_paths() -> tuple[Path, ...]:
    """What the root process will run: the interpreter, its environment, this package, NVML's bindings."""
    files = (sys.executable, sys.prefix, *throttllem.__path__, pynvml.__file__)
    return tuple({form for file in files for form in (Path(file), Path(file).resolve())})


def check_options(options: Sequence[tuple[str, str]]) -> None:
    """Raises ValueError for a mistake, which so shows before the service is started."""
    named: dict[str, set[str]] = {"--gpu": set(), "--normally": set()}
    for option, text in options:
        if option in named:
            uuid = _uuid(option, text)
            if uuid in named[option]:
                raise ValueError(f"{option} {text}: {uuid} has a range already; give each GPU one {option}")
            named[option].add(uuid)
    if unknown := sorted(named["--normally"] - named["--gpu"]):
        raise ValueError(
            f"--normally {unknown[0]}=...: the keeper may not set that GPU; name it by --gpu, too, or not here"
        )


def _uuid(option: str, text: str) -> str:
    """The GPU of an option. Raises ValueError if it is no UUID, or has no range."""
    try:
        uuid, _ = parse_gpu(text)
    except ValueError as error:
        raise ValueError(f"{option} {text}: must be {_CLOCKS} in MHz, as in GPU-...=600-1410") from error
    if not _UUID.fullmatch(uuid):
        raise ValueError(
            f"{option} {text}: {uuid!r} is not the UUID of a GPU (GPU-, then 8-4-4-4-12 of 0-9 and a-f); "
            "`throttllem doctor` shows the UUIDs of this host"
        )
    return uuid


def _below(root: Path, folder: Path, option: str, value: Path) -> str:
    """The folder relative to `root`, as systemd takes it, which creates it. Raises ValueError."""
    if folder == root or not folder.is_relative_to(root) or ".." in folder.parts or not _plain(folder):
        raise ValueError(
            f"{option} {value}: in a unit it must be in its own folder under {root}, which systemd creates"
        )
    return str(folder.relative_to(root))


def _plain(path: Path) -> bool:
    return all(letter.isalnum() or letter in "/-_.@" for letter in str(path))


def _quoted(word: str) -> str:
    """A word of ExecStart=, where %, $, quotes and spaces have a meaning. Raises ValueError."""
    if any(ord(letter) < 32 for letter in word):
        raise ValueError(f"{word!r}: control characters are not allowed in a unit")
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{word}"' if not word or any(letter in word for letter in " '\"\\;") else word
