"""One connection to the keeper's socket by which anything can be said: requests, rubbish, floods."""

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
class Talk:
    """An open connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def ask(self, **what: object) -> dict[str, Any] | None:
        """The answer; None if none comes."""
        await self.say(json.dumps(what).encode() + b"\n")
        return await self.hear()

    async def say(self, raw: bytes) -> None:
        """Bytes, as they are."""
        with suppress(OSError, TimeoutError):
            self.writer.write(raw)
            async with asyncio.timeout(_WAIT_S):
                await self.writer.drain()

    async def hear(self) -> dict[str, Any] | None:
        """One answer; None if none comes."""
        with suppress(OSError, ValueError, TimeoutError):
            async with asyncio.timeout(_WAIT_S):
                found: dict[str, Any] = json.loads(await self.reader.readline())
                return found
        return None


@asynccontextmanager
async def talk_to(path: Path) -> AsyncIterator[Talk | None]:
    """A connection; None if there is nobody."""
    talk: Talk | None = None
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(_WAIT_S):
            talk = Talk(*await asyncio.open_unix_connection(path))
    try:
        yield talk
    finally:
        if talk is not None:
            talk.writer.close()
