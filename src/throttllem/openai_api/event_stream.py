"""Reads server-sent events of OpenAI's API from bytes that may be cut anywhere, within bounds.

`Splitter` cuts a stream into events. `Meter` counts the tokens in one by searching its bytes for keys, which costs a
fraction of parsing: JSON escapes every quote inside a string, so a key with its quotes and colon is always a key. Only
events in which the engine counts itself (usage, token ids, log probabilities) are parsed. Any other is taken for one
token, except [DONE], errors, and chunks that only open or close an answer.
"""

from __future__ import annotations

import re
from dataclasses import replace

from pydantic_core import from_json

from throttllem.openai_api.usage import MOST_TOKENS, NO_USAGE, Usage, choices_in, tokens_in, usage_in

MOST_BYTES = 1 << 20
"""The most bytes of one event that are held until it is whole."""
_END = re.compile(rb"\r\n\r\n|\n\n|\r\r|\n\r\n")
_DATA_LINE = re.compile(rb"(?:^|[\r\n])data:([^\r\n]*)")
_DATA = re.compile(rb"(?:^|[\r\n])data:")
_ERROR_EVENT = re.compile(rb"(?:^|[\r\n])event: ?error[ \t]*[\r\n]")
_ERROR = re.compile(rb'"error"\s*:\s*[{"]|"object"\s*:\s*"error"')
_FINISH = re.compile(rb'"finish_reason"\s*:\s*"')
_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_LOGPROBS = re.compile(rb'"logprobs"\s*:\s*\{')
_TOKEN_IDS = re.compile(rb'"token_ids"\s*:\s*\[')
_NO_CHOICES = re.compile(rb'"choices"\s*:\s*\[\s*\]')
_TEXT = re.compile(rb'"(?:text|content)"\s*:\s*"([^"\\]+)"')
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
    engine reported an error.

    `native`: Triton's native API, where an answer is a `text_output`, and no event marks the end. `sequences` are
    generated side by side, with `most_tokens` in all. `echo`: the prompt is part of the answer.
    """

    # An engine's usage beside a choice is that choice's (vLLM, SGLang) or that of all. The latter grows with every
    # token of any choice, and is no less than the events: what is not so is of one choice.

    __slots__ = (
        "_answer",
        "_booked",
        "_by_choice",
        "_echo",
        "_estimated",
        "_events",
        "_last",
        "_like",
        "_most_tokens",
        "_native",
        "_per_choice",
        "_sequences",
        "_splitter",
        "_total",
        "_usage",
        "done",
        "failed",
        "surplus",
    )

    def __init__(
        self, *, native: bool = False, sequences: int = 1, most_tokens: int = MOST_TOKENS, echo: bool = False
    ) -> None:
        self._splitter = Splitter()
        self._native = native
        self._answer = b'"text_output"' if native else b'"choices"'
        self._sequences = sequences
        self._most_tokens = most_tokens
        self._echo = echo
        self._last = b""
        self._like = b"\0", b"\0"
        """Of the last event that was taken for a token, what stands before its text and behind it."""
        self._booked = self._events = 0
        self._estimated = False
        self._by_choice: dict[int, int] = {}
        self._per_choice = False
        self._total: int | None = None
        self.done = False
        self.failed = False
        self.surplus = 0
        self._usage = NO_USAGE

    @property
    def used(self) -> int | None:
        """The engine's count of all output tokens, None if it gave none that can be true."""
        total = self._total
        if total is None and (not self._per_choice or len(self._by_choice) == self._sequences):
            total = self._by_choices()
        return total if total or not self._events else None

    @property
    def counted(self) -> Usage:
        """What the engine counted. No output tokens: of some, only their events were seen."""
        used = self.used
        if used is None and not self._estimated and self._booked:
            used = self._booked
        return replace(self._usage, output_tokens=used)

    @property
    def whole(self) -> bool:
        """At the end of the stream: whether the answer is complete."""
        return self.done or self._native or _FINISH.search(self._last) is not None

    def feed(self, chunk: bytes) -> int:
        """The tokens in the events that this chunk completes."""
        # As in `Splitter.feed`: a chunk is one whole event, in most cases.
        if not self._splitter.tail and chunk.find(b"\n\n") + 2 == len(chunk) > 1 and b"\r" not in chunk:
            head, tail = self._like
            end = len(chunk) - len(tail)
            alike = chunk.startswith(head) and chunk.endswith(tail) and chunk.find(b'"', len(head)) == end > len(head)
            if alike and self._booked < self._most_tokens:
                # The last one over again, but for its text: most chunks are.
                self._last = chunk
                self._events += 1
                self._booked += 1
                return 1
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
        """The tokens of one event."""
        if not event.startswith(b"data:"):
            found = _DATA.search(event)
            if _ERROR_EVENT.search(event):
                self.failed = True
                return 0
            if found is None:
                return 0
            event = event[found.end() - 5 :]
        counted = (
            (b'"usage"' in event and _USAGE.search(event))
            or (b'"logprobs"' in event and b'"logprobs":null' not in event and _LOGPROBS.search(event))
            or (b'"token_ids"' in event and _TOKEN_IDS.search(event))
            or (b"[]" in event and _NO_CHOICES.search(event))
        )
        if b'"delta"' in event:
            if counted or event.count(b'"delta"') > 1:
                return self._parsed(event)
            self._last = event
            empty = _EMPTY_DELTA.search(event)
            # Without a role, an empty content is a token: a part of a character whose text is still to come.
            if empty is not None and (b'"role"' in empty[0] or b'"content"' not in empty[0]):
                return 0
        elif self._answer in event:
            if not self._native and (counted or event.count(b'"text"') > 1):
                return self._parsed(event)
            self._last = event
        elif is_done(event):
            self.done = True
            return 0
        elif _ERROR.search(event):
            self.failed = True
            return 0
        else:
            return self._parsed(event) if counted else 0
        self._estimated = True
        self._events += 1
        if self._booked >= self._most_tokens:
            return 0
        self._booked += 1
        if (text := _TEXT.search(event)) is not None:
            self._like = event[: text.start(1)], event[text.end(1) :]
        return 1

    def _parsed(self, event: bytes) -> int:
        """The tokens of an event that holds the engine's own counts, or several choices."""
        try:
            fields = from_json(data_of(event) or b"")
        except ValueError:
            return 0
        if not isinstance(fields, dict):
            return 0
        choices = choices_in(fields)
        if choices:
            self._last = event
        tokens = 0
        for choice in choices:
            count = tokens_in(choice, echo=self._echo)
            if count is None:
                count = int(_carries(choice))
                self._estimated = self._estimated or count > 0
            tokens += count
            self._events += count > 0
        usage = usage_in(fields.get("usage"), self._most_tokens)
        self._usage = self._usage.updated(usage)
        if usage.output_tokens is not None:
            # One that comes with the end only is no time of tokens: it corrects the sum when the stream is over.
            late = not self._by_choice and self._total is None and _FINISH.search(self._last) is not None
            reported = self._note(usage.output_tokens, choices, moved=tokens > 0)
            if not late and (reported or not self._events):
                tokens = reported - self._booked
        tokens = max(0, min(tokens, self._most_tokens - self._booked))
        self._booked += tokens
        return tokens

    def _note(self, tokens: int, choices: list[dict[str, object]], *, moved: bool) -> int:
        """Take in a usage, of one choice or of all; the tokens of all choices by then. `moved`: beside new tokens."""
        if not choices or self._sequences == 1:
            self._total = max(tokens, self._total or 0)
            return self._total
        index = choices[0].get("index")
        index = index if type(index) is int else 0
        before = self._by_choice
        others = any(count >= tokens for choice, count in before.items() if choice != index)
        self._per_choice = self._per_choice or tokens < self._events or (moved and others)
        if index in before or len(before) < self._sequences:
            before[index] = max(tokens, before.get(index, 0))
        return self._by_choices() or 0

    def _by_choices(self) -> int | None:
        """The tokens of all choices by the usages beside them."""
        counts = self._by_choice.values()
        return sum(counts) if self._per_choice else max(counts, default=None)


def _carries(choice: dict[str, object]) -> bool:
    """Whether a choice without counts is a token, as `Meter._event` sees it."""
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return "delta" not in choice
    held = any(value for name, value in delta.items() if name != "role")
    return held or ("role" not in delta and "content" in delta)
