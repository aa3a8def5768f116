"""Finds out whether this process may set clocks, without setting one. Knows nothing of GPUs.

NVIDIA's driver checks CAP_SYS_ADMIN outside every user namespace (the kernel's `capable`, not `ns_capable`), not user
0: root in a container usually has neither.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

_CAP_SYS_ADMIN = 21
_HOST_UID_MAP = ["0", "0", "4294967295"]


def sets_clocks(process: Path = Path("/proc/self")) -> bool:
    """Whether the driver would let this process set clocks; only trying proves it."""
    return missing_right(process) is None


def missing_right(process: Path = Path("/proc/self")) -> str | None:
    """The right that is missing; None: it may set clocks."""
    try:
        status = (process / "status").read_text()
        uid_map = (process / "uid_map").read_text().split()
    except OSError:
        return None if os.geteuid() == 0 else "root"
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    if not int(effective, 16) >> _CAP_SYS_ADMIN & 1:
        return "CAP_SYS_ADMIN, which a container's root usually lacks" if os.geteuid() == 0 else "root"
    return None if uid_map == _HOST_UID_MAP else "root outside of this user namespace (a rootless container?)"


def this_user() -> str:
    """ "user 1000 (me)"."""
    uid = os.geteuid()
    try:
        return f"user {uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return f"user {uid}"
