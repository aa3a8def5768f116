"""An OpenAI server that costs next to nothing: prebuilt chunks at a fixed pace per stream, for measuring what stands in
front of it. Run as `python -m tools.evaluation.pacer PORT`; speaks just enough HTTP for proxies that keep connections.

`POST /pace {"tokens_per_s": 20, "first_s": 0.02, "together": false}` sets the pace of what comes later; `together`:
every stream's tokens come in one burst per step, as those of an engine that batches do.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any

import uvloop

MODEL = "paced"
MARK = b" zq"
"""Stands in every token's text and nowhere else."""
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_METRICS = """\
vllm:num_requests_running{{engine="0"}} {running}
vllm:num_requests_waiting{{engine="0"}} 0
vllm:kv_cache_usage_perc{{engine="0"}} 0.0
vllm:cache_config_info{{block_size="16",engine="0",num_gpu_blocks="40001"}} 1.0
"""


def _event(delta: object, finish: str | None) -> bytes:
    fields = {
        "id": "chatcmpl-0123456789abcdef0123456789abcdef",
        "object": "chat.completion.chunk",
        "created": 1750000000,
        "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}],
    }
    return b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_ROLE = _chunk(_event({"role": "assistant", "content": ""}, None))
_TOKEN = _chunk(_event({"content": MARK.decode()}, None))
_LAST = _chunk(_event({"content": MARK.decode()}, "length")) + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class RetryEstimator:
    """When tokens come, for all streams; one timer per stream, or one step for all."""

    def __init__(self) -> None:
        self.step_s, self.first_s, self.together = 0.05, 0.02, False
        self.running: set[Connection] = set()
        self._stepping = False

    def set(self, fields: dict[str, Any]) -> None:
        """What streams that begin later follow."""
        self.step_s, self.first_s = 1.0 / fields["tokens_per_s"], fields["first_s"]
        self.together = fields["together"]

    def began(self) -> None:
        """A stream waits for the next step of all."""
        if not self._stepping:
            self._stepping = True
            loop = asyncio.get_running_loop()
            loop.call_later(self.step_s, self._step, loop.time() + self.step_s)

    def _step(self, due_s: float) -> None:
        for stream in tuple(self.running):
            stream.token()
        self._stepping = bool(self.running)
        if self._stepping:
            loop = asyncio.get_running_loop()
            next_s = max(due_s + self.step_s, loop.time())
            loop.call_at(next_s, self._step, next_s)


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, pace: RetryEstimator) -> None:
        self._pace = pace
        self._transport: Any = None
        self._data = b""
        self._left = 0
        self._due_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Somebody came."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Its stream ends with it."""
        self._pace.running.discard(self)
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Wait for the whole request."""
        self._data += data
        head, gap, body = self._data.partition(b"\r\n\r\n")
        found = _LENGTH.search(head)
        if gap and len(body) >= (int(found[1]) if found else 0):
            self._data = b""
            self._serve(head.split(b" ", 2)[1].decode(), body)

    def _serve(self, path: str, body: bytes) -> None:
        if path.endswith("/chat/completions"):
            self._stream(json.loads(body))
        elif path == "/tokenize":
            self._answer({"count": 12, "max_model_len": 4096, "tokens": list(range(12))})
        elif path == "/pace":
            self._pace.set(json.loads(body))
            self._answer({})
        elif path == "/v1/models":
            self._answer({"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 4096}]})
        elif path == "/metrics":
            self._answer(_METRICS.format(running=len(self._pace.running)))
        else:
            self._answer({}, 200 if path == "/health" else 404)

    def _answer(self, value: object, status: int = 200) -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self._transport.write(b"HTTP/1.1 %d \r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))

    def _stream(self, fields: dict[str, Any]) -> None:
        self._left = fields["max_tokens"]
        self._due_s = time.monotonic() + self._pace.first_s
        self._timer = asyncio.get_running_loop().call_later(self._pace.first_s, self._first)

    def _first(self) -> None:
        self._transport.write(_HEAD + _ROLE)
        self.token()
        if self._left and self._pace.together:
            self._pace.running.add(self)
            self._pace.began()

    def token(self) -> None:
        """The next token, and the end after the last; alone it also asks for the one after."""
        self._left -= 1
        self._transport.write(_TOKEN if self._left else _LAST)
        if not self._left:
            self._pace.running.discard(self)
        elif not self._pace.together:
            self._due_s += self._pace.step_s
            late_s = max(0.0, self._due_s - time.monotonic())
            self._timer = asyncio.get_running_loop().call_later(late_s, self.token)


async def serve(port: int) -> None:
    """Serve until killed."""
    pace = RetryEstimator()
    server = await asyncio.get_running_loop().create_server(lambda: Connection(pace), "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
