"""Odd requests to a real vLLM, directly and through the gateway: the same status and the same body, or a reason."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tools.evaluation.identity import joined
from tools.evaluation.odd_requests import Odd, requests
from tools.testbed.engines.vllm import UNCACHED, vllm
from tools.testbed.gateway import gateway
from tools.testbed.report import Section, Table, Workspace, version_of

_TIMEOUT_S = 60.0
_IDS = re.compile(rb'"(id|item_id|created|created_at|completed_at|request_id)": ?(?:"[^"]*"|[0-9.]+)')
_NOT_PASSED = ("/invocations", "/version", "/ping", "/load", "/docs")
TEXT = """\
Odd requests go to vLLM directly and through the gateway, one after the other: every path, wrong types of every field,
bounds, shapes, methods, headers, encodings (`tools/evaluation/odd_requests.py` has them all). The status must be the
same, and of what is no error the content type and the body, ids and times set aside and the events of a stream joined,
as vLLM cuts streams differently from run to run. The words of errors may differ.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back. `body` without ids and times; an error's fields only, as words may differ."""

    status: int
    kind: str
    raw: bytes

    @property
    def is_error(self) -> bool:
        """Whether it is an error."""
        return self.status >= 400

    def body(self) -> Any:
        """The body as far as two answers must agree."""
        if self.is_error:
            return self.status
        raw = _IDS.sub(rb'"\1":0', self.raw)
        return self.status, self.kind, _typed(raw) if b"event: " in raw else joined(raw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A difference on purpose: which requests have it, and why."""

    reason: str
    holds: Callable[[Odd, Answer, Answer], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One request and both answers; `reason` None: they agree, or nothing explains the difference."""

    odd: Odd
    direct: Answer
    through: Answer

    @property
    def same(self) -> bool:
        """Whether status and body agree."""
        return bool(self.direct.body() == self.through.body())

    @property
    def reason(self) -> str | None:
        """Why they may differ."""
        found = (each.reason for each in DIFFERENCES if each.holds(self.odd, self.direct, self.through))
        return None if self.same else next(found, None)


def send(url: str, odd: Odd) -> Answer:
    """One request on a connection of its own."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=_TIMEOUT_S)
    try:
        connection.putrequest(odd.method, odd.path, skip_accept_encoding=True)
        for name, value in odd.headers:
            connection.putheader(name, value)
        if odd.body is not None:
            connection.putheader("content-length", str(len(odd.body)))
        connection.endheaders(odd.body)
        response = connection.getresponse()
        kind = (response.getheader("content-type") or "").partition(";")[0]
        return Answer(status=response.status, kind=kind, raw=response.read())
    except (OSError, http.client.HTTPException) as error:
        return Answer(status=0, kind=type(error).__name__, raw=b"")
    finally:
        connection.close()


def compare_all(direct: str, through: str, report: Callable[[str], None]) -> list[Compared]:
    """Every request to both, one after the other."""
    found = []
    for number, odd in enumerate(all_odd := requests(), start=1):
        found.append(Compared(odd=odd, direct=send(direct, odd), through=send(through, odd)))
        if number % 50 == 0:
            report(f"{number} of {len(all_odd)}")
    return found


def _typed(raw: bytes) -> list[Any]:
    """A stream of typed events: the deltas of each kind joined, other events without ids and times."""
    found: list[Any] = []
    for event in raw.split(b"\n\n"):
        data = event.partition(b"data: ")[2]
        if not data:
            continue
        fields = json.loads(data)
        fields.pop("sequence_number", None)
        kind, delta = fields.get("type"), fields.get("delta")
        text = delta if isinstance(delta, str) else delta.get("text") if isinstance(delta, dict) else None
        if text is None:
            found.append(fields)
        elif found and isinstance(found[-1], list) and found[-1][0] == kind:
            found[-1][1] += text
        else:
            found.append([kind, text])
    return found


def _named(*names: str) -> Callable[[Odd, Answer, Answer], bool]:
    return lambda odd, direct, through: odd.name in names


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        reason="not passed on: a path of vLLM's own, not of the API",
        holds=lambda odd, direct, through: through.status == 404 and odd.path in _NOT_PASSED,
    ),
    Difference(
        reason="changes the engine for all its clients: an administrator's key is needed",
        holds=lambda odd, direct, through: through.status == 403 and odd.method == "POST",
    ),
    Difference(
        reason="the gateway serves one model's card, which vLLM does not",
        holds=lambda odd, direct, through: (direct.status, through.status) == (404, 200) and "/v1/models/" in odd.path,
    ),
    Difference(
        reason="a compressed body is decompressed, which vLLM does not; what is not as its header says is an error",
        holds=_named("body: gzip", "body: says gzip", "body: brotli"),
    ),
    Difference(
        reason="a redirect of the gateway, with a body",
        holds=lambda odd, direct, through: direct.status == through.status == 307,
    ),
)


def unexplained(found: list[Compared]) -> list[dict[str, Any]]:
    """What differs without a reason."""
    return [
        {
            "request": each.odd.name,
            "direct": (each.direct.status, each.direct.kind, each.direct.raw[:300].decode(errors="replace")),
            "through": (each.through.status, each.through.kind, each.through.raw[:300].decode(errors="replace")),
        }
        for each in found
        if not each.same and each.reason is None
    ]


def section(workspace: Workspace) -> Section:
    """The page of the differences."""
    environment = workspace.environment("vllm")
    with (
        vllm(environment, workspace.folder, flags=UNCACHED, report=workspace.report) as engine,
        gateway(("--engine", engine.url), workspace.folder / "gateway") as up,
    ):
        found = compare_all(engine.url, up.url, workspace.report)
    differ = [each for each in found if not each.same]
    rows = [
        (each.odd.name, str(each.direct.status), str(each.through.status), each.reason or "**not explained**")
        for each in differ
    ]
    caption = f"{len(found) - len(differ)} of {len(found)} requests are answered alike; the others:"
    return Section(
        title="Odd requests, directly and through the gateway",
        text=TEXT,
        tables=(Table(caption=caption, head=("request", "vLLM", "gateway", "why"), rows=rows),),
        results={"requests": len(found), "same": len(found) - len(differ), "unexplained": unexplained(found)},
        versions={"vLLM": version_of(environment, "vllm")},
    )
