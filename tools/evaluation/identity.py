"""Whether a client can tell the gateway from vLLM by what it is answered: bytes, but for ids and times."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp

from tools.engines.vllm_server import MODEL
from tools.evaluation.bodies import Case, Compared, compare
from tools.evaluation.gateway_process import gateway_process
from tools.evaluation.machine import version_of
from tools.evaluation.section import Section, Table, Workshop
from tools.evaluation.stage import engine_alone
from tools.evaluation.tap import Tap, tapped

TEXT = """\
Each request goes to vLLM directly and through the gateway, one after the other at temperature 0.

*bytes*: every byte that the client got through the gateway is what the engine sent for that very request, in that
order, ids and times included (a tap sits between gateway and engine). *words*: the answer says what the direct answer
says, ids and times set aside: status, content type, texts, tokens, logprobs, usage. Events are joined first, as vLLM's
server cuts streams differently from run to run, whoever asks. *chance*: drawn anew each time, so there is nothing to
compare with.

*its own* marks errors that the gateway finds before vLLM hears of the request: the status and the fields of the error
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


def section(workshop: Workshop) -> Section:
    """Send everything both ways. Raises MissingError where vLLM is not installed."""
    with engine_alone(workshop) as engine, tapped(engine.direct) as tap:
        arguments = ("--engine", tap.url, "--set", f"engines.0.stats={engine.stats}")
        with gateway_process(arguments, workshop.folder / "gateway") as gateway:
            found = asyncio.run(compare_all(cases(), engine.direct, gateway.url, tap, workshop.say))
        version = version_of(engine.vllm, "vllm")
    same = sum(each.same for each in found)
    return Section(
        title="Answers through the gateway are those of vLLM",
        text=TEXT,
        tables=(table_of(found, f"{same} of {len(found)} answers are the same."),),
        results={"cases": [each.as_dict() for each in found]},
        versions={"vLLM": version},
    )


async def compare_all(
    asked: Sequence[Case], direct: str, through: str, tap: Tap, say: Callable[[str], None]
) -> list[Compared]:
    """Every case, one after the other."""
    found = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        for case in asked:
            found.append(await compare(session, case, direct, through, tap.answer))
            say(f"{case.name}: {'the same' if found[-1].same else 'DIFFERENT'}")
    return found


def table_of(found: Sequence[Compared], caption: str) -> Table:
    """One row per case."""
    rows = [
        (
            each.case.name,
            " and ".join(dict.fromkeys((str(each.direct.status), str(each.through.status)))),
            f"{len(each.through.events):,}",
            f"{len(each.through.raw):,}",
            _told(each.same_bytes, "its own"),
            _told(each.same_words, "chance"),
        )
        for each in found
    ]
    return Table(caption=caption, head=("request", "status", "events", "size", "bytes", "words"), rows=rows)


def _told(same: bool | None, otherwise: str) -> str:
    return otherwise if same is None else "same" if same else "**differ**"
