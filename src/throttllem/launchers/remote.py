"""The gateway's end of a launcher in another process of this host (server.py), as that of Ray is.

No request depends on it: while that process is gone, engines that run go on. Knows nothing of what it starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from throttllem.launchers.base import Ended, EngineCommand, Launched, LaunchError

_AGAIN_S = 1.0
_LINE_BYTES = 1 << 20


class RemoteLauncher:
    """Asks the launcher at the socket `path`, each time on a new connection."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def launch(self, command: EngineCommand) -> Launched:
        """As the other launcher does. Raises LaunchError while it is gone too."""
        fields = asdict(command) | {"environment": dict(command.environment)}
        return Launched(**(await self._ask({"method": "launch", "command": fields}))["launched"])

    async def stop(self, engine_id: str) -> None:
        """As the other launcher does."""
        await self._ask({"method": "stop", "engine_id": engine_id})

    async def listed(self) -> tuple[Launched, ...]:
        """As the other launcher does."""
        return tuple(Launched(**fields) for fields in (await self._ask({"method": "listed"}))["listed"])

    async def watch(self, engine_id: str) -> Ended:
        """Wait for its end. While the other launcher is gone nothing is known of it, and the wait goes on."""
        while True:
            try:
                return Ended(**(await self._ask({"method": "watch", "engine_id": engine_id}))["ended"])
            except LaunchError:
                await asyncio.sleep(_AGAIN_S)

    async def _ask(self, call: dict[str, Any]) -> dict[str, Any]:
        try:
            reader, writer = await asyncio.open_unix_connection(self._path, limit=_LINE_BYTES)
            try:
                writer.write(json.dumps(call).encode() + b"\n")
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
            answer: dict[str, Any] = json.loads(line)
        except (OSError, ValueError) as error:
            raise LaunchError(f"the launcher at {self._path} cannot be reached: {error}") from error
        if "error" in answer:
            raise LaunchError(answer["error"])
        return answer
