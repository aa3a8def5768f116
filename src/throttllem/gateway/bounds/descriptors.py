"""File descriptors of this process: the soft limit raised to the hard one, and the connections that it has room for."""

from __future__ import annotations

import logging
import resource

log = logging.getLogger("throttllem.gateway")

_RESERVE = 96
"""For files, listening sockets, probes of engines, the keeper, and clients that are being refused."""
_OF_A_REQUEST = 2
"""Its client's connection, and one to the engine."""
_ENOUGH = 1 << 20
"""Where the hard limit is none."""


def raise_limit() -> int:
    """Raise the soft limit to the hard one; the limit that holds from now on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH if hard == resource.RLIM_INFINITY else hard
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _ENOUGH if soft == resource.RLIM_INFINITY else soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:  # the kernel's own limit may be lower
        log.warning("the limit of %d open files cannot be raised: %s", soft, error)
        return soft
    return wanted


def fitted(connections: int, limit: int) -> int:
    """The connections that `limit` descriptors have room for, at most `connections`; a warning if they are fewer."""
    room = max(1, (limit - _RESERVE) // _OF_A_REQUEST)
    if room >= connections:
        return connections
    needed = connections * _OF_A_REQUEST + _RESERVE
    log.warning(
        "limits.connections = %d: %d open files have room for %d connections; allow %d (ulimit -Hn, LimitNOFILE=)",
        connections,
        limit,
        room,
        needed,
    )
    return room
