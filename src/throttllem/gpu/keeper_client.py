"""A lease from the keeper: clocks are set through it, a heartbeat holds it, and it ends with this process.

The keeper's protocol is docs/keeper.md; knows nothing of why a clock is set.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from throttllem.gpu.device import nothing

SOCKET = Path("/run/throttllem/keeper.sock")
TTL_S = 3.0
BEATS = 3.0
"""Heartbeats in one time to live."""


class KeeperError(OSError):
    """The keeper does not do it. `code` is its word for why, "unreachable" where it does not answer."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


async def keeper_status(socket: Path, timeout_s: float = 2.0) -> dict[str, Any]:
    """What the keeper may set, what is held and by whom. Raises KeeperError."""
    talk = _Talk(socket)
    try:
        return await talk.ask({"op": "status"}, timeout_s)
    finally:
        talk.close()


class KeptClocks:
    """The clocks of some GPUs, by UUID. All methods belong to one event loop."""

    def __init__(self, socket: Path, gpus: tuple[str, ...], ttl_s: float = TTL_S) -> None:
        self._socket, self._gpus, self._ttl_s = socket, gpus, ttl_s
        self._gate = asyncio.Lock()
        self._range = (0, 0)
        self._talk: _Talk | None = None
        self._beating: asyncio.Task[None] | None = None

    async def set(self, mhz: int, sent: Callable[[], None] = nothing) -> int:
        """Lock all of them to a clock, or to the nearest that the keeper may set; which one that is. Raises
        KeeperError: where a GPU could not be set all are restored.
        """
        async with self._gate:
            for again in (True, False):
                fresh = self._talk is None
                try:
                    talk = self._talk or await self._lease()
                    low, high = self._range
                    mhz = min(max(mhz, low), high)
                    await talk.ask({"op": "set", "mhz": mhz}, self._ttl_s, sent if again else nothing)
                    return mhz
                except KeeperError as error:
                    if error.code not in ("lost", "unreachable"):
                        raise
                    await self._drop()
                    if fresh or not again:
                        raise
        raise AssertionError("the second try returns or raises")

    async def give_back(self) -> None:
        """The lease ends, and the keeper has restored everything when this returns, if it could at once."""
        async with self._gate:
            if self._talk is not None:
                try:
                    await self._talk.ask({"op": "release"}, self._ttl_s)
                finally:
                    await self._drop()

    async def _lease(self) -> _Talk:
        talk = _Talk(self._socket)
        try:
            await talk.ask({"op": "lease", "gpus": self._gpus, "ttl_s": self._ttl_s}, self._ttl_s)
            allowed = (await talk.ask({"op": "status"}, self._ttl_s))["allowed"]
            self._range = (max(allowed[gpu][0] for gpu in self._gpus), min(allowed[gpu][1] for gpu in self._gpus))
        except BaseException:
            talk.close()
            raise
        self._talk = talk
        self._beating = asyncio.get_running_loop().create_task(self._beat(talk))
        return talk

    async def _drop(self) -> None:
        if self._talk is not None:
            self._talk.close()
        if self._beating is not None:
            self._beating.cancel()
        self._talk = self._beating = None

    async def _beat(self, talk: _Talk) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / BEATS)
            async with self._gate:
                try:
                    await talk.ask({"op": "beat"}, self._ttl_s)
                except KeeperError:
                    if self._talk is talk:
                        talk.close()
                        self._talk = self._beating = None
                    return

    @property
    def held(self) -> bool:
        """Whether there is a lease, as far as is known."""
        return self._talk is not None


class _Talk:
    """One connection. A question that was not answered in time ends it, and with it the lease."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._over = False

    async def ask(self, what: dict[str, Any], timeout_s: float, sent: Callable[[], None] = nothing) -> dict[str, Any]:
        """The answer. Raises KeeperError."""
        if self._over:
            raise KeeperError("lost", "keeper: the connection was given up")
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = self._streams = self._streams or await asyncio.open_unix_connection(self._socket)
                writer.write(json.dumps(what).encode() + b"\n")
                await writer.drain()
                sent()
                line = await reader.readline()
            if not line:
                raise ConnectionError("it hung up; may this user connect?")
            answer: dict[str, Any] = json.loads(line)
        except asyncio.CancelledError:
            self.close()  # its answer is still to come, and would be taken for another's
            self._over = True
            raise
        except (OSError, ValueError) as error:
            self.close()
            why = f"no answer in {timeout_s:g} s" if isinstance(error, TimeoutError) else str(error)
            where = "" if self._socket == SOCKET else f" --socket {self._socket}"
            raise KeeperError(
                "unreachable", f"keeper {self._socket}: {why}; `throttllem doctor{where}` tells what is missing"
            ) from error
        if not answer.get("ok"):
            raise KeeperError(str(answer.get("code")), f"keeper: {answer.get('error')}")
        return answer

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
