"""A client that trusts nothing: it waits for a bounded time, and describes what it saw of every answer.

`Answer.check` is what holds under faults: an answer ends once, with all its tokens or with a clear error.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

COMPLETIONS = "/v1/completions"
HANG_S = 90.0
"""Longer than any bound that a fault's gateway was given: an answer that takes longer hangs."""
_DATA = re.compile(rb"(?m)^data: ?(.*)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back. `status` None: no answer at all; `broken`: the connection ended in its midst, and how."""

    status: int | None
    body: bytes
    kind: str = ""
    broken: str | None = None
    hung: bool = False
    seconds: float = 0.0

    @property
    def events(self) -> list[bytes]:
        """The data of a stream's events."""
        return _DATA.findall(self.body) if self.kind.startswith("text/event-stream") else []

    @property
    def tokens(self) -> int:
        """Events of a stream that hold a choice; 1 for a whole answer that holds some."""
        if not self.events:
            return int(self.status == 200 and b'"choices"' in self.body)
        return sum(b'"choices"' in event and b'"choices":[]' not in event for event in self.events)

    @property
    def error(self) -> dict[str, Any] | None:
        """OpenAI's error object: the answer's body, or an event of a stream."""
        for text in [event for event in self.events if b'"error"' in event] or [self.body]:
            try:
                found = json.loads(text)
            except ValueError:
                continue
            error = found.get("error") if isinstance(found, dict) else None
            if isinstance(error, dict):
                return error
        return None

    @property
    def refused(self) -> bool:
        """Nothing listens there."""
        return self.status is None and self.broken is not None and "ConnectorError" in self.broken

    @property
    def served(self) -> bool:
        """The whole answer came."""
        if self.status != 200 or self.broken or self.error is not None:
            return False
        return self.events[-1] == b"[DONE]" if self.events else b'"choices"' in self.body

    @property
    def outcome(self) -> str:
        """In a few words."""
        if self.hung:
            return "HANGS"
        if self.error is not None:
            code = self.error.get("code") or self.error.get("type")
            head = f"{self.status}" if not self.events else "200, tokens, then an error event"
            return f"{head} `{code}`"
        if self.served:
            return "200, whole"
        if self.broken or self.status is None:
            return f"{self.status or 'no answer'}, broken off"
        return f"{self.status}, the engine's bytes as they are"

    def check(self) -> None:
        """Raise AssertionError unless it ended once, with tokens or with a clear error."""
        assert not self.hung, f"no end within {self.seconds:.0f} s"
        if self.served:
            assert self.events.count(b"[DONE]") <= 1, "two ends"
            return
        error = self.error
        assert error is not None, f"neither an answer nor an error: {self.status} {self.broken} {self.body[-200:]!r}"
        assert set(error) >= {"message", "type", "param", "code"}, f"not OpenAI's shape: {error}"
        assert self.status is not None and (self.status >= 400 or self.events), f"an error with status {self.status}"
        ends = [event for event in self.events if event == b"[DONE]" or b'"error"' in event]
        # vLLM itself sends [DONE] after an error.
        assert not self.events or (b'"error"' in ends[0] and ends[1:] in ([], [b"[DONE]"])), f"several ends: {ends}"


def tallied(answers: Iterable[Answer]) -> str:
    """Answers in words, equal ones counted."""
    counts = Counter(answer.outcome for answer in answers)
    return "; ".join(f"{count} x {words}" for words, count in sorted(counts.items()))


class Client:
    """Speaks to one gateway. An async context manager: at its end all its connections are closed.

    `keep`: connections are used again.
    """

    def __init__(self, url: str, model: str, *, keep: bool = False) -> None:
        self.url = url
        self.model = model
        self._keep = keep
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=not self._keep),
            timeout=aiohttp.ClientTimeout(total=None),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    def fields(self, *, tokens: int = 20, stream: bool = True, **more: object) -> dict[str, object]:
        """A completion's body."""
        ask = {"model": self.model, "prompt": "def main():", "max_tokens": tokens, "stream": stream}
        return {**ask, "ignore_eos": True, "temperature": 0, **more}

    async def ask(
        self, *, path: str = COMPLETIONS, headers: Mapping[str, str] | None = None, hang_s: float = HANG_S, **more: Any
    ) -> Answer:
        """One request, to its end."""
        body = json.dumps(self.fields(**more)).encode()
        return await self.send(body, path=path, headers=headers, hang_s=hang_s)

    async def send(
        self,
        body: bytes,
        *,
        path: str = COMPLETIONS,
        headers: Mapping[str, str] | None = None,
        hang_s: float = HANG_S,
        url: str | None = None,
    ) -> Answer:
        """Any body, to the answer's end. `url` is another gateway's."""
        assert self._session is not None
        began = time.monotonic()
        status: int | None = None
        kind, broken, hung = "", None, False
        parts: list[bytes] = []
        try:
            sent = {"content-type": "application/json", **(headers or {})}
            async with (
                asyncio.timeout(hang_s),
                self._session.post((url or self.url) + path, data=body, headers=sent) as got,
            ):
                status, kind = got.status, got.headers.get("content-type", "")
                async for chunk in got.content.iter_any():
                    parts.append(chunk)
        except TimeoutError:
            hung = True
        except (aiohttp.ClientError, OSError) as error:
            broken = repr(error)
        seconds = time.monotonic() - began
        return Answer(status=status, body=b"".join(parts), kind=kind, broken=broken, hung=hung, seconds=seconds)

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page."""
        assert self._session is not None
        async with asyncio.timeout(10), self._session.get(self.url + path) as got:
            return got.status, await got.text()


@contextlib.asynccontextmanager
async def connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A bare connection, broken off at the end."""
    host, _, port = url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 20)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def head(size: int, *, path: str = COMPLETIONS, extra: str = "") -> bytes:
    """The head of a request with a body of `size` bytes."""
    return (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {size}\r\n{extra}\r\n"
    ).encode()
