"""Ports, bounds on heads and connections, signals, and clients that are slow. Real sockets."""

import asyncio
import errno
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.fakes import running, until
from throttllem.config import LimitOptions, ServerOptions
from throttllem.gateway.http import server as serve_http
from throttllem.gateway.http.app import Gateway
from throttllem.gateway.http.protocol import BoundedProtocol
from throttllem.gateway.http.server import bind

ROOT = Path(__file__).parents[3]


def test_port_0_is_a_free_port():
    sockets = bind(ServerOptions(port=0, metrics_port=0))
    (host, port), (_, other) = sockets.addresses()
    sockets.close()
    assert host == "127.0.0.1" and 0 < port != other > 0


@pytest.mark.parametrize("option", ["port", "metrics_port"])
def test_a_taken_port_is_named(option):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            OSError, match=rf"server\.{option} = {port}: cannot listen on 127\.0\.0\.1:{port}"
        ) as caught:
            bind(ServerOptions(**({"port": 0} | {option: port})))
    assert caught.value.errno == errno.EADDRINUSE


def test_an_unknown_host_is_named():
    with pytest.raises(OSError, match=r"192\.0\.2\.1"):
        bind(ServerOptions(host="192.0.2.1", port=0))


async def talk(there, data):
    """Everything that comes back for some bytes."""
    host, port = there.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    answer = await asyncio.wait_for(reader.read(), 5)
    writer.close()
    await writer.wait_closed()
    return answer


def exchanged(data, **limits):
    async def main():
        async with running(limits=LimitOptions(**limits)) as there:
            return await talk(there, data)

    return asyncio.run(main())


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET ? HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\na\x00: b\r\n\r\n",
    ],
)
def test_bytes_that_are_no_http(data):
    answer = exchanged(data)
    assert answer.startswith(b"HTTP/1.1 400 ") and b'{"error":' in answer and b"x-request-id" in answer


@pytest.mark.parametrize("head", [b"GET /" + b"a" * 5000, b"GET / HTTP/1.1\r\nx: " + b"y" * 5000])
def test_a_head_without_end(head):
    answer = exchanged(head, header_bytes=2048)
    assert answer.startswith(b"HTTP/1.1 431 ") and b"headers_too_large" in answer


def test_a_head_that_comes_byte_by_byte():
    async def main():
        async with running(limits=LimitOptions(header_bytes=2048)) as there:
            host, port = there.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET / HTTP/1.1\r\n")
            answer = asyncio.create_task(reader.read())
            for number in range(100):
                writer.write(b"x-%d: " % number + b"y" * 100 + b"\r\n")
                await asyncio.sleep(0)
                if answer.done():
                    break
            got = await asyncio.wait_for(answer, 5)
            writer.close()
            return got

    assert b"headers_too_large" in asyncio.run(main())


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = b'{"model":"tiny","prompt":"x"}'


