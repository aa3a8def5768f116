"""Client of the keeper: sets clocks under a lease, which a heartbeat extends and which ends with this process.

The protocol is in docs/keeper.md. Knows nothing of why a clock is set.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

SOCKET = Path("/run/throttllem/keeper.sock")
TTL_S = 3.0
HEARTBEATS_PER_TTL = 3.0
CONNECT_AGAIN_S = 0.001


class KeeperError(OSError):
    """The keeper rejected a request, or could not be reached. `code` is that of the protocol; "unreachable" where
    there was no answer.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def keeper_status(path: Path, timeout_s: float = 2.0) -> dict[str, Any]:
    """What the keeper may set, and which client holds what. `path`: its socket. Raises KeeperError."""
    connection = _Connection(path)
    try:
        return await connection.request({"op": "status"}, timeout_s)
    finally:
        connection.close()


class KeeperClient:
    """Sets the clocks of some GPUs, named by UUID, through the keeper. All methods belong to one event loop.

    A lease is taken with the first `set`. It can be lost without a fault of this process: the keeper was restarted, or
    the event loop was blocked for longer than the TTL. Then `lost` is called with the reason, as soon as the keeper
    closes the connection or rejects a heartbeat, and the next `set` takes another lease. A loss that a `set` notices is
    its own matter.
    """

    def __init__(
        self,
        path: Path,
        gpus: tuple[str, ...],
        ttl_s: float = TTL_S,
        lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._path, self._gpus, self._ttl_s, self._lost = path, gpus, ttl_s, lost
        self._one_request = asyncio.Lock()
        self._connection: _Connection | None = None
        self._range = (0, 0)
        """The lowest and highest clock (MHz) that the keeper may set on all of them; known with the lease."""
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def held(self) -> bool:
        """Whether there is a lease, as far as is known."""
        return self._connection is not None

    async def set(self, mhz: int, sent: Callable[[], None] | None = None) -> int:
        """Lock all GPUs to a clock, or to the nearest one that the keeper may set; returns that one. `sent` is called
        when the request is on its way. Raises KeeperError: if one GPU could not be set, all of them are restored.
        """
        async with self._one_request:
            had_lease = self.held
            try:
                return await self._set(mhz, sent)
            except KeeperError:
                if not had_lease or self.held:
                    raise
            return await self._set(mhz, None)  # the lease was lost in the meantime: once more, with another one

    async def restore(self) -> None:
        """End the lease. The GPUs are restored when this returns, unless one of them refuses; then the keeper goes on
        trying. Raises KeeperError.
        """
        async with self._one_request:
            if self._connection is not None:
                try:
                    await self._connection.request({"op": "release"}, self._ttl_s)
                finally:
                    self.close()

    def close(self) -> None:
        """Disconnect, which ends the lease."""
        if self._connection is not None:
            self._connection.close()
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._connection = self._heartbeat = None

    async def _set(self, mhz: int, sent: Callable[[], None] | None) -> int:
        connection = self._connection or await self._lease()
        low_mhz, high_mhz = self._range
        allowed_mhz = min(max(mhz, low_mhz), high_mhz)
        try:
            await connection.request({"op": "set", "mhz": allowed_mhz}, self._ttl_s, sent)
        except KeeperError as error:
            if error.code in ("lost", "unreachable"):
                self.close()
            raise
        return allowed_mhz

    async def _lease(self) -> _Connection:
        connection = _Connection(self._path, self._disconnected)
        try:
            await connection.request({"op": "lease", "gpus": self._gpus, "ttl_s": self._ttl_s}, self._ttl_s)
            allowed = (await connection.request({"op": "status"}, self._ttl_s))["allowed"]
        except BaseException:
            connection.close()
            raise
        self._range = (max(allowed[gpu][0] for gpu in self._gpus), min(allowed[gpu][1] for gpu in self._gpus))
        self._connection = connection
        self._heartbeat = asyncio.get_running_loop().create_task(self._beat(connection))
        return connection

    async def _beat(self, connection: _Connection) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / HEARTBEATS_PER_TTL)
            async with self._one_request:
                try:
                    await connection.request({"op": "beat"}, self._ttl_s)
                except KeeperError as error:
                    self._lose(connection, str(error))
                    return

    def _disconnected(self, connection: _Connection) -> None:
        """The keeper closed the connection. A request that is under way, or about to be, notices it by itself."""
        if not self._one_request.locked():
            self._lose(connection, "keeper: it closed the connection, and so ended the lease; is it restarted?")

    def _lose(self, connection: _Connection, why: str) -> None:
        if self._connection is connection:
            self.close()
            self._lost(why)


class _Connection:
    """One connection to the keeper, opened with the first request. A request without an answer in time closes it for
    good, and so ends the lease: its answer may still come, and would be taken for that of the next request.
    `disconnected` is called when it is closed, by either end.
    """

    def __init__(self, path: Path, disconnected: Callable[[_Connection], None] = lambda _: None) -> None:
        self._path, self._disconnected = path, disconnected
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._closed = False

    async def request(
        self, fields: dict[str, Any], timeout_s: float, sent: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        """The answer. Raises KeeperError."""
        if self._closed:
            raise KeeperError("lost", "keeper: the connection was closed")
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = self._streams = self._streams or await _connect(
                    self._path, partial(self._disconnected, self)
                )
                writer.write(json.dumps(fields).encode() + b"\n")
                await writer.drain()
                if sent is not None:
                    sent()
                line = await reader.readline()
            if not line:
                raise ConnectionError("it closed the connection; may this user connect?")
            answer: dict[str, Any] = json.loads(line)
        except asyncio.CancelledError:
            self.close()
            raise
        except (OSError, ValueError) as error:
            self.close()
            why = f"no answer in {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            option = "" if self._path == SOCKET else f" --socket {self._path}"
            raise KeeperError(
                "unreachable", f"keeper {self._path}: {why}; `throttllem doctor{option}` shows what is missing"
            ) from error
        if not answer.get("ok"):
            raise KeeperError(str(answer.get("code")), f"keeper: {answer.get('error')}")
        return answer

    def close(self) -> None:
        """Close it for good."""
        self._closed = True
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class _Protocol(asyncio.StreamReaderProtocol):
    """Of a stream, and calls `closed` when its connection is closed. The end of what is read closes it."""

    def __init__(self, reader: asyncio.StreamReader, closed: Callable[[], None]) -> None:
        super().__init__(reader)
        self._on_closed = closed

    def eof_received(self) -> bool:
        super().eof_received()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._on_closed()


async def _connect(path: Path, closed: Callable[[], None]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect; again while the queue of the socket is full, as under a flood of another user. Raises OSError."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    opened = socket.socket(socket.AF_UNIX)
    try:
        opened.setblocking(False)
        while True:
            try:
                opened.connect(str(path))
                break
            except BlockingIOError:
                await asyncio.sleep(CONNECT_AGAIN_S)
        transport, protocol = await loop.create_unix_connection(lambda: _Protocol(reader, closed), sock=opened)
    except BaseException:
        opened.close()
        raise
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)
