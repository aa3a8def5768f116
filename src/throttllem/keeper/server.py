"""The keeper's socket: takes connections and answers requests, by the protocol of docs/keeper.md.

Knows nothing of GPUs.
"""

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from throttllem.keeper import systemd
from throttllem.keeper.leases import Lease, Leases, RejectedError
from throttllem.keeper.log import log

# What is read here comes from programs that are not trusted, and the reader is root. Therefore:
#
# - The kernel reports which user connects (SO_PEERCRED). A user that may not connect is disconnected before a byte of
#   it is read.
# - A request is one line of JSON with few fields, each of one type. Anything else disconnects the client, without an
#   answer: there is no state to recover, and nothing is guessed.
# - Lines, connections and unread answers are bounded: a client that does not read is not read from (`drain`).
# - After each line the other tasks run, so that a flood delays no heartbeat and no end of a lease.
#
# A connection has at most one lease, which ends with it.

LINE_BYTES = 4096
CONNECTIONS = 32
CHECK_SOCKET_S = 0.1


class Server:
    """Answers root and the users in `uids`, up to CONNECTIONS at a time."""

    def __init__(self, leases: Leases, uids: frozenset[int]) -> None:
        self._leases, self._uids = leases, uids
        self._open = 0

    async def listen(self, path: Path, stop: asyncio.Event) -> None:
        """Listen at `path` until `stop`. A socket file that was removed or replaced is made again."""
        while not stop.is_set():
            try:
                path.unlink(missing_ok=True)
                with contextlib.closing(await asyncio.start_unix_server(self.serve_client, path, limit=LINE_BYTES)):
                    path.chmod(0o666)  # every user may connect; which ones stay is decided by SO_PEERCRED
                    made_ns = path.stat().st_ctime_ns
                    systemd.notify(systemd.READY)
                    while not stop.is_set() and path.stat().st_ctime_ns == made_ns:
                        await asyncio.sleep(CHECK_SOCKET_S)
            except OSError as error:
                log.warning("no client can connect: %s", error)
            await asyncio.sleep(CHECK_SOCKET_S)

    async def serve_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it ends."""
        pid, uid, _ = struct.unpack(
            "3i", writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        )
        connection = Connection(self._leases, f"process {pid} of user {uid}", reader.at_eof)
        self._open += 1
        try:
            if (uid == 0 or uid in self._uids) and self._open <= CONNECTIONS:
                await connection.serve(reader, writer)
        except (Exception, asyncio.CancelledError) as error:  # whatever it is, it ends only this connection
            log.warning("%s is disconnected: %.200r", connection.client, error)
        finally:
            self._open -= 1
            connection.end_lease("its client disconnected")
            writer.transport.abort()  # a close would keep the socket open until the client has read every answer


@dataclass(slots=True)
class Connection:
    """One client. `disconnected()`: whether it has closed its end."""

    leases: Leases
    client: str
    disconnected: Callable[[], bool]
    lease: Lease | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer requests, in order, until the client disconnects. Raises any exception for what is no request."""
        while line := await reader.readline():
            await asyncio.sleep(0)  # `readline` does not wait while lines are buffered: let the other tasks run
            try:
                answer = {"ok": True, **await self.answer(json.loads(line.decode()))}
            except RejectedError as error:
                answer = {"ok": False, "code": error.code, "error": str(error)}
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()

    async def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Carry out one request; the fields of its answer. Raises RejectedError."""
        leases = self.leases
        match request["op"]:
            case "status":
                return {
                    "allowed": leases.allowed,
                    "normally": leases.baselines,
                    "held": {uuid: {"by": lease.client, "mhz": lease.mhz} for uuid, lease in leases.held.items()},
                    "returning": list(leases.restoring),
                    "before": leases.restore_to,
                }
            case "lease" if self.lease is None:
                gpus = tuple(typed(uuid, str) for uuid in typed(request["gpus"], list))
                ttl_s = float(typed(request["ttl_s"], int, float))
                self.lease = leases.take(gpus, ttl_s, self.client, self.disconnected)
            case "set" if self.lease is not None:
                await leases.set(self.lease, typed(request["mhz"], int))
            case "beat" if self.lease is not None:
                leases.extend(self.lease)
            case "release" if self.lease is not None:
                gpus = self.lease.gpus
                self.end_lease("released by its client")
                await leases.restored(gpus)
            case _:
                raise RejectedError(
                    "malformed", "one lease a connection, then beat, set or release; status at any time"
                )
        return {}

    def end_lease(self, why: str) -> None:
        """End its lease, if it has one."""
        if self.lease is not None:
            self.leases.end(self.lease, why)
            self.lease = None


def typed(value: Any, *types: type) -> Any:
    """A field of a request, unchanged. Raises TypeError if it has another type: unlike isinstance, this takes no bool
    for an int.
    """
    if type(value) not in types:
        raise TypeError(f"{type(value).__name__} instead of {types[-1].__name__}")
    return value
