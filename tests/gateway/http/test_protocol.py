"""`Upgrade` on a request: the offer is ignored, the body is the body, and nothing of it is run as a request."""

import asyncio
import json

import pytest

from gateway.http.test_app_garbage import answer
from tests.gateway.fakes import running, until
from throttllem.config import LimitOptions

PATH = "/v1/completions"
BODY = json.dumps({"model": "tiny", "prompt": "x"}).encode()
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
LAST = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
SMUGGLED = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(BODY)}\r\n\r\n".encode() + BODY
JDK = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
WEBSOCKET = (
    "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAA\r\nSec-WebSocket-Version: 13\r\n"
)
OFFERS = {
    "h2c": JDK,
    "websocket": WEBSOCKET,
    "several": "Upgrade: h2c\r\nupgrade: websocket, foo/2\r\nConnection: upgrade\r\n",
    "unknown": "CONNECTION: UPGRADE\r\nUPGRADE: TLS/1.0\r\n",
}


def head(offer, *fields):
    return "".join(
        [f"POST {PATH} HTTP/1.1\r\nHost: x\r\n", offer, *(f"{field}\r\n" for field in fields), "\r\n"]
    ).encode()


def sized(body):
    return f"content-length: {len(body)}"


def chunked(body):
    half = len(body) // 2
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:])) + b"0\r\n\r\n"


def exchanged(*segments, answers=1, pause_s=0.02, **limits):
    """The answers to bytes that come in these segments on one connection, and what the engine got."""

    async def main():
        async with running(limits=LimitOptions(**limits)) as there:
            host, port = there.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            for segment in segments:
                writer.write(segment)
                await asyncio.sleep(pause_s)
            found = [(await asyncio.wait_for(answer(reader), 5))[:2] for _ in range(answers)]
            # Whatever else came of it would come before the answer to one more request.
            writer.write(LAST)
            rest = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            await writer.wait_closed()
            assert rest.count(b"HTTP/1.1 ") == 1 and b'"engines_up"' in rest, rest
            return found, there.engine.seen

    return asyncio.run(main())


def served(found, seen, *, body=BODY, requests=1):
    assert [status for status, _ in found] == [200] * len(found), found
    assert [(method, got) for method, _, _, got in seen] == [("POST", body)] * requests
    for _, _, headers, _ in seen:
        assert not {"upgrade", "http2-settings"} & {name.lower() for name in headers}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("way", ["one segment", "own segment", "byte by byte", "chunked", "chunked, own segment"])
