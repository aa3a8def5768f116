"""Counts streams of typed events: OpenAI's Responses and Anthropic's Messages.

Each event names its type in its `event:` line. A delta of an output is one token, of a text, of reasoning, or of the
arguments of a function. The last event of a stream has the engine's own count, and nothing follows it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from pydantic_core import from_json

from throttllem.openai_api.event_stream import Meter, data_of
from throttllem.openai_api.usage import usage_in

_TYPE = re.compile(rb"(?:^|[\r\n])event: ?([\w.]+)")
_NO_TEXT = re.compile(rb'"(?:delta|text|thinking|partial_json)"\s*:\s*""')
_LAST = frozenset({b"response.completed", b"response.incomplete", b"message_stop"})
_FAILED = frozenset({b"response.failed", b"error"})
_COUNTED = frozenset({b"response.completed", b"response.incomplete", b"message_start", b"message_delta"})


class TypedMeter(Meter):
    """The same as Meter, for a stream of typed events."""

    __slots__ = ()

    @property
    def whole(self) -> bool:
        """At the end of the stream: whether its last event came."""
        return self.done

    def _event(self, event: bytes) -> int:
        found = _TYPE.search(event)
        kind = self._type_of(event) if found is None else found[1]
        is_delta = kind == b"content_block_delta" or (kind.startswith(b"response.") and kind.endswith(b".delta"))
        if is_delta:
            if b'"signature_delta"' in event or _NO_TEXT.search(event) or self._booked >= self._most_tokens:
                return 0
            self._estimated = True
            self._events += 1
            self._booked += 1
            return 1
        if kind in _COUNTED:
            self._take_in(event)
        self.done = self.done or kind in _LAST
        self.failed = self.failed or kind in _FAILED
        return 0

    @staticmethod
    def _type_of(event: bytes) -> bytes:
        """The type that an event without an `event:` line has in its data; empty if it has none."""
        kind = _fields(event).get("type")
        return kind.encode(errors="replace") if isinstance(kind, str) else b""

    def _take_in(self, event: bytes) -> None:
        """The engine's own counts in an event."""
        fields = _fields(event)
        begun = fields.get("message")
        if isinstance(begun, dict):  # Anthropic's first event: the prompt is counted, the output is not yet
            self._usage = replace(usage_in(begun.get("usage")), output_tokens=None)
            return
        response = fields.get("response")
        usage = usage_in((response if isinstance(response, dict) else fields).get("usage"), self._most_tokens)
        self._usage = self._usage.updated(usage)
        if usage.output_tokens is not None:
            self._total = usage.output_tokens


def _fields(event: bytes) -> dict[str, Any]:
    """The object in the data of an event; empty if there is none."""
    try:
        fields = from_json(data_of(event) or b"")
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}
