"""Another user's process, which the keeper has not been told to let in: it asks for everything and says what it got."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

NOBODY = 65534
_WAIT_S = 1.0


def run(told: dict[str, Any]) -> None:
    """Ask for what may be known and for what may be done. `told`: "socket", a path, "gpus", UUIDs. What came of it goes
    to "control".
    """
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    lease = {"op": "lease", "gpus": told["gpus"], "ttl_s": 1.0}
    came = [_ask(Path(told["socket"]), asks) for asks in ([{"op": "status"}], [lease, {"op": "set", "mhz": 1005}])]
    word = {"came_in": None not in came, "answers": [it for it in came if it]}
    told["control"].sendall(json.dumps(word).encode() + b"\n")


def _ask(path: Path, asks: list[dict[str, Any]]) -> str | None:
    """The answer, "" if there was none; None: it could not even knock."""
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
