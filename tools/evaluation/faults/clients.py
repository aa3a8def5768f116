"""Faults of clients: gone at every stage, reading nothing, sending garbage."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
from collections import Counter
from functools import partial
from typing import Any

from tools.evaluation.faults.bed import Bed, Found
from tools.testbed.client import Answer, Client, connection, head, tallied
from tools.testbed.inspected_gateway import Inspected, eventually

TIMES = 10
MALFORMED = 1000


async def gone(bed: Bed) -> list[Found]:
    """Clients that hang up, some at each stage; two long requests hold all places while some wait."""
    await bed.engine()
    async with bed.gateway("engines.0.max_batch=2") as gateway:
        stages = {
            "before its body": _before_body,
            "body half sent": _half_sent,
            "in the queue": _in_queue,
            "before the first token": _before_token,
            "in mid-stream": _mid_stream,
            "after the last byte": _after_last,
        }
        for name, leave in stages.items():
            await leave(gateway)
            left = await gateway.left(bed.running)
            bed.report(f"client gone {name}: {left}")
    return [
        Found(
            fault=f"client gone: {', '.join(stages)} ({TIMES} each)",
            client="nothing (it left); requests after it were served",
            left=left,
        )
    ]


async def _leave(gateway: Inspected, sent: bytes, until: bytes = b"", *, wait_s: float = 0.02) -> None:
    """Send, wait for some bytes or a while, and break off."""
    async with connection(gateway.url) as (reader, writer):
        writer.write(sent)
        await writer.drain()
        if until:
            await asyncio.wait_for(reader.readuntil(until), 30)
        else:
            await asyncio.sleep(wait_s)


def _request(gateway: Inspected, **more: Any) -> bytes:
    body = json.dumps(gateway.client.fields(**more)).encode()
    return head(len(body)) + body


async def _before_body(gateway: Inspected) -> None:
    await asyncio.gather(*(_leave(gateway, head(500)) for _ in range(TIMES)))


async def _half_sent(gateway: Inspected) -> None:
    whole = _request(gateway)
    await asyncio.gather(*(_leave(gateway, whole[:-20]) for _ in range(TIMES)))


async def _in_queue(gateway: Inspected) -> None:
    long = [asyncio.create_task(gateway.client.ask(tokens=3000, stream=stream)) for stream in (True, False)]
    await eventually(partial(gateway.runs, 2), 20, "two requests run")
    asked = [asyncio.create_task(_leave(gateway, _request(gateway), wait_s=60)) for _ in range(TIMES)]
    await eventually(partial(gateway.queued, TIMES), 20, "the others wait")
    for task in asked:
        task.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    answers = await asyncio.gather(*long)
    assert all(answer.served for answer in answers), tallied(answers)


async def _before_token(gateway: Inspected) -> None:
    for number in range(TIMES):
        await _leave(gateway, _request(gateway, tokens=2000, stream=number % 2 > 0), wait_s=0.004 * number)


async def _mid_stream(gateway: Inspected) -> None:
    for _ in range(TIMES):
        await _leave(gateway, _request(gateway, tokens=2000), until=b"data: ")


async def _after_last(gateway: Inspected) -> None:
    for _ in range(TIMES):
        await _leave(gateway, _request(gateway), until=b"data: [DONE]\n\n")


async def slow_reader(bed: Bed) -> list[Found]:
    """A client takes nothing of a long answer; another asks meanwhile."""
    await bed.engine(wide=True)
    async with bed.gateway("limits.slow_reader_s=2") as gateway:
        address = gateway.url.removeprefix("http://").split(":")
        quiet = socket.socket()
        quiet.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        quiet.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(quiet, (address[0], int(address[1])))
        await loop.sock_sendall(quiet, _request(gateway, tokens=3500, n=4, temperature=1.0, logprobs=5))
        await eventually(partial(gateway.runs, 1), 20, "the request runs")
        others = [await gateway.client.ask(tokens=50) for _ in range(5)]
        assert all(answer.served for answer in others), tallied(others)
        await eventually(partial(_idle, gateway), 60, "the slow reader is cut off")
        quiet.close()
        left = await gateway.left(bed.running)
    return [
        Found(
            fault="client reads nothing of its stream, limits.slow_reader_s = 2",
            client=f"its connection is broken off; others meanwhile: {tallied(others)}",
            left=left,
        )
    ]


async def _idle(gateway: Inspected) -> bool:
    return not await gateway.runs(1)


async def malformed(bed: Bed) -> list[Found]:
    """Generated bodies and headers, and bytes that are no HTTP."""
    await bed.engine()
    async with bed.gateway() as gateway:
        dice = random.Random(4)
        slots = asyncio.Semaphore(8)

        async def one(number: int) -> Answer:
            async with slots:
                return await generated(gateway.client, random.Random(f"{dice.random()} {number}"))

        answers = await asyncio.gather(*(one(number) for number in range(MALFORMED)))
        for answer in answers:
            assert not answer.hung and answer.status is not None and answer.status < 500, f"{answer}"
            if answer.status >= 400:
                answer.check()
        garbage = [await _no_http(gateway, random.Random(number)) for number in range(100)]
        left = await gateway.left(bed.running)
    statuses = Counter(answer.status for answer in answers)
    counts = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items(), key=str))
    noise = ", ".join(f"{count} x {status}" for status, count in sorted(Counter(garbage).items(), key=str))
    return [
        Found(
            fault=f"{MALFORMED} malformed bodies and headers, 100 times bytes that are no HTTP",
            client=f"{counts}, every error in OpenAI's shape; no HTTP: {noise}",
            left=left,
        )
    ]


FIELDS = ("model", "prompt", "max_tokens", "n", "stream", "best_of", "messages", "user", "stop", "throttllem", "echo")
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**63, 1e308, "", "x", "\0", "\ud800", [], {}, [[]], [1, 2], [-1], ["a", 1]),
    *({"metrics": 1}, {"a": {}}, [None], "9" * 5000, ["x"] * 300, [[1], []]),
)
HEADERS = ("x-slo-class", "x-slo-ttft-ms", "x-slo-tpot-ms", "x-slo-e2e-ms", "x-request-id", "authorization", "accept")
TEXTS = ("", "-1", "nan", "1e999", "gzip", "\xff\xfe", "a" * 9000, "Bearer ", "0", "5")


async def generated(client: Client, dice: random.Random) -> Answer:
    """The answer to a body and headers that are probably wrong."""
    path = dice.choice(("/v1/completions", "/v1/completions", "/v1/chat/completions", "/v2/models/tiny/generate"))
    fields = client.fields(tokens=2, stream=dice.random() < 0.5)
    if "chat" in path:
        fields["messages"] = [{"role": "user", "content": "x"}]
    for _ in range(dice.choice((0, 1, 1, 2))):
        fields[dice.choice(FIELDS)] = dice.choice(VALUES)
    body = bytearray(json.dumps(fields).encode())
    for _ in range(dice.choice((0, 0, 0, 2))):
        body[dice.randrange(len(body))] = dice.randrange(256)
    if dice.random() < 0.2:
        body = body[: dice.randrange(len(body))]
    headers = {dice.choice(HEADERS): dice.choice(TEXTS) for _ in range(dice.choice((0, 1)))}
    return await _raw(client.url, path, bytes(body), headers)


async def _raw(url: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
    """A bare request: no client library would send some of these headers."""
    extra = "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "connection: close\r\n"
    async with connection(url) as (reader, writer):
        writer.write(head(len(body), path=path).removesuffix(b"\r\n") + extra.encode("latin-1") + b"\r\n" + body)
        try:
            answer = await asyncio.wait_for(reader.read(-1), 30)
        except TimeoutError:
            return Answer(status=None, body=b"", hung=True, seconds=30)
    top, _, rest = answer.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1.1 (\d+)", top)
    kind = re.search(rb"(?im)^content-type: ?(.*?)\r?$", top)
    return Answer(
        status=int(status[1]) if status else None,
        body=_unchunked(rest) if b"chunked" in top else rest,
        kind=kind[1].decode() if kind else "",
    )


def _unchunked(data: bytes) -> bytes:
    parts = []
    while data:
        size, _, data = data.partition(b"\r\n")
        parts.append(data[: int(size or b"0", 16)])
        data = data[int(size or b"0", 16) + 2 :]
    return b"".join(parts)


async def _no_http(gateway: Inspected, dice: random.Random) -> str:
    """The status of an answer to noise, or "closed"."""
    starts = (b"", b"POST ", b"POST /v1/completions HTTP/1.1\r\n", b"GET / HTTP/9.9\r\n", b"\x16\x03\x01")
    async with connection(gateway.url) as (reader, writer):
        writer.write(dice.choice(starts) + dice.randbytes(dice.randint(1, 2000)) + b"\r\n\r\n\r\n\r\n")
        writer.write_eof()
        try:
            answer = await asyncio.wait_for(reader.read(-1), 10)
        except ConnectionError:
            answer = b""
    return answer[9:12].decode(errors="replace") if answer else "closed"


FAULTS = (gone, slow_reader, malformed)
