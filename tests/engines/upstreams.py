"""Small real HTTP servers on loopback, for tests of what talks to an engine."""

import asyncio
from contextlib import asynccontextmanager

from aiohttp import web

from throttllem.engines.base import Call


@asynccontextmanager
async def raw(answer):
    """A TCP server; `answer(reader, writer)` is called after the head of each request was read. Yields its url."""

    async def serve(reader, writer):
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@asynccontextmanager
async def served(routes, *, tls=None):
    """An application with these handlers: {(method, path): async handler}. Yields its url. `tls`: an SSLContext."""
    app = web.Application()
    for (method, path), handler in routes.items():
        app.router.add_route(method, path, handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        yield f"{'https' if tls else 'http'}://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()


def call(path="/v1/completions", body=b"{}", headers=(("content-type", "application/json"),), method="POST", **more):
    return Call(method=method, path=path, headers=tuple(headers), body=body, **more)


async def whole(opener, one):
    """Reply and body of a call to an engine or an upstream."""
    async with opener.open(one) as reply:
        return reply, await reply.body()


async def eventually(holds, tries=400):
    """Wait until `holds()`, at most a few seconds."""
    for _ in range(tries):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to hold")
