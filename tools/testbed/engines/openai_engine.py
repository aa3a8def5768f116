"""A small OpenAI server that costs next to nothing: prebuilt chunks at a fixed pace, faults on demand.

It speaks as much of vLLM's HTTP as the gateway and plain proxies need. `POST /pace` sets what later requests follow
(`Pace`). With `--gpus` it is the load of fake GPUs: steps stretch as the clock of the first one falls, and all of them
are busy while requests run. `python -m tools.testbed.engines.openai_engine PORT [--library FOLDER --gpus 0,1]`
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvloop

from tools.nvml.build import NAME
from tools.testbed.processes import Process, answers, free_port, started

MODEL = "paced"
MARK = b" zq"
"""Stands in every token's text and nowhere else."""
KV_BLOCKS, BLOCK_TOKENS, CONTEXT_TOKENS = 40_001, 16, 4096
WORDS_TOKENS = 12
"""Of a prompt that is text; `/tokenize` counts as many."""
BUSY_S, SLOWEST = 0.15, 4.0
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
_METRICS = f"""\
vllm:num_requests_running{{engine="0"}} %d
vllm:num_requests_waiting{{engine="0"}} 0
vllm:kv_cache_usage_perc{{engine="0"}} 0.0
vllm:cache_config_info{{block_size="{BLOCK_TOKENS}",engine="0",num_gpu_blocks="{KV_BLOCKS}"}} 1.0
"""


