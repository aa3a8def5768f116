"""One request sent two ways, and how the answers compare: with what the engine sent, and with each other.

An engine that falls behind puts tokens together, so even two direct answers may be cut into events differently; what
they say is compared with their events joined.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

_OWN = re.compile(rb'"(id|created|request_id)": ?(?:"[^"]*"|\d+)')
_JOINED = ("text", "content", "text_output", "reasoning", "reasoning_content")
"""Fields of text that goes on from event to event."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request. `own`: the gateway answers it itself; only status and the fields of the error must agree.

    `chance`: no two answers are alike, so only what the engine sent is compared.
    """

    name: str
    path: str
    body: Mapping[str, Any] | bytes
    own: bool = False
    chance: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back."""

    status: int
    kind: str
    raw: bytes

    @property
    def events(self) -> list[bytes]:
        """The events of a stream; one for a whole body."""
        return [event for event in self.raw.split(b"\n\n") if event.strip()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One case: what came directly, what came through, and what the engine sent to the gateway for it."""

    case: Case
    direct: Answer
    through: Answer
    sent: bytes | None

    @property
    def same_bytes(self) -> bool | None:
        """Whether every byte of the engine reached the client; None where the engine was not asked."""
        return None if self.sent is None else self.through.raw == self.sent

    @property
    def same_words(self) -> bool | None:
        """Whether the answer says what the direct one says, ids and times set aside; None where that is chance."""
        if (self.direct.status, self.direct.kind) != (self.through.status, self.through.kind):
            return False
        if self.case.chance:
            return None
        read = _error_fields if self.case.own else joined
        return bool(read(self.direct.raw) == read(self.through.raw))

    @property
    def same(self) -> bool:
        """Whether nothing differs that should not."""
        return self.same_bytes is not False and self.same_words is not False

    def as_dict(self) -> dict[str, Any]:
        """For JSON; the bytes only where they are of interest."""
        found: dict[str, Any] = {"case": self.case.name, "status": self.through.status}
        found |= {"same_bytes": self.same_bytes, "same_words": self.same_words}
        found |= {"events": len(self.through.events), "bytes": len(self.through.raw)}
        if not self.same or self.case.own:
            found |= {"direct": self.direct.raw.decode()[:2000], "through": self.through.raw.decode()[:2000]}
        return found


async def compare(
    session: aiohttp.ClientSession, case: Case, direct: str, through: str, sent: Callable[[str], bytes | None]
) -> Compared:
    """Send it both ways; `sent` tells what the engine answered last at a path."""
    first, second = await _send(session, direct, case), await _send(session, through, case)
    return Compared(case=case, direct=first, through=second, sent=sent(case.path))


def joined(raw: bytes) -> Any:
    """An answer without ids and times, its events joined: by choice, texts and lists put together, the rest as last."""
    raw = _OWN.sub(rb'"\1":0', raw)
    events = [event.removeprefix(b"data: ") for event in raw.split(b"\n\n") if event.strip()]
    try:
        fields = [json.loads(event) for event in events if event != b"[DONE]"]
    except ValueError:
        return raw
    whole: dict[str, Any] = {"done": events[-1:] == [b"[DONE]"]}
    for each in fields:
        choices = each.pop("choices", []) if isinstance(each, dict) else []
        for choice in choices:
            _join(whole.setdefault(f"choice {choice.get('index')}", {}), choice)
        _join(whole, each if isinstance(each, dict) else {"value": each})
    return whole


def _join(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        before = into.get(name)
        texts = isinstance(value, str) and isinstance(before, str) and name in _JOINED
        if isinstance(value, dict) and isinstance(before, dict):
            _join(before, value)
        elif texts or (isinstance(value, list) and isinstance(before, list)):
            into[name] = before + value
        elif value is not None or name not in into:
            into[name] = value


async def _send(session: aiohttp.ClientSession, url: str, case: Case) -> Answer:
    data = case.body if isinstance(case.body, bytes) else json.dumps(case.body).encode()
    headers = {"content-type": "application/json"}
    async with session.post(f"{url}{case.path}", data=data, headers=headers) as response:
        raw = await response.read()
        return Answer(status=response.status, kind=response.headers.get("content-type", ""), raw=raw)


def _error_fields(raw: bytes) -> Any:
    try:
        return sorted(json.loads(raw)["error"])
    except (ValueError, KeyError, TypeError):
        return raw
