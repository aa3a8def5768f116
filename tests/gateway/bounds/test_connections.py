import asyncio

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


def test_the_connection_that_is_idle_for_longest_makes_room():
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


def test_a_stream_before_a_begun_head_is_not_idle():
    body = b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"stream":true,"play":"hang"}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)

    async def check(there):
        reader, _ = await opened(there, head + body + b"GET /health HT")
        await reader.readuntil(b"data: ")
        newcomer = await ask(*await opened(there))
        await asyncio.sleep(0.05)
        return newcomer, [list(session.ends) for session in there.models.sessions]

    assert with_room_for(1, check) == (b"200", [[]])