def test_the_offer_is_ignored_and_the_body_read(offer, way):
    first, body = head(offer, sized(BODY)), BODY
    if "chunked" in way:
        first, body = head(offer, "transfer-encoding: chunked"), chunked(BODY)
    match way:
        case "one segment" | "chunked":
            segments = [first + body]
        case "byte by byte":
            segments = [bytes([byte]) for byte in first + body]
        case _:
            segments = [first, body]
    served(*exchanged(*segments, pause_s=0.0 if way == "byte by byte" else 0.02))


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("framing", ["sized", "chunked"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_body_that_looks_like_a_request_is_not_run(offer, framing, apart):
    """It is no JSON: the one request is an error, and the engine gets none."""
    first = head(offer, sized(SMUGGLED) if framing == "sized" else "transfer-encoding: chunked")
    body = SMUGGLED if framing == "sized" else chunked(SMUGGLED)
    found, seen = exchanged(*([first, body] if apart else [first + body]))
    assert [status for status, _ in found] == [400]
    assert seen == []


def test_requests_go_on_on_the_connection():
    one = head(JDK, sized(BODY))
    served(*exchanged(one, BODY, one + BODY, SMUGGLED, answers=3), requests=3)


def test_pipelined_requests_are_answered_in_order():
    one = head(JDK, sized(BODY)) + BODY
    found, seen = exchanged(HEALTH + one + HEALTH + SMUGGLED + one, answers=5)
    served(found, seen, requests=3)
    assert [b"engines_up" in body for _, body in found] == [True, False, True, False, False]


def test_many_offers_in_one_segment():
    offer = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
    found, _ = exchanged(offer * 300, answers=300)
    assert {status for status, _ in found} == {200}


@pytest.mark.parametrize("fields", [("connection: close",), ("expect: 100-continue",)])
def test_other_fields_of_the_head_hold(fields):
    async def main():
        async with running() as there:
            host, port = there.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head(JDK, sized(BODY), *fields))
            if "expect" in fields[0]:
                assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 100 ")
            writer.write(BODY)
            status, _, first = await asyncio.wait_for(answer(reader), 5)
            if "close" in fields[0]:
                assert b"connection: close" in first and await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            return status, len(there.engine.seen)

    assert asyncio.run(main()) == (200, 1)


def errors(*segments, **limits):
    async def main():
        async with running(limits=LimitOptions(**limits)) as there:
            host, port = there.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            for segment in segments:
                writer.write(segment)
                await asyncio.sleep(0.02)
            found = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            return found, there.engine.seen

    return asyncio.run(main())


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("target", ["x:80", "127.0.0.1:443"])
def test_what_follows_a_connect_is_not_run(target, apart):
    first = f"CONNECT {target} HTTP/1.1\r\nhost: x\r\n\r\n".encode()
    found, seen = errors(*([first, SMUGGLED] if apart else [first + SMUGGLED]))
    assert found.startswith(b"HTTP/1.1 400 ") and found.count(b"HTTP/1.1") == 1 and seen == []


def test_a_folded_field_adds_none():
    """A line that continues the field before it must not come back as another field."""
    first = head(JDK, "x-a: 1\r\n content-length: 3", sized(BODY))
    found, seen = errors(first + BODY + LAST)
    assert found.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 200 ")) and found.count(b"HTTP/1.1") <= 2
    assert all(body == BODY for *_, body in seen)


@pytest.mark.parametrize(
    "fields", [("content-length: 3", "content-length: 4"), ("content-length: 3", "transfer-encoding: chunked")]
)
def test_contradicting_lengths_are_an_error(fields):
    found, seen = errors(head(JDK, *fields) + chunked(BODY))
    assert found.startswith(b"HTTP/1.1 400 ") and seen == []


def posted(*fields, version="1.1", path=PATH):
    return "".join(
        [f"POST {path} HTTP/{version}\r\nhost: x\r\n", *(f"{field}\r\n" for field in fields), "\r\n"]
    ).encode("latin-1")


LENGTH, CODED = sized(BODY), "transfer-encoding: chunked"
ONE_CHUNK = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
UNCLEAR = {
    "length and chunks": posted(LENGTH, CODED) + ONE_CHUNK,
    "chunks and length": posted(CODED, "content-length: 4") + ONE_CHUNK,
    "the same length twice": posted(LENGTH, LENGTH) + BODY,
    "lengths in a list": posted(f"{LENGTH}, {len(BODY)}") + BODY,
    **{
        f"length {text!r}": posted(f"content-length: {text}") + BODY
        for text in ("+29", "-1", "0x1d", "2_9", "", "29.0")
    },
    "length in superscript": posted("content-length: \xb2\xb9") + BODY,
    "a length of 67 bits": posted("content-length: 99999999999999999999") + BODY,
    **{
        f"coding {text!r}": posted(f"transfer-encoding: {text}") + ONE_CHUNK
        for text in ("xchunked", "identity", "gzip, chunked", "identity, chunked", "chunked, identity", ",chunked", "")
    },
    **{f"coding {text!r}": posted(f"transfer-encoding: {text}") + ONE_CHUNK for text in ("\x0bchunked", '"chunked"')},
    "coding twice": posted(CODED, CODED) + ONE_CHUNK,
    "chunks in HTTP/1.0": posted(CODED, version="1.0") + ONE_CHUNK,
    "a blank before the colon": posted(f"{CODED[:17]} : chunked", LENGTH) + ONE_CHUNK,
    "a folded line": posted("x-a: 1\r\n content-length: 3", LENGTH) + BODY,
    "a folded coding": posted("transfer-encoding:\r\n chunked") + ONE_CHUNK,
    "lines that end with LF": posted(LENGTH).replace(b"\r\n", b"\n") + BODY,
    "one line that ends with LF": posted("x: y\nz: w", LENGTH) + BODY,
    "CR in a value": posted("x: y\rcontent-length: 3", LENGTH) + BODY,
    "NUL in a name": posted("x\0: y", LENGTH) + BODY,
    "NUL in a value": posted("x: y\0z", LENGTH) + BODY,
    "a line without a colon": posted("content-length", LENGTH) + BODY,
    "an empty name": posted(": y", LENGTH) + BODY,
    **{
        f"chunk {size!r}": posted(CODED) + size % len(BODY) + b"\r\n" + BODY + b"\r\n0\r\n\r\n"
        for size in (b"0x%x", b"+%x", b" %x", b"%x ", b"%x;a\nb", b"1%016x", b"%x_0")
    },
    "a chunk that is longer": posted(CODED) + ONE_CHUNK.replace(b"\r\n0", b"more\r\n0"),
    "a chunk that ends with LF": posted(CODED) + ONE_CHUNK.replace(b"\r\n0", b"\n0"),
    "a length behind the body": posted(CODED) + ONE_CHUNK[:-2] + b"content-length: 5\r\n\r\n",
    "HTTP/2": posted(LENGTH, version="2.0") + BODY,
    "HTTP/0.9": b"GET /health\r\n\r\n",
}


@pytest.mark.parametrize("data", UNCLEAR.values(), ids=UNCLEAR)
@pytest.mark.parametrize("apart", [False, True])
def test_where_another_server_might_see_another_end_there_is_one_error_and_no_request(data, apart):
    """Request smuggling needs two servers that disagree on where a request ends."""
    found, seen = errors(*([data, SMUGGLED] if apart else [data + SMUGGLED]))
    assert found.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 505 ")) and found.count(b"HTTP/1.1 ") == 1
    assert b"connection: close" in found and seen == []


def test_a_broken_body_behind_a_running_request_breaks_the_connection_off():
    """An error in the midst of another reply would be taken for its body."""
    silent = BODY[:-1] + b', "play":"silent"}'
    slow = posted(sized(silent)) + silent
    found, seen = errors(slow, posted(CODED) + b"zz\r\n")
    assert found == b"" and len(seen) == 1


def test_a_client_that_leaves_frees_the_requests_before_its_last():
    async def main():
        async with running() as there:
            host, port = there.url.removeprefix("http://").split(":")
            _, writer = await asyncio.open_connection(host, int(port))
            silent = BODY[:-1] + b', "play":"silent"}'
            for number in range(3):
                writer.write(posted(sized(silent)) + silent)
                await until(lambda number=number: number or there.engine.running)
            await asyncio.sleep(0.02)
            writer.close()
            await until(lambda: there.engine.left == 1 and not there.gateway._open)
            return [session.ends for session in there.models.sessions]

    assert asyncio.run(main()) == [["cancelled"]]


@pytest.mark.parametrize(
    "data",
    [
        posted(CODED) + b"%x;name=value\r\n%s\r\n0;last\r\n\r\n" % (len(BODY), BODY),
        posted("Transfer-Encoding: Chunked") + ONE_CHUNK,
        posted("x: \xe4\xff", LENGTH) + BODY,
        posted("connection: upgrade", LENGTH) + BODY,
        posted("connection: close-not, upgrade", LENGTH) + BODY,
        posted("upgrade: h2c", LENGTH) + BODY,
        b"\r\n" + posted(LENGTH) + BODY,
        posted(LENGTH, path=f"http://x{PATH}") + BODY,
    ],
)
def test_what_is_clear_is_served(data):
    served(*exchanged(data))


@pytest.mark.parametrize("field", ["connection: close", "CONNECTION: foo, Close"])
def test_nothing_is_read_behind_a_request_that_closes(field):
    found, seen = errors(posted(field, LENGTH) + BODY + SMUGGLED)
    assert found.count(b"HTTP/1.1 200 ") == found.count(b"HTTP/1.1") == 1 and len(seen) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_http_1_0_gets_no_chunks(stream):
    """Old clients, and proxies that speak HTTP/1.0 to what is behind them."""

    async def main():
        body = json.dumps({"model": "tiny", "prompt": "x", "stream": stream}).encode()
        async with running() as there:
            host, port = there.url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(posted(sized(body), version="1.0") + body)
            found = await asyncio.wait_for(reader.read(), 5)
            writer.close()
            return found, there.engine.sent

    found, sent = asyncio.run(main())
    head, _, body = found.partition(b"\r\n\r\n")
    assert body == sent and b"connection: close" in head and b"transfer-encoding" not in head
    assert (b"content-length" in head) is not stream


def test_a_query_over_the_bound_of_the_parser_is_too_large():
    found, _ = errors(f"GET /health?{'a' * 70_000} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    assert found.startswith(b"HTTP/1.1 431 ")


def test_the_bound_on_heads_holds():
    found, _ = errors(head(JDK, "x: " + "y" * 5000, sized(BODY)), header_bytes=2048)
    assert found.startswith(b"HTTP/1.1 431 ")
