"""Clients that disconnect, are slow or never read, engines that are lost, and a gateway that shuts down meanwhile."""

import asyncio
import contextlib
import json

import aiohttp
import pytest

from tests.gateway.fakes import running, until
from tests.gateway.upstream import chat_events
from throttllem.config import LimitOptions
from throttllem.engines.http import Upstream
from throttllem.openai_api.errors import ApiError

CHAT = "/v1/chat/completions"
LOST = ApiError(502, "the engine was lost", kind="engine_error", code="engine_lost")


def chat(**fields):
    return {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "stream": True, **fields}


async def connected(there, body, path=CHAT, *, announced=None):
    """A raw connection that has sent a request."""
    host, port = there.url.removeprefix("http://").split(":")
    # A small window, so that a client that does not read soon blocks.
    reader, writer = await asyncio.open_connection(host, int(port), limit=4096)
    data = json.dumps(body).encode()
    size = len(data) if announced is None else announced
    writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


async def closed(writer):
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


@pytest.fixture(autouse=True)
def _servers_log_no_error(caplog):
    yield
    records = caplog.get_records("call")
    assert [record.getMessage() for record in records if record.name in ("uvicorn.error", "asyncio")] == []


def within(check, **options):
    async def main():
        async with running(**options) as there:
            return await check(there)

    return asyncio.run(main())


# ---- clients ---------------------------------------------------------------------------------------------------


def test_client_disconnects_while_it_waits_for_a_place():
    async def check(there):
        there.models.open.clear()
        _, writer = await connected(there, chat())
        await until(lambda: there.models.sessions)
        await closed(writer)
        await until(lambda: there.models.sessions[0].ends)
        await until(lambda: not there.gateway._open)
        return there.session.ends, there.engine.seen

    assert within(check) == (["cancelled"], [])


@pytest.mark.parametrize(("path", "play"), [(CHAT, "silent"), (CHAT, "hang"), ("/v1/embeddings", "silent")])
def test_client_disconnects_while_the_engine_works(path, play):
    async def check(there):
        reader, writer = await connected(there, chat(play=play), path)
        await until(lambda: there.engine.running)
        if play == "hang":
            await reader.readuntil(b"w0 ")
        await closed(writer)
        await until(lambda: not there.engine.running and not there.gateway._open)
        assert [session.ends for session in there.models.sessions] == ([["cancelled"]] if path == CHAT else [])
        return there.engine.left

    assert within(check) == 1


def test_client_disconnects_before_its_body_is_whole():
    async def check(there):
        _, writer = await connected(there, chat(), announced=5000)
        await until(lambda: there.gateway._open)
        await closed(writer)
        await until(lambda: not there.gateway._open)
        return there.models.sessions

    assert within(check) == []


def test_slow_reader_holds_the_engine_back_and_is_cut_off():
    async def check(there):
        _, writer = await connected(there, chat(play="long"))
        await until(lambda: there.models.sessions and there.models.sessions[0].ends)
        await until(lambda: not there.engine.running and not there.gateway._open)
        await closed(writer)
        return there.session.ends, there.engine.left, there.engine.sent_bytes

    ends, left, sent_bytes = within(check, limits=LimitOptions(slow_reader_s=0.3))
    assert (ends, left) == (["cancelled"], 1)
    # Of 262 MB no more came than sockets hold.
    assert sent_bytes < 60_000_000


def test_slow_sender_gets_an_error():
    async def check(there):
        reader, writer = await connected(there, chat(), announced=5000)
        answer = await reader.read()
        await closed(writer)
        return answer

    answer = within(check, limits=LimitOptions(slow_reader_s=0.1))
    assert answer.startswith(b"HTTP/1.1 408 ") and b'"error"' in answer


def test_a_client_that_waits_for_the_engine_is_not_slow():
    async def check(there):
        there.models.open.clear()
        request = asyncio.create_task(there.post(CHAT, chat()))
        await until(lambda: there.models.sessions)
        await asyncio.sleep(0.05)
        there.models.open.set()
        return (await request)[0]

    # The limit is over before the place is found.
    assert within(check, limits=LimitOptions(slow_reader_s=0.1, silence_s=0.1)) == 200


# ---- engines ---------------------------------------------------------------------------------------------------