def test_fields_behind_a_body_are_dropped():
    async def main():
        async with running() as there:
            end = b"0\r\nx-late: 1\r\nauthorization: Bearer k\r\nx-slo-e2e-ms: 5\r\n\r\n"
            host, port = there.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(CHUNKED + b"%x\r\n%s\r\n" % (len(BODY), BODY))
            await until(lambda: there.gateway._open)
            writer.write(end + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            answer = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            return answer, there.engine.seen

    answer, ((_, _, headers, body),) = asyncio.run(main())
    assert answer.count(b"HTTP/1.1 200 ") == 2 and body == BODY
    assert not headers.keys() & {"x-late", "authorization"}


@pytest.mark.parametrize(
    "late", [b"0\r\n" + b"x-late: 1234567890\r\n" * 200, b"0\r\nx-late: " + b"y" * 5000, b"1;" + b"z" * 5000]
)
@pytest.mark.parametrize("step", [100, 10_000])
def test_fields_behind_a_body_are_bounded(late, step):
    async def main():
        async with running(limits=LimitOptions(header_bytes=2048)) as there:
            host, port = there.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(CHUNKED + b"%x\r\n%s\r\n" % (len(BODY), BODY))
            await until(lambda: there.gateway._open)
            for at in range(0, len(late), step):
                writer.write(late[at : at + step])
                await asyncio.sleep(0)
            answer = await asyncio.wait_for(reader.read(), 5)
            assert answer.startswith(b"HTTP/1.1 431 ") and answer.count(b"HTTP/1.1 ") == 1
            writer.close()
            await until(lambda: not there.gateway._open)
            return there.engine.seen

    assert asyncio.run(main()) == []


def test_many_small_chunks_are_no_fields():
    async def main():
        async with running(limits=LimitOptions(header_bytes=2048)) as there:
            data = BODY[:-1] + b" " * 5000 + b"}"
            chunks = b"".join(b"1;a=b\r\n%c\r\n" % byte for byte in data)
            return await talk(there, CHUNKED[:-2] + b"connection: close\r\n\r\n" + chunks + b"0\r\n\r\n")

    assert asyncio.run(main()).startswith(b"HTTP/1.1 200 ")


def test_an_idle_connection_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr("throttllem.gateway.http.server._FLUSH_S", 3600)

    async def main():
        async with running() as there:
            host, port = there.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            await reader.readuntil(b"}")
            there.stop.set()
            await asyncio.wait_for(there.serving, 5)
            rest = await reader.read()
            writer.close()
            return rest

    assert asyncio.run(main()) == b""


def test_a_head_that_takes_too_long(monkeypatch):
    monkeypatch.setattr("throttllem.gateway.http.protocol.HEAD_S", 0.02)
    assert exchanged(b"GET / HTTP/1.1\r\nx:") == b""


def test_a_second_head_that_is_bad_does_not_disturb_the_first():
    async def main():
        async with running() as there:
            there.models.open.clear()
            body = b'{"model":"tiny","prompt":"x"}'
            head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
            answer = await talk(there, head + body + b"nonsense\r\n\r\n")
            await until(lambda: not there.gateway._open)
            return answer, [session.ends for session in there.models.sessions]

    answer, ends = asyncio.run(main())
    assert answer == b"" and ends in ([], [["cancelled"]])


def test_connections_are_bounded():
    async def main():
        async with running(limits=LimitOptions(connections=2)) as there:
            host, port = there.url.removeprefix("http://").split(":")
            idle = [await asyncio.open_connection(host, int(port)) for _ in range(2)]
            for _, writer in idle:
                writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n")
            await until(lambda: len(there.gateway._open) == 2)
            crowded = await there.get("/v1/models")
            health = await there.get("/health")
            for _, writer in idle:
                writer.close()
                await writer.wait_closed()
            await asyncio.sleep(0.02)
            return crowded, health[0], (await there.get("/v1/models"))[0]

    (status, headers, body), health, after = asyncio.run(main())
    assert (status, headers["retry-after"], health, after) == (503, "1", 200, 200)
    assert b"too_many_connections" in body


def test_an_idle_connection_is_closed(monkeypatch):
    monkeypatch.setattr("throttllem.gateway.http.protocol.KEEP_ALIVE_S", 0.02)
    assert exchanged(b"") == b""
    assert issubclass(BoundedProtocol, asyncio.Protocol)


SERVER = """
import uvloop
from tests.gateway.fakes import running

async def main():
    async with running() as there:
        print(there.url, flush=True)
        await there.serving
        print("drained", there.models.sessions[0].ends, flush=True)

uvloop.run(main())
"""


@pytest.mark.parametrize(("play", "signals"), [("hang", 2), (None, 1)])
def test_signals(play, signals):
    """The first drains, the second ends at once."""

    async def main():
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SERVER, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        url = (await process.stdout.readline()).decode().strip()
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = b'{"model":"tiny","messages":[{}],"stream":true,"play":%s}' % (b'"hang"' if play else b"null")
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        got = await reader.readuntil(b"w0 ")
        if not play:
            got += await reader.readuntil(b"0\r\n\r\n")
        for number in range(signals):
            process.send_signal(signal.SIGTERM if number == 0 else signal.SIGINT)
            await asyncio.sleep(0.05)
        got += await reader.read()
        writer.close()
        out, err = await asyncio.wait_for(process.communicate(), 10)
        return got, out.decode(), err.decode(), process.returncode

    got, out, err, code = asyncio.run(main())
    assert (code, err) == (0, "")
    assert out.startswith("drained") and (b"[DONE]" in got) == (play is None)
    assert ("cancelled" in out) == (play == "hang")


def test_slow_clients_are_cut_off_again_after_a_fault(caplog, monkeypatch):
    monkeypatch.setattr(serve_http, "_WATCH_AGAIN_S", 0.001)
    calls = []

    async def main():
        async with running() as there:
            await until(lambda: len(calls) > 2)
            assert (await there.http.get(there.url + "/health")).status == 200

    async def broken(gateway):
        calls.append(gateway)
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr(Gateway, "watch", broken)
    asyncio.run(main())
    assert "slow clients were not looked after" in caplog.text
