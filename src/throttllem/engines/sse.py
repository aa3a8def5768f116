"""Server-sent events out of bytes that may be cut anywhere, within bounds. Knows nothing of what the events say."""

from __future__ import annotations

import re

MOST_BYTES = 1 << 20
"""So much of one event is kept until it is whole."""
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
_DATA = re.compile(rb"(?:^|[\r\n])data:([^\r\n]*)")


class Splitter:
    """Cuts a stream into events; together with `rest` they are the bytes that came."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes, each with its blank line; of one over the bound a part without one."""
        tail = self._tail
        data = tail + chunk if tail else chunk
        # Most chunks are one whole event.
        if data.find(b"\n\n") + 2 == len(data) > 1 and b"\r" not in data:
            self._tail = b""
            return [data]
        events, at = [], 0
        for end in _END.finditer(data, max(0, len(tail) - 3)):
            events.append(data[at : end.end()])
            at = end.end()
        self._tail = data[at:]
        if len(self._tail) > MOST_BYTES:
            events.append(self.rest())
        return events

    def rest(self) -> bytes:
        """The stream is over: what no blank line ended."""
        tail, self._tail = self._tail, b""
        return tail


def is_whole(event: bytes) -> bool:
    """Whether a blank line ends it."""
    return event.endswith((b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n"))


def data_of(event: bytes) -> bytes | None:
    """What its `data:` lines say, None if it has none."""
    if event.startswith(b"data:") and event.find(b"\n") + 2 == len(event) and b"\r" not in event:
        return event[5:-2]
    lines = _DATA.findall(event)
    return b"\n".join(lines) if lines else None
