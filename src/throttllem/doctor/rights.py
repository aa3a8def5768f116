"""Whether this process may set clocks, as far as that can be told without setting one. Knows nothing of GPUs.

NVIDIA's driver asks the kernel for CAP_SYS_ADMIN outside every user namespace (`capable`, not `ns_capable`), not for
user 0: root of a container usually has neither.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path

_CAP_SYS_ADMIN = 21
_WHOLE = ["0", "0", "4294967295"]


def sets_clocks(process: Path = Path("/proc/self")) -> bool:
    """Whether the driver would let this process; it is proven only by trying."""
    return missing_right(process) is None


def missing_right(process: Path = Path("/proc/self")) -> str | None:
    """What is missing, in words; None if nothing is."""
    try:
        status = (process / "status").read_text()
        users = (process / "uid_map").read_text().split()
    except OSError:
        return None if os.geteuid() == 0 else "root"
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    if not int(effective, 16) >> _CAP_SYS_ADMIN & 1:
        return "CAP_SYS_ADMIN, which a container's root usually lacks" if os.geteuid() == 0 else "root"
    return None if users == _WHOLE else "root outside of this user namespace (a rootless container?)"


def who() -> str:
    """ "user 1000 (me)"."""
    uid = os.geteuid()
    try:
        return f"user {uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return f"user {uid}"
