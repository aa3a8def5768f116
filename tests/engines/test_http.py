import asyncio
import gzip
import ssl

import pytest
import trustme
from aiohttp import web

from tests.engines.upstreams import call, eventually, raw, served, whole
from throttllem.engines.base import EngineError
from throttllem.engines.http import Upstream, passed_on, requested
from throttllem.openai_api.requests import COMPLETIONS, parse_request

REQUEST = parse_request(COMPLETIONS, b'{"model": "m", "prompt": "a"}')


def exchange(answer, one, **options):
    """Reply, body and the request as it arrived, of one call to a raw server that sends `answer`."""

    async def run():
        heads = []

        async def reply(reader, writer):
            writer.write(answer)
            await writer.drain()

        async def serve(reader, writer):
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            heads.append(await reader.readexactly(len(one.body)))
            await reply(reader, writer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        upstream = Upstream(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/", **options)
        try:
            return *await whole(upstream, one), *heads
        finally:
            await upstream.close()
            server.close()

    return asyncio.run(run())


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"


def test_a_request_goes_on_as_it_came():
    body = b'{"model": "m",  "prompt": "\xc3\xa9"}\n'
    headers = [("content-type", "application/json"), ("x-a", "1"), ("x-a", "2"), ("accept-encoding", "br")]
    _, _, head, sent = exchange(OK, call("/v1/x?a=%2F..&b=%20c", body, headers))
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v1/x?a=%2F..&b=%20c HTTP/1.1"
    assert sent == body
    assert [line.lower() for line in lines[1:] if line and not line.lower().startswith(("host", "content-length"))] == [
        "content-type: application/json",
        "x-a: 1",
        "x-a: 2",
        "accept-encoding: br",
    ]


def test_a_get_without_body_adds_nothing():
    _, _, head, _ = exchange(OK, call("/v1/models", b"", (), method="GET"))
    assert [line.partition(":")[0].lower() for line in head.decode().split("\r\n")[1:] if line] == ["host"]


def test_headers_of_the_connection_and_the_gateway_stay():
    headers = (
        ("connection", "keep-alive, X-Hop"),
        ("x-hop", "1"),
        ("te", "trailers"),
        ("host", "gateway"),
        ("content-length", "9"),
        ("x-slo-e2e-ms", "5"),
        ("x-throttllem-metrics", "1"),
        ("authorization", "Bearer client"),
        ("x-kept", "yes"),
    )
    assert requested(headers) == (("authorization", "Bearer client"), ("x-kept", "yes"))
    assert requested(headers, api_key="k") == (("x-kept", "yes"), ("authorization", "Bearer k"))
    assert passed_on(headers)[0] == ("host", "gateway")


def test_a_controlled_reply_is_not_compressed():
    zipped = gzip.compress(b"x" * 99)
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(zipped) + zipped
    headers = (("accept-encoding", "gzip"),)
    reply, body, head, _ = exchange(answer, call(headers=headers))
    assert b"accept-encoding: gzip" in head.lower()
    assert body == zipped
    assert ("content-encoding", "gzip") in reply.headers
    *_, head, _ = exchange(OK, call(headers=headers, request=REQUEST))
    assert b"accept-encoding: identity" in head.lower()


@pytest.mark.parametrize("status", [200, 404, 429, 500, 503])
def test_every_status_is_a_reply(status):
    answer = b"HTTP/1.1 %d Whatever\r\nX-One: a\r\nx-one: b\r\nkeep-alive: 5\r\ncontent-length: 3\r\n\r\nno\n" % status
    reply, body, *_ = exchange(answer, call())
    assert (reply.status, body) == (status, b"no\n")
    assert reply.headers == (("x-one", "a"), ("x-one", "b"), ("content-length", "3"))


def test_a_redirect_is_not_followed():
    answer = b"HTTP/1.1 307 Go\r\nlocation: http://192.0.2.1/\r\ncontent-length: 0\r\n\r\n"
    reply, body, *_ = exchange(answer, call())
    assert (reply.status, body) == (307, b"")


def test_chunks_come_as_they_are_sent_and_leaving_early_closes():
    async def run():
        turn, closed = asyncio.Queue(), asyncio.Event()

        async def answer(reader, writer):
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            for part in (b"one", b"two"):
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))
                await writer.drain()
                await turn.get()
            await reader.read()
            closed.set()

        async with raw(answer) as url:
            upstream = Upstream(url)
            async with upstream.open(call()) as reply:
                assert await reply.read() == b"one"
                turn.put_nowait(None)
                assert await reply.read() == b"two"
                turn.put_nowait(None)
            await asyncio.wait_for(closed.wait(), 5)
            await upstream.close()

    asyncio.run(run())


