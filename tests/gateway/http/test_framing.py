"""Where requests end, as another server sees it: h11 reads the same bytes, and what both read must be the same."""

import asyncio
from itertools import pairwise

import h11
from hypothesis import given
from hypothesis import strategies as st
from uvicorn.server import ServerState

from throttllem.config import LimitOptions
from throttllem.gateway.http.errors import check_framing
from throttllem.gateway.http.exchange import Exchange
from throttllem.gateway.http.protocol import BoundedConfig, BoundedProtocol
from throttllem.openai_api.errors import ApiError

INNER = b"POST /inner HTTP/1.1\r\nhost: x\r\ncontent-length: 2\r\n\r\nhi"
BODIES = (b"", b"hello", INNER, b"0\r\n\r\n" + INNER, b"5\r\nhello\r\n0\r\n\r\n")
NAMES = (
    "content-length",
    "Content-Length",
    "transfer-encoding",
    "Transfer-Encoding",
    "x-a",
    "connection",
    "upgrade",
    "te",
)
VALUES = (
    *("0", "2", "5", str(len(INNER)), "5, 5", "+5", " 5", "05", "0x5", "5 ", "-1", ""),
    *("chunked", "Chunked", "identity", "gzip, chunked", "chunked, identity", "xchunked", "chunked;a"),
    *("close", "keep-alive", "upgrade", "h2c", "websocket", "trailers", "a\x0bb", "\xff"),
)
lines = st.builds(
    lambda name, colon, value: f"{name}{colon}{value}",
    st.sampled_from(NAMES),
    st.sampled_from([":", ": ", ": ", ":\t", " : ", ":\r\n "]),
    st.sampled_from(VALUES),
)


@st.composite
def bodies(draw):
    body = draw(st.sampled_from(BODIES))
    match draw(st.sampled_from(["plain", "sized", "sized", "chunked", "chunked", "odd"])):
        case "plain":
            return "", body
        case "sized":
            return f"content-length: {len(body)}\r\n", body
        case "chunked":
            at = draw(st.integers(0, len(body)))
            parts = [part for part in (body[:at], body[at:]) if part]
            extension = draw(st.sampled_from([b"", b"", b";a=b", b";a"]))
            chunks = b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)
            return "transfer-encoding: chunked\r\n", chunks + b"0\r\n\r\n"
    size = draw(st.sampled_from([b"5", b"05", b"0x5", b"+5", b"5 ", b" 5", b"5\t", b"5;a\nb", b"1" + b"0" * 15 + b"5"]))
    return "transfer-encoding: chunked\r\n", size + draw(st.sampled_from([b"\r\n", b"\n"])) + b"hello\r\n0\r\n\r\n"


@st.composite
def requests(draw):
    method, version = (
        draw(st.sampled_from(["POST", "GET", "HEAD"])),
        draw(st.sampled_from(["1.1"] * 5 + ["1.0", "2.0"])),
    )
    framing, body = draw(bodies())
    ends = st.sampled_from(["\r\n"] * 6 + ["\n"])
    more = "".join(line + draw(ends) for line in draw(st.lists(lines, max_size=2)))
    offer = draw(
        st.sampled_from(
            ["", "", "", "connection: upgrade\r\nupgrade: h2c\r\n", "upgrade: x\r\nconnection: a, upgrade\r\n"]
        )
    )
    fields = draw(st.permutations([framing, more, offer]))
    return (
        f"{method} /{draw(st.integers(0, 9))} HTTP/{version}\r\nhost: x\r\n{''.join(fields)}\r\n".encode("latin-1")
        + body
    )


class Sink(asyncio.Transport):
    """Takes what is sent, as a socket that is always ready."""

    def __init__(self):
        super().__init__()
        self.closed = False

    def write(self, data):
        """Nobody reads it."""

    def get_write_buffer_size(self):
        return 0

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True

    write_eof = abort = close

    def pause_reading(self):
        """Bytes come from the test."""

    resume_reading = pause_reading


def ours(segments):
    """(method, path, body) of each request that reaches an application."""
    seen = []

    async def app(scope, receive, send):
        exchange = Exchange(scope, receive, send)
        try:
            check_framing(scope["http_version"], exchange.headers.get("transfer-encoding"))
            body = await exchange.read(1 << 20)
            seen.append((scope["method"], scope["path"], body))
            await exchange.answer(200, (), b"")
        except ApiError as error:
            await exchange.fail(error)

    async def main():
        config = BoundedConfig(app, LimitOptions())
        config.load()
        protocol, transport = BoundedProtocol(config, ServerState()), Sink()
        protocol.connection_made(transport)
        for segment in segments:
            if not transport.closed:
                protocol.data_received(segment)
            for _ in range(4):
                await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)
        protocol.connection_lost(None)
        for task in protocol.tasks:
            task.cancel()

    asyncio.run(main())
    return seen


def theirs(data):
    """The same as h11 reads it, and whether it waits for more."""
    connection, seen, body = h11.Connection(h11.SERVER), [], b""
    connection.receive_data(data)
    request = None
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                if connection.their_state is h11.MIGHT_SWITCH_PROTOCOL or event is h11.PAUSED:
                    return seen, False
                return seen, request is not None
            match event:
                case h11.Request():
                    request, body = event, b""
                case h11.Data():
                    body += bytes(event.data)
                case h11.EndOfMessage():
                    seen.append((request.method.decode(), request.target.decode(), body))
                    request = None
                    connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                    connection.send(h11.EndOfMessage())
                    if connection.our_state is h11.MUST_CLOSE:
                        return seen, False
                    connection.start_next_cycle()
                case h11.ConnectionClosed():
                    return seen, False
    except h11.RemoteProtocolError:
        return seen, False


@given(st.lists(requests(), min_size=1, max_size=3), st.lists(st.integers(0, 300), max_size=3))
def test_another_server_sees_the_same_requests(some, cuts):
    data = b"".join(some)
    at = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    mine = ours([data[begin:end] for begin, end in pairwise(at)])
    others, waits = theirs(data)
    both = min(len(mine), len(others))
    assert mine[:both] == others[:both]
    assert len(mine) <= len(others) or not waits, "it waits for the rest of what was served here"
