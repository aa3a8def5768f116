"""A client that costs next to nothing: many streams at once, each with a new request soon after one ends.

Times the first token by its mark and counts the rest; every prompt is another, so that nothing is answered from memory.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

_NUMBERS = itertools.count(1)
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_KEPT_BYTES = 32
"""As long as the longest mark, and the last chunk."""


@dataclass(slots=True, kw_only=True)
class Load:
    """What `streams` clients send to `url`, and which bytes stand in every token's text.

    Each asks again `pause_s` after an answer has ended: whatever that leaves to be done is not in the next one's time.
    """

    url: str
    model: str
    streams: int
    tokens: int
    mark: bytes
    prompt_words: int = 60
    pause_s: float = 0.05
    api_key: str | None = None


@dataclass(slots=True, kw_only=True)
class Streamed:
    """Seconds to the first token of each request that ended, tokens and processor time of the measured seconds, what
    failed.
    """

    first_s: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    failed: list[str] = field(default_factory=list)


class _Stream(asyncio.Protocol):
    def __init__(self, load: Load, streamed: Streamed, pause_s: float) -> None:
        self._load, self._streamed, self._pause_s = load, streamed, pause_s
        self._transport: Any = None
        self._sent_s = 0.0
        self._first_s: float | None = None
        self._tail = b""
        self.count = 0
        self.stopping = False
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        asyncio.get_running_loop().call_later(self._pause_s, self._ask)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            if not self.stopping:
                self._streamed.failed.append(f"connection lost: {exc or 'closed'}")
            self.over.set_result(None)

    def _ask(self) -> None:
        if self.stopping:
            self._end()
            return
        load, at = self._load, urlsplit(self._load.url)
        words = " ".join(f"{word}" for word in range(load.prompt_words))
        body = json.dumps(
            {
                "model": load.model,
                "messages": [{"role": "user", "content": f"Request {next(_NUMBERS)}: {words}"}],
                "max_tokens": load.tokens,
                "stream": True,
                "ignore_eos": True,
                "temperature": 0,
            }
        ).encode()
        key = f"authorization: Bearer {load.api_key}\r\n" if load.api_key else ""
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {at.netloc}\r\ncontent-type: application/json\r\n{key}"
        self._first_s, self._tail = None, b""
        self._sent_s = time.perf_counter()
        self._transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    def data_received(self, data: bytes) -> None:
        count = (self._tail[1 - len(self._load.mark) :] + data).count(self._load.mark)
        if count and self._first_s is None:
            self._first_s = time.perf_counter() - self._sent_s
        self.count += count
        self._tail = (self._tail + data)[-_KEPT_BYTES:]
        if not self._tail.endswith(_LAST_CHUNK):
            return
        if self._first_s is None:
            self._streamed.failed.append(data[:300].decode(errors="replace"))
            self._end()
            return
        self._streamed.first_s.append(self._first_s)
        asyncio.get_running_loop().call_later(self._load.pause_s, self._ask)

    def stop(self) -> None:
        """Hang up, whatever is under way."""
        self.stopping = True
        self._end()

    def _end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
        self._transport.abort()


async def run(
    load: Load, *, warm_s: float, seconds: float, spread_s: float, cpu_s: Callable[[], float] = lambda: 0.0
) -> Streamed:
    """Set the load going over `spread_s`, measure for `seconds` after `warm_s`, end it. `cpu_s` is asked twice."""
    streamed = Streamed()
    streams = await _opened(load, streamed, spread_s)
    await asyncio.sleep(warm_s)
    streamed.first_s.clear()
    tokens, used_s, began_s = sum(stream.count for stream in streams), cpu_s(), time.perf_counter()
    await asyncio.sleep(seconds)
    measured = Streamed(
        first_s=list(streamed.first_s),
        tokens=sum(stream.count for stream in streams) - tokens,
        seconds=time.perf_counter() - began_s,
        cpu_s=cpu_s() - used_s,
        failed=list(streamed.failed),
    )
    for stream in streams:
        stream.stop()
    await asyncio.wait([stream.over for stream in streams], timeout=2.0)
    return measured


async def _opened(load: Load, streamed: Streamed, spread_s: float) -> list[_Stream]:
    at, loop = urlsplit(load.url), asyncio.get_running_loop()
    streams: list[_Stream] = []
    for number in range(load.streams):
        stream = _Stream(load, streamed, spread_s * number / load.streams)
        await loop.create_connection(lambda stream=stream: stream, at.hostname or "", at.port or 80)  # type: ignore[misc]
        streams.append(stream)
    return streams
