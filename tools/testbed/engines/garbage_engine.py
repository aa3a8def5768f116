"""A server on loopback that calls itself vLLM and answers garbage, of a kind that tests choose."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

MODEL = "tiny"
CHUNK = b'data: {"id":"x","object":"text_completion","choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'
_MODELS = json.dumps({"object": "list", "data": [{"id": MODEL, "max_model_len": 4096}]}).encode()
_METRICS = (
    b'vllm:num_requests_running{engine="0"} 0\nvllm:num_requests_waiting{engine="0"} 0\n'
    b'vllm:cache_config_info{engine="0",num_gpu_blocks="4096",block_size="128"} 1.0\nprocess_start_time_seconds 1\n'
)


def _whole(body: bytes, kind: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (kind, len(body)) + body


def _chunked(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%b\r\n" % (len(body), body)


_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
ANSWERS = {
    "not HTTP": b"\x00\x01\x02 this is not HTTP\r\n\r\n",
    "nothing": b"",
    "half a status line": b"HTTP/1.1 20",
    "truncated chunked body": _chunked(CHUNK * 2) + b"ffff\r\ndata: ",
    "broken chunk size": _chunked(CHUNK) + b"zz\r\n",
    "content-length too long": _STREAM + b"content-length: 9999\r\n\r\n" + CHUNK,
    "content-length no number": _STREAM + b"content-length: many\r\n\r\n" + CHUNK,
    "no JSON in a whole answer": _whole(b"<html>"),
    "status 999": b"HTTP/1.1 999 Odd\r\ncontent-length: 0\r\n\r\n",
    "header of a megabyte": b"HTTP/1.1 200 OK\r\nx: " + b"a" * (1 << 20) + b"\r\n\r\n",
}
"""Answers to a completion, after which the connection is closed."""
PAGES = {
    "no JSON in /v1/models": ("/v1/models", _whole(b"<html>")),
    "JSON of another shape in /v1/models": ("/v1/models", _whole(b'{"data": [{"id": 7, "max_model_len": "x"}, 3]}')),
    "JSON in /metrics": ("/metrics", _whole(b'{"vllm:num_requests_running": }')),
    "noise in /metrics": ("/metrics", _whole(bytes(range(256)) * 40, b"text/plain")),
    "no numbers in /metrics": ("/metrics", _whole(_METRICS.replace(b"} 0", b"} NaN").replace(b"4096", b"1e400"))),
    "endless numbers in /metrics": ("/metrics", _whole(_METRICS.replace(b"} 0", b"} +Inf"))),
    "no count in /tokenize": ("/tokenize", _whole(b'{"count": "many"}')),
}
"""What stands in place of a page that vLLM has."""


@dataclass(slots=True)
class GarbageEngine:
    """`answer` to completions (None: endless headers); `pages` in place of good ones. `open` connections."""

    answer: bytes | None = b""
    pages: dict[str, bytes] = field(default_factory=dict)
    open: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        self.open += 1
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._one(reader, writer):
                    pass
        finally:
            self.open -= 1
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        path = head.split()[1]
        if "content-length: " in head:
            await reader.readexactly(int(head.partition("content-length: ")[2].split()[0]))
        good = {"/health": _whole(b""), "/v1/models": _whole(_MODELS), "/metrics": _whole(_METRICS, b"text/plain")}
        good |= {"/version": _whole(b'{"version": "0"}'), "/tokenize": _whole(b'{"count": 3}')}
        page = ({**good, **self.pages}).get(path)
        if page is None and path.startswith("/v1/"):
            await self._garbage(writer)
            return False
        writer.write(page or b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
        await writer.drain()
        return True

    async def _garbage(self, writer: asyncio.StreamWriter) -> None:
        if self.answer is not None:
            writer.write(self.answer)
            return await writer.drain()
        writer.write(b"HTTP/1.1 200 OK\r\n")
        while not writer.is_closing():
            writer.write(b"x-more: %b\r\n" % (b"a" * 1000))
            await writer.drain()


@contextlib.asynccontextmanager
async def garbage_engine(engine: GarbageEngine, port: int = 0) -> AsyncIterator[str]:
    """Serve it; yields its address."""
    tasks: set[asyncio.Task[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(engine.serve(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(connected, "127.0.0.1", port)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
