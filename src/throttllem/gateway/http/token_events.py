"""How many tokens went by in a stream of server-sent events, told from its bytes as cheaply as can be.

An event is one token, but for [DONE], errors, the usage chunk and chunks that only open or close. JSON escapes every
quote inside a string, so a key with its quotes and colon is found by a plain search of the bytes.
"""

from __future__ import annotations

import re

from throttllem.engines.sse import Splitter

_DATA = re.compile(rb"(?:^|[\r\n])data:")
_TOLD_ERROR = re.compile(rb"(?:^|[\r\n])event: ?error[ \t]*[\r\n]")
_ERROR = re.compile(rb'"error"\s*:\s*[{"]|"object"\s*:\s*"error"')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_USED = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,12})\b')
_EMPTY_DELTA = re.compile(rb'"delta"\s*:\s*\{\s*(?:(?:"role"\s*:\s*"\w+"|"\w+"\s*:\s*(?:""|null|\[\]))[\s,]*)*\}')


class Meter:
    """Counts one stream. `done`: [DONE] came; `failed`: the engine told an error; `used`: tokens by its own word.

    `native`: Triton's own API, where an answer is a `text_output`, and nothing says that the stream is whole.
    """

    __slots__ = ("_answer", "_last", "_native", "_rest", "_split", "done", "failed", "used")

    def __init__(self, *, native: bool = False) -> None:
        events = Splitter()
        self._split, self._rest = events.feed, events.rest
        self._native = native
        self._answer = b'"text_output"' if native else b'"choices"'
        self._last = b""
        self.done = False
        self.failed = False
        self.used: int | None = None

    @property
    def whole(self) -> bool:
        """At the end of the stream: whether the engine had said all that it had to say."""
        return self.done or self._native or _FINISH.search(self._last) is not None

    def feed(self, chunk: bytes) -> int:
        """The tokens in the events that this chunk completes; chunks may cut events anywhere."""
        events = self._split(chunk)
        return self.event(events[0]) if len(events) == 1 else sum(map(self.event, events))

    def close(self) -> int:
        """The stream is over: the tokens in what no blank line ended."""
        tail = self._rest()
        return self.event(tail) if tail else 0

    def event(self, event: bytes) -> int:
        """The tokens of one whole event: 1 or 0."""
        if not event.startswith(b"data:"):
            found = _DATA.search(event)
            if _TOLD_ERROR.search(event):
                self.failed = True
                return 0
            if found is None:
                return 0
            event = event[found.end() - 5 :]
        if b'"delta"' in event:
            self._last = event
            return 0 if _only_opens_or_closes(event) else 1
        if self._answer not in event:
            return self._aside(event)
        if b"[]" in event and _NO_CHOICES.search(event):
            found = _USED.search(event)
            self.used = int(found[1]) if found else self.used
            return 0
        self._last = event
        return 1

    def _aside(self, event: bytes) -> int:
        """An event that holds no part of an answer."""
        if event.startswith((b"data: [DONE]", b"data:[DONE]")):
            self.done = True
        elif _ERROR.search(event):
            self.failed = True
        return 0


def _only_opens_or_closes(event: bytes) -> bool:
    """Whether a chat chunk's delta holds a role and no content, or nothing at all."""
    found = _EMPTY_DELTA.search(event)
    # An empty content without a role is a token whose text is still to come, as when a character has several.
    return found is not None and (b'"role"' in found[0] or b'"content"' not in found[0])
