"""A tap on the wire between the gateway and its engine: bytes pass, and the last answer to a path is stored as it came.

It runs in its own thread. Knows HTTP/1.1 just well enough to take the chunks of an answer apart.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

_CONTENT_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_AT_ONCE = 1 << 16


class Tap:
    """Listens at `url`, once it is open; everything goes on to `upstream`."""

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        assert parts.hostname and parts.port
        self.url = ""
        self._upstream = (parts.hostname, parts.port)
        self._answers: dict[str, bytes] = {}

    def answer(self, path: str) -> bytes | None:
        """The body of the engine's last answer to a request of this path, once; None: it was not asked since."""
        head, _, rest = self._answers.pop(path, b"").partition(b"\r\n\r\n")
        if not head:
            return None
        found = _CONTENT_LENGTH.search(head)
        return rest[: int(found[1])] if found else _dechunked(rest)

    async def listen(self) -> asyncio.Server:
        """Take connections."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above, below = await asyncio.open_connection(*self._upstream)
        path = ""

        async def down() -> None:
            while data := await above.read(_AT_ONCE):
                self._answers[path] = self._answers.get(path, b"") + data
                writer.write(data)
            writer.write_eof()

        answers = asyncio.create_task(down())
        try:
            with suppress(ConnectionError):
                while data := await reader.read(_AT_ONCE):
                    if data.startswith((b"GET ", b"POST ")):
                        path = data.split(b" ", 2)[1].decode()
                        self._answers[path] = b""
                    below.write(data)
        finally:
            answers.cancel()
            for each in (below, writer):
                each.close()
                with suppress(ConnectionError):
                    await each.wait_closed()


@contextmanager
def tapped(upstream: str) -> Iterator[Tap]:
    """A tap that is open."""
    tap, ready = Tap(upstream), threading.Event()
    ends: list[Callable[[], object]] = []

    async def run() -> None:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        ends.append(lambda: loop.call_soon_threadsafe(stop.set))
        async with await tap.listen():
            ready.set()
            await stop.wait()

    # What is still open is cancelled and closed by `asyncio.run`.
    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    ready.wait(5)
    try:
        yield tap
    finally:
        for end in ends:
            end()
        thread.join(5)


def _dechunked(data: bytes) -> bytes:
    parts, at = [], 0
    while (end := data.find(b"\r\n", at)) > at and (size := int(data[at:end].split(b";")[0], 16)):
        parts.append(data[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(parts)
