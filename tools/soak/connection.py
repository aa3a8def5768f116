"""One connection to the keeper's socket by which anything can be sent: requests, rubbish, floods."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class Connection:
    """An open connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, **what: object) -> dict[str, Any] | None:
        """The answer; None if none comes."""
        await self.send(json.dumps(what).encode() + b"\n")
        return await self.receive()

    async def send(self, raw: bytes) -> None:
        """Bytes, as they are."""
        with suppress(OSError, TimeoutError):
            self.writer.write(raw)
            async with asyncio.timeout(_WAIT_S):
                await self.writer.drain()

    async def receive(self) -> dict[str, Any] | None:
        """One answer; None if none comes."""
        with suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(_WAIT_S):
                found: dict[str, Any] = json.loads(await self.reader.readline())
                return found
        return None


@asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Connection | None]:
    """A connection; None if nothing listens."""
    connection: Connection | None = None
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(_WAIT_S):
            connection = Connection(*await asyncio.open_unix_connection(path))
    try:
        yield connection
    finally:
        if connection is not None:
            connection.writer.close()