def _event(kind: str, choice: Mapping[str, object]) -> bytes:
    fields = {
        "id": "cmpl-0123456789abcdef0123456789abcdef",
        "object": kind,
        "created": 1750000000,
        "model": MODEL,
        "choices": [{"index": 0, "logprobs": None, "finish_reason": None, **choice}],
    }
    return _chunk(b"data: " + json.dumps(fields, separators=(",", ":")).encode() + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_END = _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
_KINDS = {"chat": "chat.completion.chunk", "text": "text_completion"}


def _choice(kind: str, text: str) -> dict[str, object]:
    return {"delta": {"content": text}} if kind == "chat" else {"text": text}


def _tokens(text: str) -> dict[str, tuple[bytes, bytes]]:
    """A token's event and the last one with the end of the stream, for both kinds of answer."""
    return {
        kind: (
            _event(name, _choice(kind, text)),
            _event(name, _choice(kind, text) | {"finish_reason": "length"}) + _END,
        )
        for kind, name in _KINDS.items()
    }


_BEGIN = {"chat": _HEAD + _event(_KINDS["chat"], {"delta": {"role": "assistant", "content": ""}}), "text": _HEAD}


class FakeGpus:
    """The clock of fake GPUs as an engine's kernels feel it, and the load that they put on them."""

    def __init__(self, library: Path, gpus: Sequence[int]) -> None:
        self._library, self._gpus = ctypes.CDLL(str(library / NAME)), tuple(gpus)
        self._library.fake_nvml_work.argtypes = (ctypes.c_uint, ctypes.c_double, ctypes.c_double)
        self._top_mhz = 0

    def stretch(self) -> float:
        """How many times longer a step lasts than at the highest clock seen so far."""
        mhz = int(self._library.fake_nvml_clock(self._gpus[0])) or self._top_mhz
        self._top_mhz = max(self._top_mhz, mhz)
        return min(SLOWEST, self._top_mhz / mhz) if mhz else 1.0

    def work(self, util: float) -> None:
        """Keep all of them so busy for a short while."""
        for gpu in self._gpus:
            self._library.fake_nvml_work(gpu, util, BUSY_S)


class Pace:
    """When tokens come: a timer per stream, or, `together`, one step for all streams as in an engine that batches.

    Of every `fail_every` requests one is refused and one breaks off (0: none); beyond `most` at once they are refused.
    `pad`: characters that every token has besides.
    """

    def __init__(self, gpus: FakeGpus | None = None, *, served: str = MODEL) -> None:
        self.served = served
        self.step_s, self.first_s, self.together, self.fail_every, self.most = 0.05, 0.02, False, 0, 10**9
        self.pad = 0
        self.events = _tokens(MARK.decode())
        self.gpus = gpus
        self.open: set[Connection] = set()
        self._waiting: set[Connection] = set()
        self._stepping = False
        self._requests = 0

    def set(self, fields: dict[str, Any]) -> None:
        """What later requests follow: any of `step_s`, `first_s`, `together`, `fail_every`, `most`, `pad`."""
        for name, value in fields.items():
            setattr(self, name, value)
        self.events = _tokens(MARK.decode() + "." * self.pad)

    def admit(self, stream: Connection) -> tuple[bool, bool]:
        """Whether a request is served, and whether its answer breaks off."""
        self._requests += 1
        place = self._requests % self.fail_every if self.fail_every else -1
        if len(self.open) >= self.most or place == self.fail_every // 2:
            return False, False
        self.open.add(stream)
        return True, place == 0

    def begin(self, stream: Connection) -> None:
        """Its first token comes after `first_s`."""
        stream.due_s = time.monotonic() + self.first_s
        stream.timer = asyncio.get_running_loop().call_later(self.first_s, stream.first)

    def page(self) -> str:
        """What `/metrics` shows."""
        return _METRICS % len(self.open)

    def leave(self, stream: Connection) -> None:
        """Its answer has ended."""
        self.open.discard(stream)
        self._waiting.discard(stream)

    def wait(self, stream: Connection) -> None:
        """It has its next token with the next step of all."""
        self._waiting.add(stream)
        if not self._stepping:
            self._stepping = True
            loop = asyncio.get_running_loop()
            seconds = self._seconds()
            loop.call_later(seconds, self._step, loop.time() + seconds)

    def _step(self, due_s: float) -> None:
        waiting, self._waiting = self._waiting, set()
        for stream in waiting:
            stream.token()
        self._stepping = bool(self._waiting)
        if self._stepping:
            loop = asyncio.get_running_loop()
            next_s = max(due_s + self._seconds(), loop.time())
            loop.call_at(next_s, self._step, next_s)

    def _seconds(self) -> float:
        if self.gpus is None:
            return self.step_s
        self.gpus.work(min(1.0, 0.3 + 0.1 * len(self.open)))
        return self.step_s * self.gpus.stretch()


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._transport: Any = None
        self._data = b""
        self._kind, self._stream, self._breaks = "chat", True, False
        self._tokens = self._left = 0
        self.prompt_tokens = 0
        self.due_s = 0.0
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """The answer ends with its connection."""
        self._pace.leave(self)
        if self.timer is not None:
            self.timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Serve once the whole request has arrived."""
        self._data += data
        head, gap, body = self._data.partition(b"\r\n\r\n")
        found = _LENGTH.search(head)
        if gap and len(body) >= (int(found[1]) if found else 0):
            self._data = b""
            self._serve(head.split(b" ", 2)[1].decode(), body)

    def _serve(self, path: str, body: bytes) -> None:
        if path.endswith("/completions"):
            self._complete("chat" if "chat" in path else "text", json.loads(body))
        elif path == "/tokenize":
            counted = list(range(WORDS_TOKENS))
            self._answer({"count": WORDS_TOKENS, "max_model_len": CONTEXT_TOKENS, "tokens": counted})
        elif path == "/pace":
            self._pace.set(json.loads(body))
            self._answer({})
        elif path == "/v1/models":
            card = {"id": self._pace.served, "object": "model", "max_model_len": CONTEXT_TOKENS}
            self._answer({"object": "list", "data": [card]})
        elif path == "/metrics":
            self._answer(self._pace.page())
        else:
            self._answer({}, 200 if path == "/health" else 404)

    def _answer(self, value: object, status: int = 200) -> None:
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self._transport.write(b"HTTP/1.1 %d \r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body))

    def _complete(self, kind: str, fields: dict[str, Any]) -> None:
        served, self._breaks = self._pace.admit(self)
        if not served:
            self._answer({"error": {"message": "refused", "type": "injected", "param": None, "code": None}}, 503)
            return
        self._kind, self._stream = kind, bool(fields.get("stream"))
        self._tokens = self._left = fields.get("max_tokens") or 16
        prompt = fields.get("prompt")
        self.prompt_tokens = len(prompt) if isinstance(prompt, list) else WORDS_TOKENS
        self._pace.begin(self)

    def first(self) -> None:
        """Begin the answer, with its first token."""
        if self._stream:
            self._transport.write(_BEGIN[self._kind])
        self.token()

    def token(self) -> None:
        """Make the next token, send it where the answer is streamed, and wait for the one after it."""
        self._left -= 1
        if self._breaks:
            self._transport.abort()
        elif not self._left:
            self._pace.leave(self)
            self._end()
        else:
            if self._stream:
                self._transport.write(self._pace.events[self._kind][0])
            if self._pace.together:
                self._pace.wait(self)
            else:
                self.due_s += self._pace.step_s
                late_s = max(0.0, self.due_s - time.monotonic())
                self.timer = asyncio.get_running_loop().call_later(late_s, self.token)

    def _end(self) -> None:
        if self._stream:
            self._transport.write(self._pace.events[self._kind][1])
            return
        text = MARK.decode() * self._tokens
        choice = {"message": {"role": "assistant", "content": text}} if self._kind == "chat" else {"text": text}
        total = WORDS_TOKENS + self._tokens
        usage = {"prompt_tokens": WORDS_TOKENS, "completion_tokens": self._tokens, "total_tokens": total}
        self._answer(
            {"id": "x", "model": MODEL, "choices": [{"index": 0, "finish_reason": "length", **choice}], "usage": usage}
        )


async def serve(port: int, pace: Pace, host: str = "127.0.0.1") -> None:
    """Serve until killed."""
    server = await asyncio.get_running_loop().create_server(lambda: Connection(pace), host, port, backlog=1024)
    await server.serve_forever()


@contextmanager
def openai_engine(log: Path, *prefix: str, port: int | None = None) -> Iterator[tuple[str, Process]]:
    """One in a process: its URL. `prefix` stands before the command (as `taskset -c 0`)."""
    port = port or free_port()
    command = (*prefix, sys.executable, "-m", "tools.testbed.engines.openai_engine", str(port))
    with started(command, log, ready=answers(f"http://127.0.0.1:{port}/health")) as process:
        yield f"http://127.0.0.1:{port}", process


def main() -> None:
    """Serve on the port of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.testbed.engines.openai_engine", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address")
    parser.add_argument("--library", type=Path, help="folder of the fake NVML")
    parser.add_argument("--gpus", type=lambda text: [int(number) for number in text.split(",")])
    given = parser.parse_args()
    uvloop.run(serve(given.port, Pace(FakeGpus(given.library, given.gpus) if given.gpus else None), given.host))


if __name__ == "__main__":
    main()
