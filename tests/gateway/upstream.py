"""A real engine over HTTP for the gateway's tests: answers as vLLM sends them, and the many ways to fail."""

import asyncio
import contextlib
import gzip
import json
from dataclasses import dataclass, field

from aiohttp import web


def sse(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chat_chunk(delta, **more):
    return {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "tiny"} | {
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}],
        **more,
    }


def closing():
    """The chunk with the finish reason."""
    return chat_chunk({}) | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def chat_events(words, usage=False):
    """A chat answer as vLLM streams it."""
    events = [sse(chat_chunk({"role": "assistant", "content": ""}))]
    events += [sse(chat_chunk({"content": f"w{number} "})) for number in range(words)]
    if usage:
        counts = {"prompt_tokens": 3, "completion_tokens": words, "total_tokens": 3 + words}
        events.append(sse(chat_chunk({}, usage=counts) | {"choices": []}))
    return [*events, b"data: [DONE]\n\n"]


def completion_events(words):
    base = {"id": "t1", "object": "text_completion", "created": 1, "model": "tiny"}
    choice = {"index": 0, "logprobs": None, "finish_reason": None}
    events = [sse(base | {"choices": [choice | {"text": f"w{number} "}]}) for number in range(words)]
    return [*events, b"data: [DONE]\n\n"]


def typed(kind, **fields):
    """An event as Responses and Messages have them."""
    return b"event: " + kind.encode() + b"\n" + sse({"type": kind} | fields)


def response_of(words, status="completed"):
    content = [{"type": "output_text", "text": "w " * words, "annotations": []}]
    return {
        "id": "resp_1", "object": "response", "created_at": 1, "model": "tiny", "status": status, "tools": [],
        "parallel_tool_calls": True, "tool_choice": "auto",
        "output": [{"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": content}],
        "usage": {"input_tokens": 3, "output_tokens": words, "total_tokens": 3 + words,
                  "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}},
    }  # fmt: skip


def response_events(words):
    """An answer of `/v1/responses` as vLLM streams it."""
    at = {"item_id": "m", "output_index": 0, "content_index": 0, "logprobs": []}
    begun = response_of(0, "in_progress") | {"output": [], "usage": None}
    events = [typed("response.created", response=begun, sequence_number=0)]
    for number in range(words):
        events.append(typed("response.output_text.delta", delta=f"w{number} ", sequence_number=number + 1, **at))
    return [*events, typed("response.completed", response=response_of(words), sequence_number=words + 1)]


def message_of(words):
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "tiny", "stop_reason": "end_turn",
        "stop_sequence": None, "content": [{"type": "text", "text": "w " * words}],
        "usage": {"input_tokens": 3, "output_tokens": words},
    }  # fmt: skip


def message_events(words):
    """An answer of `/v1/messages` as vLLM streams it."""
    begun = message_of(0) | {"content": [], "stop_reason": None}
    events = [typed("message_start", message=begun)]
    events += [typed("content_block_start", index=0, content_block={"type": "text", "text": ""}), typed("ping")]
    for number in range(words):
        delta = {"type": "text_delta", "text": f"w{number} "}
        events.append(typed("content_block_delta", index=0, delta=delta))
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    usage = {"input_tokens": 3, "output_tokens": words}
    events += [typed("content_block_stop", index=0), typed("message_delta", delta=ended, usage=usage)]
    return [*events, typed("message_stop")]


