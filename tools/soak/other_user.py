"""A process of another user, whom the keeper does not serve: it asks for everything and reports the answers."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from tools.testbed.fork_server import Order

NOBODY = 65534
_WAIT_S = 1.0


def run(order: Order) -> None:
    """Ask for what may be known and for what may be done. "socket" is a path, "gpus" are UUIDs. What came of it goes
    to "control".
    """
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    lease = {"op": "lease", "gpus": order["gpus"], "ttl_s": 1.0}
    came = [_ask(Path(order["socket"]), asks) for asks in ([{"op": "status"}], [lease, {"op": "set", "mhz": 1005}])]
    word = {"came_in": None not in came, "answers": [it for it in came if it]}
    order["control"].sendall(json.dumps(word).encode() + b"\n")


def _ask(path: Path, asks: list[dict[str, Any]]) -> str | None:
    """The answer, "" if there was none; None: it could not connect."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as talk:
        talk.settimeout(_WAIT_S)
        try:
            talk.connect(str(path))
        except OSError:
            return None
        try:
            talk.sendall(b"".join(json.dumps(ask).encode() + b"\n" for ask in asks))
            return talk.recv(4096).decode(errors="replace")
        except OSError:
            return ""
