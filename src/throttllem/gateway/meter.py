"""How many tokens went by in a stream of server-sent events, told from its bytes as cheaply as can be.

An event is one token, but for [DONE], errors, the usage chunk and chunks that only open or close. JSON escapes every
quote inside a string, so a key with its quotes and colon is found by a plain search of the bytes.
"""

from __future__ import annotations

import re

_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
_DATA = re.compile(rb"(?:^|[\r\n])data:")
_ERROR = re.compile(rb'data: ?\{\s*"error"\s*:\s*[{"]')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_USED = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,12})\b')
_EMPTY_DELTA = re.compile(rb'"delta"\s*:\s*\{\s*(?:(?:"role"\s*:\s*"\w+"|"\w+"\s*:\s*(?:""|null|\[\]))[\s,]*)*\}')
_MOST_TAIL_BYTES = 1 << 20


def split_events(data: bytes) -> tuple[list[bytes], bytes]:
    """The whole events at the front of `data`, each with the blank line that ends it, and what is left."""
    events, at = [], 0
    for end in _END.finditer(data):
        events.append(data[at : end.end()])
        at = end.end()
    return events, data[at:]


class Meter:
    """Counts one stream. `done`: [DONE] came; `failed`: the engine told an error; `used`: tokens by its own word."""

    __slots__ = ("_tail", "done", "failed", "used")

    def __init__(self) -> None:
        self._tail = b""
        self.done = False
        self.failed = False
        self.used: int | None = None

    def feed(self, chunk: bytes) -> int:
        """The tokens in the events that this chunk completes; chunks may cut events anywhere."""
        data = self._tail + chunk if self._tail else chunk
        if data.endswith(b"\n\n") and data.find(b"\n\n") == len(data) - 2 and b"\r" not in data:
            self._tail = b""
            return self.event(data)
        events, tail = split_events(data)
        self._tail = tail if len(tail) <= _MOST_TAIL_BYTES else b""
        return sum(map(self.event, events))

    def close(self) -> int:
        """The stream is over: the tokens in what no blank line ended."""
        tail, self._tail = self._tail, b""
        return self.event(tail) if tail else 0

    def event(self, event: bytes) -> int:
        """The tokens of one whole event: 1 or 0."""
        if not event.startswith(b"data:"):
            found = _DATA.search(event)
            if found is None:
                return 0
            event = event[found.end() - 5 :]
        if event.startswith((b"data: [DONE]", b"data:[DONE]")):
            self.done = True
            return 0
        if b'"error"' in event and _ERROR.match(event):
            self.failed = True
            return 0
        if b"[]" in event and _NO_CHOICES.search(event):
            found = _USED.search(event)
            self.used = int(found[1]) if found else self.used
            return 0
        if b'"delta"' in event and _only_opens_or_closes(event):
            return 0
        return 1


def _only_opens_or_closes(event: bytes) -> bool:
    """Whether a chat chunk's delta holds a role and no content, or nothing at all."""
    found = _EMPTY_DELTA.search(event)
    # An empty content without a role is a token whose text is still to come, as when a character has several.
    return found is not None and (b'"role"' in found[0] or b'"content"' not in found[0])
