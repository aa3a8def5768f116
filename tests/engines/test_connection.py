"""A connection to an engine against servers that send whatever they like, in pieces of any size."""

import asyncio
from contextlib import suppress

import pytest

from throttllem.engines.http import HEADER_BYTES, Connection, ProtocolError

ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def answered(answer, *, piece=1 << 20, use=None, stays=True):
    """What `use(connection)` gives, of a connection to a server that answers one request so, `piece` bytes a time."""

    async def run():
        over = asyncio.Event()

        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            for at in range(0, len(answer), piece):
                writer.write(answer[at : at + piece])
                await asyncio.sleep(0)
            with suppress(ConnectionError):
                if stays:
                    await reader.read()
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
            over.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection, "127.0.0.1", server.sockets[0].getsockname()[1]
        )
        try:
            async with asyncio.timeout(5):
                connection.send(ASK, b"")
                return await (use or whole)(connection)
        finally:
            connection.close()
            server.close()
            await over.wait()

    return asyncio.run(run())


async def whole(connection):
    """Status, headers, body, and whether another request may go."""
    status, headers = await connection.head()
    body = b""
    while part := await connection.read():
        body += part
    return status, headers, body, connection.let_go()


@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_a_chunked_reply_in_any_pieces(piece):
    answer = (
        b"HTTP/1.1 200 OK\r\nX-One: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\nx-t: 1\r\n\r\n"
    )
    headers = (("x-one", "a"), ("transfer-encoding", "chunked"))
    assert answered(answer, piece=piece) == (200, headers, b"abcde", True)


def test_what_announces_a_reply_is_not_the_reply():
    answer = b"HTTP/1.1 103 Hints\r\nlink: x\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
    assert answered(answer) == (200, (("content-length", "2"),), b"hi", True)


def test_a_body_without_a_length_ends_with_its_connection():
    assert answered(b"HTTP/1.1 200 OK\r\n\r\nhi", stays=False) == (200, (), b"hi", False)


def test_a_server_that_says_so_is_not_asked_again():
    answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nhi"
    assert answered(answer)[2:] == (b"hi", False)


def test_a_reply_that_nobody_asked_for_ends_the_connection():
    reply = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
    assert answered(reply + reply)[2:] == (b"hi", False)


async def broken(connection):
    """What came before it broke, and how it broke."""
    parts = []
    await connection.head()
    with pytest.raises(ConnectionError) as error:
        while part := await connection.read():
            parts.append(part)
    return b"".join(parts), error.type


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n",
    ],
)
def test_a_body_that_breaks_off_is_told_after_what_came_of_it(answer):
    assert answered(answer, use=broken, stays=False) == (b"hi", ConnectionResetError)


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 101 Switching\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * (HEADER_BYTES + 9),
        b"HTTP/1.1 200 OK\r\ncontent-length: two\r\n\r\n",
    ],
)
def test_what_is_no_http_is_said(answer):
    with pytest.raises(ProtocolError):
        answered(answer)


def test_a_head_that_never_comes_is_a_broken_connection():
    with pytest.raises(ConnectionError):
        answered(b"HTTP/1.1 200 OK\r\n", stays=False)


def test_a_head_of_the_most_bytes_is_read_on_a_reused_connection():
    class Transport:
        paused = False

        def write(self, data):
            pass

        def pause_reading(self):
            self.paused = True

    async def run():
        connection, transport = Connection(), Transport()
        connection.connection_made(transport)
        connection.send(ASK, b"")
        connection.data_received(b"HTTP/1.1 204 No Content\r\nx: y\r\n\r\n")
        assert (await connection.head())[0] == 204 and await connection.read() == b"" and connection.let_go()
        connection.send(ASK, b"")
        connection.data_received((b"HTTP/1.1 200 OK\r\nx: " + b"a" * HEADER_BYTES)[:HEADER_BYTES])
        return transport.paused

    assert asyncio.run(run()) is False
