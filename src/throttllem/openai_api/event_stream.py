"""Reads server-sent events of OpenAI's API from bytes that may be cut anywhere, within bounds.

`Splitter` cuts a stream into events. `Meter` counts the tokens in one by searching its bytes for keys, which costs a
fraction of parsing: JSON escapes every quote inside a string, so a key with its quotes and colon is always a key. An
event is one token, except [DONE], errors, the usage chunk, and chunks that only open or close an answer.
"""

from __future__ import annotations

import re

MOST_BYTES = 1 << 20
"""The most bytes of one event that are held until it is whole."""
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
_DATA_LINE = re.compile(rb"(?:^|[\r\n])data:([^\r\n]*)")
_DATA = re.compile(rb"(?:^|[\r\n])data:")
_ERROR_EVENT = re.compile(rb"(?:^|[\r\n])event: ?error[ \t]*[\r\n]")
_ERROR = re.compile(rb'"error"\s*:\s*[{"]|"object"\s*:\s*"error"')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_USED = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,12})\b')
_EMPTY_DELTA = re.compile(rb'"delta"\s*:\s*\{\s*(?:(?:"role"\s*:\s*"\w+"|"\w+"\s*:\s*(?:""|null|\[\]))[\s,]*)*\}')


class Splitter:
    """Cuts a stream into events; together with `rest` they are the bytes that came."""

    __slots__ = ("tail",)

    def __init__(self) -> None:
        self.tail = b""
        """The bytes of an event that is not whole yet."""

    def feed(self, chunk: bytes) -> list[bytes]:
        """The events that `chunk` completes, each with its blank line; of one over the bound a part without one."""
        tail = self.tail
        data = tail + chunk if tail else chunk
        # Most chunks are one whole event.
        if data.find(b"\n\n") + 2 == len(data) > 1 and b"\r" not in data:
            self.tail = b""
            return [data]
        events, at = [], 0
        for end in _END.finditer(data, max(0, len(tail) - 3)):
            events.append(data[at : end.end()])
            at = end.end()
        self.tail = data[at:]
        if len(self.tail) > MOST_BYTES:
            events.append(self.rest())
        return events

    def rest(self) -> bytes:
        """The bytes of the last event if no blank line ended it."""
        tail, self.tail = self.tail, b""
        return tail


def is_whole(event: bytes) -> bool:
    """Whether a blank line ends it."""
    return event.endswith((b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n"))


def is_done(event: bytes) -> bool:
    """Whether it is the event that ends a stream."""
    return event.startswith((b"data: [DONE]", b"data:[DONE]"))


def data_of(event: bytes) -> bytes | None:
    """The content of its `data:` lines, None if it has none."""
    if event.startswith(b"data:") and event.find(b"\n") + 2 == len(event) and b"\r" not in event:
        return event[5:-2]
    lines = _DATA_LINE.findall(event)
    return b"\n".join(lines) if lines else None


class Meter:
    """Counts one stream. `done`: [DONE] came, which ends it; `surplus` bytes of the chunk are behind it. `failed`: the
    engine reported an error; `used`: the usage chunk's count.

    `native`: Triton's native API, where an answer is a `text_output`, and no event marks the end.
    """

    __slots__ = ("_answer", "_last", "_native", "_splitter", "done", "failed", "surplus", "used")

    def __init__(self, *, native: bool = False) -> None:
        self._splitter = Splitter()
        self._native = native
        self._answer = b'"text_output"' if native else b'"choices"'
        self._last = b""
        self.done = False
        self.failed = False
        self.surplus = 0
        self.used: int | None = None

    @property
    def whole(self) -> bool:
        """At the end of the stream: whether the answer is complete."""
        return self.done or self._native or _FINISH.search(self._last) is not None

    def feed(self, chunk: bytes) -> int:
        """The tokens in the events that this chunk completes."""
        # As in `Splitter.feed`: a chunk is one whole event, in most cases.
        if not self._splitter.tail and chunk.find(b"\n\n") + 2 == len(chunk) > 1 and b"\r" not in chunk:
            return self._event(chunk)
        tokens = 0
        for event in self._splitter.feed(chunk):
            if self.done:
                self.surplus += len(event)
            else:
                tokens += self._event(event)
        tail = self._splitter.tail
        if self.done:
            self.surplus += len(tail)
        elif is_done(tail) and tail.rstrip() in (b"data: [DONE]", b"data:[DONE]"):
            self.done = True  # the blank line may never come
        return tokens

    def close(self) -> int:
        """The stream is over: the tokens in an event that no blank line ended."""
        tail = self._splitter.rest()
        return self._event(tail) if tail else 0

    def _event(self, event: bytes) -> int:
        """The tokens of one event: 1 or 0."""
        if not event.startswith(b"data:"):
            found = _DATA.search(event)
            if _ERROR_EVENT.search(event):
                self.failed = True
                return 0
            if found is None:
                return 0
            event = event[found.end() - 5 :]
        if b'"delta"' in event:
            self._last = event
            empty = _EMPTY_DELTA.search(event)
            # Without a role, an empty content is a token: a part of a character whose text is still to come.
            opens_or_closes = empty is not None and (b'"role"' in empty[0] or b'"content"' not in empty[0])
            return 0 if opens_or_closes else 1
        if self._answer in event:
            if b"[]" in event and _NO_CHOICES.search(event):
                used = _USED.search(event)
                self.used = int(used[1]) if used else self.used
                return 0
            self._last = event
            return 1
        if is_done(event):
            self.done = True
        elif _ERROR.search(event):
            self.failed = True
        return 0
