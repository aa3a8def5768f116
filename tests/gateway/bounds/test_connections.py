import asyncio

import aiohttp

from tests.gateway.fakes import running, until
from throttllem.config import LimitOptions

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 999\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"


async def opened(there, sent=b""):
    host, port = there.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    there.clients.append(writer)
    writer.write(sent)
    return reader, writer


async def ask(reader, writer):
    writer.write(GET)
    return (await reader.readuntil(b"\r\n"))[9:12]


def with_room_for(count, check):
    async def main():
        async with running(limits=LimitOptions(connections=count)) as there:
            there.clients = []
            try:
                return await check(there)
            finally:
                for client in there.clients:
                    client.close()
                await asyncio.gather(*(client.wait_closed() for client in there.clients), return_exceptions=True)

    return asyncio.run(main())


def test_the_connection_that_is_idle_for_longest_makes_room(monkeypatch):
    monkeypatch.setattr("throttllem.gateway.bounds.connections._FRESH_S", 0)

    async def check(there):
        busy = await opened(there, POST)
        first, second = [await opened(there) for _ in range(2)]
        status = [await ask(*first)]
        third = await opened(there)
        status.append(await ask(*third))
        return status, await second[0].read(), busy[0].at_eof(), first[0].at_eof()

    assert with_room_for(3, check) == ([b"200", b"200"], b"", False, False)


def test_refused_clients_get_an_answer_without_a_parser(monkeypatch):
    monkeypatch.setattr("throttllem.gateway.bounds.connections._OVER", 0)

    async def check(there):
        busy = [await opened(there, POST) for _ in range(2)]
        await until(lambda: len(there.gateway._open) == 2)
        refused = [await opened(there, GET if at % 2 else b"") for at in range(100)]
        answers = await asyncio.gather(*(reader.read() for reader, _ in refused), return_exceptions=True)
        for _, writer in busy:
            writer.close()
        await until(lambda: not there.gateway._open)
        return answers, len(there.models.sessions), await ask(*await opened(there))

    answers, sessions, after = with_room_for(2, check)
    assert all(answer.startswith(b"HTTP/1.1 503 ") and b"too_many_connections" in answer for answer in answers[:64])
    assert len(answers) == 100 and sessions == 0 and after == b"200"


def test_a_stream_before_a_begun_head_is_not_idle(monkeypatch):
    monkeypatch.setattr("throttllem.gateway.bounds.connections._FRESH_S", 0)
    body = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"stream":true,"play":"hang"}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)

    async def check(there):
        reader, _ = await opened(there, head + body + b"GET /health HT")
        await reader.readuntil(b"data: ")
        newcomer = await ask(*await opened(there))
        await asyncio.sleep(0.05)
        return newcomer, [list(session.ends) for session in there.models.sessions]

    assert with_room_for(1, check) == (b"200", [[]])


def test_a_burst_of_idle_connections_makes_room_for_a_request():
    async def check(there):
        burst = [await opened(there) for _ in range(50)]
        await asyncio.sleep(0.15)
        status, _, _ = await there.post("/v1/completions", {"model": "tiny", "prompt": "x"})
        return status, len(burst)

    assert with_room_for(4, check) == (200, 50)


def test_a_connection_that_was_accepted_is_not_refused_later():
    async def check(there):
        first = await opened(there)
        await ask(*first)
        busy = [await opened(there, POST) for _ in range(3)]
        await until(lambda: len(there.gateway._open) >= 2)
        first[1].write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
        await first[0].readuntil(b"HTTP/1.1 ")
        return await first[0].readexactly(3), len(busy)

    assert with_room_for(2, check) == (b"200", 3)


def test_of_many_clients_at_once_each_is_served_or_refused_and_none_reset():
    async def check(there):
        async def one(client):
            async with client.post(f"{there.url}/v1/completions", json={"model": "tiny", "prompt": "x"}) as answer:
                return answer.status

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:
            return await asyncio.gather(*(one(client) for _ in range(70)), return_exceptions=True)

    statuses = with_room_for(10, check)
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 10