def test_a_connection_is_used_again_after_a_reply_read_to_its_end():
    async def run():
        peers = []

        async def hello(request):
            peers.append(request.transport.get_extra_info("peername"))
            return web.Response(body=b"x" * 100_000)

        async with served({("POST", "/v1/completions"): hello}) as url:
            upstream = Upstream(url)
            for _ in range(3):
                _, body = await whole(upstream, call())
                assert len(body) == 100_000
            await upstream.close()
        return peers

    assert len(set(asyncio.run(run()))) == 1


def test_a_slow_reader_slows_the_engine_down():
    async def run():
        sent = 0

        async def flood(request):
            nonlocal sent
            response = web.StreamResponse()
            await response.prepare(request)
            for _ in range(2000):
                await response.write(b"x" * 65536)
                sent += 65536
            return response

        async with served({("POST", "/v1/completions"): flood}) as url:
            upstream = Upstream(url)
            async with upstream.open(call()) as reply:
                await reply.read()
                before = -1
                while sent != before:
                    before = sent
                    await asyncio.sleep(0.05)
            await upstream.close()
        return sent

    # What fits into the socket buffers, not the 131 MB.
    assert asyncio.run(run()) < 30e6


def test_json_is_asked_for_with_the_key():
    async def run():
        seen = []

        async def echo(request):
            seen.append((request.headers.get("authorization"), request.headers.get("content-type")))
            return web.json_response({"got": await request.json() if request.can_read_body else None})

        async def broken(request):
            return web.Response(status=200 if request.path == "/text" else 418, body=b"teapot")

        routes = {("GET", "/a"): echo, ("POST", "/a"): echo, ("GET", "/text"): broken, ("GET", "/pot"): broken}
        async with served(routes) as url:
            upstream = Upstream(url, api_key="k")
            assert await upstream.get_json("/a") == {"got": None}
            assert await upstream.post("/a", b'{"x": [1]}') == (200, b'{"got": {"x": [1]}}')
            assert await upstream.get("/pot") == (418, b"teapot")
            with pytest.raises(EngineError, match="answers 418: teapot"):
                await upstream.get_json("/pot")
            with pytest.raises(EngineError, match="no JSON"):
                await upstream.get_json("/text")
            await upstream.close()
        return seen

    assert asyncio.run(run()) == [("Bearer k", None), ("Bearer k", "application/json")]


@pytest.mark.parametrize("path", ["@192.0.2.1/", ".example/", "", "v1"])
def test_no_path_names_another_host(path):
    async def run():
        upstream = Upstream("http://127.0.0.1:9")
        with pytest.raises(ValueError, match="must begin with /"):
            await whole(upstream, call(path))
        await upstream.close()

    asyncio.run(run())


def test_cancelling_a_request_closes_its_connection():
    async def run():
        began, closed = asyncio.Event(), []

        async def answer(reader, writer):
            began.set()
            closed.append(await reader.read())

        async with raw(answer) as url:
            upstream = Upstream(url)
            task = asyncio.create_task(whole(upstream, call(body=b"")))
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await eventually(lambda: closed == [b""])
            await upstream.close()

    asyncio.run(run())


@pytest.mark.parametrize("trusted", [True, False])
def test_https_is_spoken_and_the_certificate_is_looked_at(trusted, tmp_path, monkeypatch):
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))

    async def echo(request):
        return web.Response(body=await request.read() * 20_000)

    async def run():
        async with served({("POST", "/v1/completions"): echo}, tls=context) as url:
            upstream = Upstream(url)
            try:
                return [(await whole(upstream, call()))[1] for _ in range(2)]
            finally:
                await upstream.close()

    if trusted:
        assert asyncio.run(run()) == [b"{}" * 20_000] * 2
    else:
        with pytest.raises(EngineError, match="certificate"):
            asyncio.run(run())
