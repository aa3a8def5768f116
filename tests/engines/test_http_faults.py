import asyncio
import errno
import socket

import pytest

from tests.engines.upstreams import call, raw, whole
from throttllem.engines.base import EngineError, OwnLimitError
from throttllem.engines.http import Upstream


def fails(answer, one=None, **options):
    async def run():
        async with raw(answer) as url:
            upstream = Upstream(url, **options)
            try:
                with pytest.raises(EngineError) as raised:
                    await whole(upstream, one or call())
                return raised.value
            finally:
                await upstream.close()

    return asyncio.run(run())


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GARBAGE\x00\xff\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nx-long: " + b"a" * 200_000 + b"\r\n\r\n",
    ],
)
def test_garbage_and_broken_replies_are_502(sent):
    async def answer(reader, writer):
        writer.write(sent)
        await writer.drain()

    assert fails(answer).status == 502


def test_an_unreachable_engine_is_502():
    async def run():
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            upstream = Upstream(f"http://127.0.0.1:{taken.getsockname()[1]}")
            with pytest.raises(EngineError, match=r"127\.0\.0\.1.* cannot be reached") as raised:
                await whole(upstream, call())
            await upstream.close()
            return raised.value.status, raised.value.message

    assert asyncio.run(run()) == (502, "the engine cannot be reached")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL])
def test_a_limit_of_this_machine_is_503_and_not_the_engines_fault(monkeypatch, number):
    async def run():
        async def create_connection(*_, **__):
            raise OSError(number, "none left")

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", create_connection)
        with pytest.raises(OwnLimitError) as raised:
            await whole(Upstream("http://127.0.0.1:9"), call())
        return raised.value.status, raised.value.unreachable, dict(raised.value.headers)

    assert asyncio.run(run()) == (503, False, {b"retry-after": b"1"})


def test_a_name_that_cannot_be_looked_up_for_want_of_a_descriptor_is_503(monkeypatch):
    async def run():
        async def create_connection(*_, **__):
            raise socket.gaierror(socket.EAI_AGAIN, "try again")

        def none_left(*_):
            raise OSError(errno.EMFILE, "Too many open files")

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", create_connection)
        with pytest.raises(EngineError) as named:
            await whole(Upstream("http://engine:9"), call())
        monkeypatch.setattr("throttllem.engines.http.socket.socket", none_left)
        with pytest.raises(OwnLimitError):
            await whole(Upstream("http://engine:9"), call())
        return named.value.status

    assert asyncio.run(run()) == 502


def test_no_connection_in_time_is_504():
    async def run():
        # A backlog of one that is full: the next connection is never taken.
        with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            for filler in (first, second):
                filler.setblocking(False)
                filler.connect_ex(deaf.getsockname())
            upstream = Upstream(f"http://127.0.0.1:{deaf.getsockname()[1]}", connect_s=0.05)
            with pytest.raises(EngineError) as raised:
                await whole(upstream, call())
            await upstream.close()
            return raised.value.status

    assert asyncio.run(run()) == 504


def test_no_answer_in_time_is_504():
    async def answer(reader, writer):
        await reader.read()

    async def run():
        async with raw(answer) as url:
            upstream = Upstream(url)
            with pytest.raises(EngineError) as raised:
                await upstream.get_json("/x", timeout_s=0.05)
            await upstream.close()
            return raised.value.status

    assert asyncio.run(run()) == 504