def test_engine_is_lost_before_and_in_the_stream():
    async def check(there):
        answers = []
        for play in ("silent", "hang"):
            there.models.sessions.clear()
            reader, writer = await connected(there, chat(play=play))
            await until(lambda: there.engine.running)
            front = await reader.readuntil(b"w1 ") if play == "hang" else b""
            there.models.sessions[0].interrupt(LOST)
            answers.append(front + await asyncio.wait_for(reader.readuntil(b"engine_lost"), 5))
            assert there.session.ends == ["rejected"]
            await until(lambda: not there.engine.running)
            await closed(writer)
        return answers

    before, midway = within(check)
    assert before.startswith(b"HTTP/1.1 502 ") and b'{"error":' in before
    assert midway.startswith(b"HTTP/1.1 200 ") and b'data: {"error":' in midway and b"[DONE]" not in midway


def test_engine_is_silent_at_an_uncontrolled_request():
    async def check(there):
        return await there.post("/v1/embeddings", {"play": "silent"})

    status, _, body = within(check, limits=LimitOptions(request_s=0.1))
    assert status == 504 and b"request_s" in body


def test_uncontrolled_stream_that_is_silent_is_ended_by_an_event():
    async def check(there):
        return await there.post("/v1/embeddings", {"play": "hang", "max_tokens": 2})

    status, _, body = within(check, limits=LimitOptions(request_s=0.1))
    assert status == 200 and body.startswith(b"".join(chat_events(2)[:-2]) + b'data: {"error":')


def test_an_uncontrolled_body_that_breaks_off_breaks_off_at_the_client():
    async def check(there):
        with pytest.raises(aiohttp.ClientPayloadError):
            await there.post("/v1/files", {"play": "half"})
        await until(lambda: not there.gateway._open)
        _, _, body = await there.post("/v1/completions", {"model": "tiny", "prompt": "x", "play": "half"})
        return json.loads(body)["error"]["code"], there.session.ends

    # Under control the answer is held until it is whole, so the client gets an error.
    assert within(check) == ("engine_error", ["cancelled"])


def test_engine_cannot_be_reached():
    async def check(there):
        await there.models.engine.upstream.close()
        there.models.engine.upstream = Upstream("http://127.0.0.1:1")
        return await there.post(CHAT, chat()), await there.get("/v1/files")

    for status, _, body in within(check):
        assert status == 502 and json.loads(body)["error"]["type"] == "engine_error"


# ---- shutting down ---------------------------------------------------------------------------------------------


def test_drain_lets_running_requests_finish_and_rejects_new_ones():
    async def check(there):
        there.models.open.clear()
        request = asyncio.create_task(there.post(CHAT, chat()))
        await until(lambda: there.models.sessions)
        there.stop.set()
        await until(lambda: there.gateway.draining)
        rejected = await there.post(CHAT, chat())
        health = await there.get("/health")
        assert not there.serving.done()
        there.models.open.set()
        answer = await request
        await asyncio.wait_for(there.serving, 5)
        return answer, rejected, health, there.engine.sent

    (status, _, body), (rejected, headers, error), (degraded, _, health), sent = within(check)
    assert (status, body) == (200, sent)
    assert (rejected, headers["retry-after"], headers["connection"]) == (503, "30", "close")
    assert json.loads(error)["error"]["code"] == "draining"
    assert (degraded, json.loads(health)["status"]) == (503, "draining")


def test_drain_has_an_end():
    async def check(there):
        reader, writer = await connected(there, chat(play="hang"))
        front = await reader.readuntil(b"w1 ")
        waiting, quiet = await connected(there, chat(play="silent"))
        await until(lambda: there.engine.running == 2)
        there.stop.set()
        await asyncio.wait_for(there.serving, 5)
        rest, rejected = await reader.read(), await waiting.read()
        await closed(writer)
        await closed(quiet)
        return front + rest, rejected, [session.ends for session in there.models.sessions]

    streamed, rejected, ends = within(check, limits=LimitOptions(drain_s=0.05))
    assert b'data: {"error":' in streamed and b"draining" in streamed and b"[DONE]" not in streamed
    assert rejected.startswith(b"HTTP/1.1 503 ")
    assert ends == [["cancelled"], ["cancelled"]]
