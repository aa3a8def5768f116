"""Whether a client can distinguish the gateway from vLLM by its answers: bytes, but for ids and times.

An engine that falls behind puts tokens together, so even two direct answers may be cut into events differently; texts
are compared with their events joined.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from tools.testbed.engines.vllm import MODEL, UNCACHED, vllm
from tools.testbed.gateway import gateway
from tools.testbed.report import Section, Table, Workspace, version_of
from tools.testbed.tap import Tap, tapped

TEXT = """\
Each request goes to vLLM directly and through the gateway, one after the other at temperature 0.

*bytes*: every byte that the client got through the gateway is what the engine sent for that very request, in that
order, ids and times included (a tap sits between gateway and engine). *words*: the answer has the content of the direct
one, ids and times set aside: status, content type, texts, tokens, logprobs, usage. Events are joined first, as vLLM's
server cuts streams differently from run to run, for any client. *chance*: drawn again each time, so there is nothing to
compare with.

*its own* marks errors that the gateway finds before vLLM gets the request: the status and the fields of the error
agree, the words and the `type` (`invalid_request_error`, as OpenAI's) are its own. Paths outside `/v1` (and Triton's
`/v2`) are not passed on at all: `/tokenize`, `/metrics` and the like of the engine stay private.
"""
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
COMMON: dict[str, Any] = {"model": MODEL, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
ASK: dict[str, Any] = COMMON | {"prompt": "def main(argv):"}
TALK: dict[str, Any] = COMMON | {"messages": [{"role": "user", "content": "Was heißt das? 你好"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
TWO = {"n": 2, "stream": True, "temperature": 1.0}
"""vLLM has only one answer at temperature 0."""
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
NATIVE_ONLY: dict[str, Any] = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "return_token_ids": True}


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
        """Whether the answer has the content of the direct one, ids and times set aside; None where that is chance."""
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
    """Send it both ways; `sent` is the last answer of the engine at a path."""
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


# ---- the requests -------------------------------------------------------------------------------------------


def cases() -> list[Case]:
    """What a tiny model can be asked."""
    return [
        Case(name="completion", path=PLAIN, body=ASK),
        Case(name="completion, stream", path=PLAIN, body=ASK | {"stream": True}),
        Case(name="completion, stream with usage", path=PLAIN, body=ASK | USAGE),
        Case(
            name="completion, stream, usage in every chunk",
            path=PLAIN,
            body=ASK | {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        ),
        Case(name="completion, logprobs", path=PLAIN, body=ASK | {"logprobs": 3}),
        Case(name="completion, stream, logprobs", path=PLAIN, body=ASK | {"logprobs": 3, "stream": True}),
        Case(name="completion, echo", path=PLAIN, body=ASK | {"echo": True}),
        Case(name="completion, stream, echo", path=PLAIN, body=ASK | {"echo": True, "stream": True}),
        Case(name="completion, stop", path=PLAIN, body=ASK | {"stop": ["e"], "stream": True}),
        Case(name="completion, token ids", path=PLAIN, body=ASK | {"prompt": [300, 400, 500], "stream": True}),
        Case(name="completion, vLLM's own fields", path=PLAIN, body=ASK | NATIVE_ONLY | {"stream": True}),
        Case(name="completion, no max_tokens", path=PLAIN, body={"model": MODEL, "prompt": "x", "temperature": 0}),
        Case(name="completion, list of prompts", path=PLAIN, body=ASK | {"prompt": ["a", "b c"]}),
        Case(
            name="completion, list of prompts, stream",
            path=PLAIN,
            body=ASK | {"prompt": ["a", "b c"], "stream": True},
        ),
        Case(name="completion, n = 2, stream", path=PLAIN, body=ASK | TWO, chance=True),
        Case(name="chat", path=CHAT, body=TALK),
        Case(name="chat, stream", path=CHAT, body=TALK | {"stream": True}),
        Case(name="chat, stream with usage", path=CHAT, body=TALK | USAGE),
        Case(name="chat, logprobs", path=CHAT, body=TALK | {"logprobs": True, "top_logprobs": 2, "stream": True}),
        Case(name="chat, n = 2, stream", path=CHAT, body=TALK | TWO, chance=True),
        Case(name="chat, tools not to be used", path=CHAT, body=TALK | {"tools": [TOOL], "tool_choice": "none"}),
        Case(
            name="chat, JSON only, stream", path=CHAT, body=TALK | USAGE | {"response_format": {"type": "json_object"}}
        ),
        Case(
            name="responses API, passed on as it is",
            path="/v1/responses",
            body={"model": MODEL, "input": "a"},
            chance=True,
        ),
        *_errors(),
    ]


def _errors() -> list[Case]:
    return [
        Case(name="400: temperature -1", path=PLAIN, body=ASK | {"temperature": -1}),
        Case(name="400: temperature -1, stream", path=PLAIN, body=ASK | {"temperature": -1, "stream": True}),
        Case(name="400: tools that vLLM was not set up for", path=CHAT, body=TALK | {"tools": [TOOL]}),
        Case(name="404: no such route", path="/v1/nothing", body={"model": MODEL}),
        Case(name="400: max_tokens beyond the context", path=PLAIN, body=ASK | {"max_tokens": 9999}, own=True),
        Case(name="400: no JSON", path=PLAIN, body=b'{"model": "tiny", "prompt": ', own=True),
        Case(name="400: no prompt", path=PLAIN, body=COMMON, own=True),
        Case(name="400: max_tokens of text", path=PLAIN, body=ASK | {"max_tokens": "many"}, own=True),
        Case(name="404: no such model", path=CHAT, body=TALK | {"model": "nobody"}, own=True),
    ]


def section(workspace: Workspace) -> Section:
    """Send everything both ways. Raises MissingError where vLLM is not installed."""
    venv, folder = workspace.environment("vllm"), workspace.folder
    with vllm(venv, folder, flags=UNCACHED, report=workspace.report) as engine, tapped(engine.url) as tap:
        arguments = ("--engine", tap.url, "--set", f"engines.0.stats={engine.stats}")
        with gateway(arguments, folder / "gateway") as up:
            found = asyncio.run(compare_all(cases(), engine.url, up.url, tap, workspace.report))
    same = sum(each.same for each in found)
    return Section(
        title="Answers through the gateway are those of vLLM",
        text=TEXT,
        tables=(table_of(found, f"{same} of {len(found)} answers are the same."),),
        results={"cases": [each.as_dict() for each in found]},
        versions={"vLLM": version_of(venv, "vllm")},
    )


async def compare_all(
    asked: Sequence[Case], direct: str, through: str, tap: Tap, report: Callable[[str], None]
) -> list[Compared]:
    """Every case, one after the other."""
    found = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        for case in asked:
            found.append(await compare(session, case, direct, through, tap.answer))
            report(f"{case.name}: {'the same' if found[-1].same else 'DIFFERENT'}")
    return found


def table_of(found: Sequence[Compared], caption: str) -> Table:
    """One row per case."""
    rows = [
        (
            each.case.name,
            " and ".join(dict.fromkeys((str(each.direct.status), str(each.through.status)))),
            f"{len(each.through.events):,}",
            f"{len(each.through.raw):,}",
            _words(each.same_bytes, "its own"),
            _words(each.same_words, "chance"),
        )
        for each in found
    ]
    return Table(caption=caption, head=("request", "status", "events", "size", "bytes", "words"), rows=rows)


def _words(same: bool | None, otherwise: str) -> str:
    return otherwise if same is None else "same" if same else "**differ**"
