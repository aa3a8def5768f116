"""One OpenAI request on its way through Triton: put together, sent, its answer written as it comes.

Knows nothing of what the server is or holds; `engines/triton/engine.py` does.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from uuid import uuid4

from pydantic_core import from_json, to_json

from throttllem.engines.base import Call, EngineError, Headers, Reply, whole_reply
from throttllem.engines.http import Upstream
from throttllem.engines.triton.answer import Answer, Chunks, Named, Usage, whole
from throttllem.engines.triton.api import (
    JSON,
    UnsupportedError,
    error_body,
    error_reply,
    refused,
    stop_words,
    to_triton,
    wants_usage,
)

EVENT_STREAM: Headers = (("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache"))
_KEPT_HEADERS = frozenset({"authorization", "x-request-id", "traceparent", "tracestate"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request as Triton gets it (`call`), and what its answer must look like."""

    call: Call
    named: Named
    stream: bool
    usage: bool
    prompt_tokens: int
    limit: int
    stops: tuple[str, ...]

    def usage_of(self, answer: Answer) -> Usage:
        """Tokens of prompt and answer."""
        return Usage(prompt_tokens=self.prompt_tokens, completion_tokens=answer.tokens)


def body_of(call: Call) -> dict[str, object]:
    """The JSON object that a client sent. Raises UnsupportedError if it is none."""
    if call.ask is not None:
        return call.ask.body
    try:
        body = from_json(call.body)
    except ValueError as error:
        raise UnsupportedError(None, f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise UnsupportedError(None, "the body must be a JSON object")
    return body


def new_job(
    call: Call,
    body: dict[str, object],
    *,
    base: str,
    model: str,
    chat: bool,
    text: str,
    prompt_tokens: int,
    limit: int,
    inputs: frozenset[str],
) -> Job:
    """A job for the model at the path `base`. Raises UnsupportedError for fields that it cannot serve."""
    native = to_triton(body, text=text, limit=limit, inputs=inputs)
    kept = tuple(pair for pair in call.headers if pair[0] in _KEPT_HEADERS)
    named = Named(
        id=f"{'chatcmpl' if chat else 'cmpl'}-{uuid4().hex}",
        created=int(time.time()),
        model=str(body.get("model") or model),
        chat=chat,
    )
    return Job(
        call=Call(method="POST", path=f"{base}/generate_stream", headers=JSON + kept, body=to_json(native)),
        named=named,
        stream=body.get("stream") is True,
        usage=wants_usage(body),
        prompt_tokens=prompt_tokens,
        limit=limit,
        stops=stop_words(body),
    )


@asynccontextmanager
async def serve(upstream: Upstream, job: Job) -> AsyncIterator[Reply]:
    """Send the job; its reply lasts as long as the block, and leaving early ends it in Triton."""
    async with upstream.open(job.call) as reply:
        if reply.status != 200:
            why = refused(await reply.body())
            yield error_reply(why, reply.status if reply.status >= 400 else 502)
        elif job.stream:
            async with aclosing(_streamed(upstream.url, reply, job)) as chunks:
                yield Reply(status=200, headers=EVENT_STREAM, read=lambda: anext(chunks, b""))
        else:
            yield whole_reply(200, JSON, await _collected(upstream.url, reply, job))


async def _texts(url: str, reply: Reply, answer: Answer) -> AsyncGenerator[list[str], None]:
    """The texts of each chunk of bytes, until the answer is over. Raises EngineError if it is no answer."""
    try:
        while chunk := await reply.read():
            yield answer.feed(chunk)
            if answer.over:
                return
        yield answer.feed(b"\n\n")  # the last event may lack its blank line
    except ValueError as error:
        raise EngineError(f"the engine at {url} answers what cannot be read: {error}") from error
    if not answer.begun:
        raise EngineError(f"the engine at {url} ended a stream without an answer")


async def _streamed(url: str, reply: Reply, job: Job) -> AsyncGenerator[bytes, None]:
    answer, chunks = Answer(limit=job.limit, stops=job.stops), Chunks(job.named)
    first, ended = chunks.role(), False
    async with aclosing(_texts(url, reply, answer)) as read:
        async for texts in read:
            if ended:
                continue
            if ended := answer.full and not answer.over:
                # The reason goes with the last token, as a chunk of its own would count as one more.
                *before, last = texts or [""]
                shown = b"".join(map(chunks.text, before)) + chunks.last(last + answer.rest(), answer.reason)
            else:
                shown = b"".join(map(chunks.text, texts))
            if shown:
                yield first + shown
                first = b""
    if answer.failure is not None:
        yield b"data: " + error_body(answer.failure, 500) + b"\n\n"
        return
    rest = answer.rest()
    if not ended:
        yield first + (chunks.last(rest, answer.reason) if rest else chunks.closed(answer.reason))
    yield chunks.end(job.usage_of(answer) if job.usage else None)


async def _collected(url: str, reply: Reply, job: Job) -> bytes:
    answer = Answer(limit=job.limit, stops=job.stops)
    texts = [text async for some in _texts(url, reply, answer) for text in some]
    if answer.failure is not None:
        raise EngineError(f"the engine at {url} failed: {answer.failure}")
    return whole("".join(texts) + answer.rest(), answer.reason, job.usage_of(answer), job.named)
