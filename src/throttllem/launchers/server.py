"""A launcher behind a Unix socket: one line of JSON with a call, one with its answer, on a connection of its own.

The gateway is at the other end (remote.py). Knows nothing of what the launcher starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from throttllem.launchers.base import EngineCommand, Launcher, LaunchError

log = logging.getLogger("throttllem.launchers")

LINE_BYTES = 1 << 20


async def serve_launcher(launcher: Launcher, path: Path) -> None:
    """Answer at `path`, which only this user may connect to, until cancelled. Raises OSError."""
    connections: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(_serve(launcher, reader, writer))
        connections.add(task)
        task.add_done_callback(connections.discard)

    path.unlink(missing_ok=True)
    before = os.umask(0o177)
    try:
        server = await asyncio.start_unix_server(connected, path, limit=LINE_BYTES)
    finally:
        os.umask(before)
    try:
        async with server:
            await server.serve_forever()
    finally:
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


async def _serve(launcher: Launcher, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One call. A client that disconnects does not end a start or a stop that has begun, only a watch."""
    try:
        call = json.loads(await reader.readline())
        answering = asyncio.create_task(_answer(launcher, call))
        leaving = asyncio.create_task(reader.read(1))
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if call.get("method") == "watch" and not answering.done():
            answering.cancel()
            return
        writer.write(json.dumps(await answering).encode() + b"\n")
        await writer.drain()
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("a call was not answered: %r", error)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def _answer(launcher: Launcher, call: dict[str, Any]) -> dict[str, Any]:
    try:
        match call["method"]:
            case "launch":
                fields = call["command"]
                launched = await launcher.launch(EngineCommand(**fields | {"words": tuple(fields["words"])}))
                return {"launched": asdict(launched)}
            case "stop":
                await launcher.stop(call["engine_id"])
                return {}
            case "listed":
                return {"listed": [asdict(launched) for launched in await launcher.listed()]}
            case "watch":
                return {"ended": asdict(await launcher.watch(call["engine_id"]))}
        raise LaunchError(f"the launcher knows no call {call['method']!r}")
    except LaunchError as error:
        return {"error": str(error)}