def agent_events():
    """A chat that reasons and calls a tool, several tokens an event: 11, by the usage on every chunk."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "look", "arguments": ""}}
    more = [{"index": 0, "function": {"arguments": text}} for text in ('{"at": "data: ', '[DONE]"}')]
    deltas = [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"reasoning_content": "so"}]
    deltas += [{"content": "I "}, {"tool_calls": [call]}, *({"tool_calls": [piece]} for piece in more)]
    counts = (0, 2, 5, 6, 8, 10, 11)
    events = [sse(chat_chunk(delta, usage=usage_of(used))) for delta, used in zip(deltas, counts, strict=True)]
    last = closing() | {"usage": usage_of(11)}
    last["choices"][0]["finish_reason"] = "tool_calls"
    return [*events[:3], b": ping\n\n", *events[3:], sse(last), sse(total_of(11)), b"data: [DONE]\n\n"]


def usage_of(tokens):
    return {"prompt_tokens": 3, "completion_tokens": tokens, "prompt_tokens_details": {"cached_tokens": 2}}


def total_of(tokens):
    return chat_chunk({}) | {"choices": [], "usage": usage_of(tokens)}


async def overloaded():
    return web.json_response({"error": {"message": "too many"}}, status=503, headers={"retry-after": "7"})


async def redirected():
    return web.Response(status=307, headers={"location": "http://10.0.0.1:8000/v1/completions"})


async def slow_whole(request):
    """JSON whose head comes long before its end."""
    response = web.StreamResponse(headers={"content-type": "application/json"})
    await response.prepare(request)
    await response.write(b'{"choices":')
    await asyncio.sleep(0.3)
    await response.write(b"[]}")
    return response


async def after(seconds, answer):
    await asyncio.sleep(seconds)
    return await answer


async def half(request):
    """A body that ends before its length."""
    response = web.StreamResponse(headers={"content-length": "1000"})
    await response.prepare(request)
    await response.write(b"x" * 10)
    await asyncio.sleep(0.01)
    request.transport.abort()
    return response


async def garbage(request):
    request.transport.write(b"this is not HTTP\r\n\r\n")
    request.transport.close()
    return web.Response()


TYPED = {"/v1/responses": (response_events, response_of), "/v1/messages": (message_events, message_of)}


@dataclass
class Engine:
    """A real HTTP engine. A body's `play` sets how it answers; `seen` are the requests, `left` those cut short."""

    seen: list = field(default_factory=list)
    left: int = 0
    sent: bytes = b""
    sent_bytes: int = 0
    running: int = 0

    def app(self):
        app = web.Application(client_max_size=1 << 26)
        app.router.add_route("*", "/{path:.*}", self.serve)
        return app

    async def serve(self, request):
        body = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.seen.append((request.method, request.raw_path, headers, body))
        try:
            fields = json.loads(body) if body[:1] == b"{" else {}
        except ValueError:
            return web.json_response({"error": {"message": "?", "type": "invalid_request_error"}}, status=400)
        self.running += 1
        try:
            return await self.play(request, fields)
        except (asyncio.CancelledError, ConnectionError):
            self.left += 1
            raise
        finally:
            self.running -= 1

    async def play(self, request, fields):
        limit = fields.get("max_tokens", fields.get("max_output_tokens"))
        words = min(limit, 5000) if isinstance(limit, int) and limit > 0 else 3
        events = TYPED.get(request.path, (chat_events, None))[0](words)
        ways = {
            "long": lambda: self.stream(request, [b"data: " + b"x" * 65536 + b"\n\n"] * 4000),
            "no-done": lambda: self.stream(request, [*events[:-1], sse(closing())]),
            "cut-off": lambda: self.stream(request, events[:-1]),
            "error-event": lambda: self.stream(request, [*events[:2], sse({"error": {"message": "oh"}}), events[-1]]),
            "break-off": lambda: self.stream(request, events[:-2], abort=True),
            "break-event": lambda: self.stream(request, [*events[:-2], b'data: {"cut'], abort=True),
            "hang": lambda: self.stream(request, events[:-2], hang=True),
            "done-hang": lambda: self.stream(request, events, hang=True),
            "done-cut": lambda: self.stream(request, [*events[:-1], b"data: [DONE]"], hang=True),
            "done-more": lambda: self.stream(request, [b"".join(events) + events[1], *events[1:3]], hang=True),
            "compressed": lambda: self.stream(request, [gzip.compress(b"".join(events))], coding="gzip"),
            "hang-event": lambda: self.stream(request, [*events[:-2], b'data: {"cut'], hang=True),
            "late": lambda: after(0.3, self.stream(request, events)),
            "late-refuse": lambda: after(0.3, overloaded()),
            "late-whole": lambda: after(0.3, self.generate(request, fields | {"stream": False}, words)),
            "slow-whole": lambda: slow_whole(request),
            "redirect": redirected,
            "agent": lambda: self.stream(request, agent_events()),
            "refuse": overloaded,
            "garbage": lambda: garbage(request),
            "half": lambda: half(request),
            "silent": lambda: asyncio.sleep(3600),
            None: lambda: self.usual(request, fields, words),
        }
        return await ways[fields.get("play")]()

    async def usual(self, request, fields, words):
        if request.path.endswith("generate_stream"):
            return await self.stream(request, [sse({"text_output": f"w{number}"}) for number in range(words)])
        if request.path in ("/v1/completions", "/v1/chat/completions"):
            return await self.generate(request, fields, words)
        if request.path in TYPED and request.method == "POST":
            events, whole = TYPED[request.path]
            if fields.get("stream"):
                return await self.stream(request, events(words))
            return web.json_response(whole(words))
        return web.Response(
            body=b"\x00plain\xff",
            headers={"x-engine": "yes", "x-request-id": "engine", "connection": "x-drop", "x-drop": "1"},
        )

    async def generate(self, request, fields, words):
        chat = request.path.endswith("chat/completions")
        if fields.get("stream"):
            usage = bool((fields.get("stream_options") or {}).get("include_usage"))
            return await self.stream(request, chat_events(words, usage) if chat else completion_events(words))
        text = "w " * words
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        counts = {"prompt_tokens": 3, "completion_tokens": words, "total_tokens": 3 + words}
        answer = {"id": "a", "created": 1, "model": "tiny", "object": "chat.completion" if chat else "text_completion"}
        answer |= {"choices": [choice | {"index": 0, "finish_reason": "length"}], "usage": counts}
        self.sent = json.dumps(answer, indent=1).encode()
        return web.Response(body=self.sent, content_type="application/json", headers={"x-engine": "yes"})

    async def stream(self, request, events, *, hang=False, abort=False, coding=None):
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8", "x-engine": "yes"})
        if coding is not None:
            response.headers["content-encoding"] = coding
        await response.prepare(request)
        self.sent = b"".join(events) if len(events) < 1000 else b""
        for event in events:
            await response.write(event)
            self.sent_bytes += len(event)
        if hang:
            await asyncio.sleep(3600)
        if abort:
            await asyncio.sleep(0.01)
            request.transport.abort()
        return response


@contextlib.asynccontextmanager
async def engine_server(engine):
    runner = web.AppRunner(engine.app(), handler_cancellation=True, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
