"""The keeper's socket: takes connections and answers requests, by the protocol of docs/keeper.md.

Knows nothing of GPUs.
"""

import asyncio
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
# - Each user that may connect has CONNECTIONS places, and so has root: no user can keep another one out. A user that
#   may not connect takes no place.
# - Lines, connections and unread answers are bounded, in size and in time: a client that does not read is not read from
#   (`drain`), and a connection without a whole line for IDLE_S ends.
# - After ACCEPTED_AT_ONCE connections, and after each line, the other tasks run, so that a flood delays no heartbeat
#   and no end of a lease. The connections that wait to be accepted wait in the kernel, where all users share one queue;
#   a client that finds it full (EAGAIN) tries again.
#
# A connection has at most one lease, which ends with it.

LINE_BYTES = 4096
CONNECTIONS = 32
"""Of each user."""
IDLE_S = 60.0
"""The longest time for one line to come, or for one answer to be taken."""
WAITING = 4096
"""Connections that wait to be accepted; the kernel's net.core.somaxconn may allow fewer."""
ACCEPTED_AT_ONCE = 64
CHECK_SOCKET_S = 0.1


class Server:
    """Answers root and the users in `uids`, up to CONNECTIONS of each at a time."""

    def __init__(self, leases: Leases, uids: frozenset[int]) -> None:
        self._leases = leases
        self._places = dict.fromkeys((0, *uids), CONNECTIONS)
        self._serving: set[asyncio.Task[None]] = set()
        self._open: dict[asyncio.StreamWriter, Connection] = {}

    async def listen(self, path: Path, stop: asyncio.Event) -> None:
        """Listen at `path` until `stop`. A socket file that was removed or replaced is made again."""
        while not stop.is_set():
            try:
                path.unlink(missing_ok=True)
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.setblocking(False)
                    listener.bind(str(path))
                    path.chmod(0o666)  # every user may connect; which ones stay is decided by SO_PEERCRED
                    made_ns = path.stat().st_ctime_ns
                    listener.listen(WAITING)
                    systemd.notify(systemd.READY)
                    async with asyncio.TaskGroup() as group:
                        accepting = group.create_task(self._accept(listener))
                        while not stop.is_set() and _made(path) == made_ns:
                            await asyncio.sleep(CHECK_SOCKET_S)
                        accepting.cancel()
            except OSError as error:
                log.warning("no client can connect: %s", error)
            await asyncio.sleep(CHECK_SOCKET_S)

    def disconnect_holders(self) -> None:
        """Close the connections with a lease, so that their clients notice that it has ended."""
        for writer, connection in self._open.items():
            if connection.lease is not None:
                writer.transport.abort()

    async def _accept(self, listener: socket.socket) -> None:
        """Until it is cancelled: take connections, and close those of users that may not connect."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                for _ in range(ACCEPTED_AT_ONCE):  # `sock_accept` does not wait while connections are there
                    client, _ = await loop.sock_accept(listener)
                    self._admit(client)
            except OSError as error:
                log.warning("a client cannot connect now: %s", error)
                await asyncio.sleep(CHECK_SOCKET_S)
            await asyncio.sleep(0)

    def _admit(self, client: socket.socket) -> None:
        pid, uid, _ = struct.unpack("iII", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if not self._places.get(uid):
            client.close()
            if uid in self._places:
                log.warning("process %d of user %d is disconnected: that user has %d already", pid, uid, CONNECTIONS)
            return
        self._places[uid] -= 1
        serving = asyncio.get_running_loop().create_task(self._serve(client, pid, uid))
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)

    async def _serve(self, client: socket.socket, pid: int, uid: int) -> None:
        """Serve one connection until it ends."""
        try:
            reader, writer = await asyncio.open_unix_connection(sock=client, limit=LINE_BYTES)
            connection = Connection(self._leases, f"process {pid} of user {uid}", reader.at_eof)
            self._open[writer] = connection
            try:
                await connection.serve(reader, writer)
            finally:
                del self._open[writer]
                connection.end_lease("its client disconnected")
                writer.transport.abort()  # a close would keep the socket open until the client has read every answer
        except (Exception, asyncio.CancelledError) as error:  # whatever it is, it ends only this connection
            log.warning("process %d of user %d is disconnected: %.200r", pid, uid, error)
        finally:
            self._places[uid] += 1


def _made(path: Path) -> int:
    """When the file was made or changed, in ns; 0: there is none."""
    try:
        return path.stat().st_ctime_ns
    except OSError:
        return 0


@dataclass(slots=True)
class Connection:
    """One client. `disconnected()`: whether it has closed its end."""

    leases: Leases
    client: str
    disconnected: Callable[[], bool]
    lease: Lease | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer requests, in order, until the client disconnects. Raises any exception for what is no request."""
        while True:
            async with asyncio.timeout(IDLE_S):
                line = await reader.readline()
            if not line:
                return
            await asyncio.sleep(0)  # `readline` does not wait while lines are buffered: let the other tasks run
            try:
                answer = {"ok": True, **await self.answer(json.loads(line.decode()))}
            except RejectedError as error:
                answer = {"ok": False, "code": error.code, "error": str(error)}
            writer.write(json.dumps(answer).encode() + b"\n")
            async with asyncio.timeout(IDLE_S):
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
