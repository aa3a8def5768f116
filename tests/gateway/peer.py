"""A vLLM-like engine over HTTP whose requests really run, and a whole gateway in this process in front of anything."""

import asyncio
import contextlib
from dataclasses import dataclass, field

from aiohttp import web

from tests.engines.vllm_peer import VllmPeer
from tests.gateway.upstream import Engine
from throttllem.gateway.run import run_gateway
from throttllem.option_sources import load_options
from tools.testbed.client import Client
from tools.testbed.engines.garbage_engine import CHUNK


class Peer(VllmPeer):
    """Can be stopped and started again on one port. While `held` is clear, its outputs stand still."""

    def __init__(self):
        super().__init__()
        self.engine = Engine()
        self.held = asyncio.Event()
        self.held.set()
        self.open = 0
        self.port = 0
        self._runner = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    def page(self):
        self.running = self.open
        return super().page()

    async def _complete(self, request):
        fields = await request.json()
        self.open += 1
        try:
            if fields.get("stream"):
                return await self._stream(request, fields["max_tokens"])
            for _ in range(fields["max_tokens"]):
                await self._step()
            return web.json_response({"choices": [{"text": "a"}], "usage": {"completion_tokens": fields["max_tokens"]}})
        finally:
            self.open -= 1

    async def _stream(self, request, tokens):
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(tokens):
            await self._step()
            await response.write(CHUNK)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _step(self):
        await asyncio.sleep(0.001)
        await self.held.wait()

    async def start(self):
        self.started += 1
        app = web.Application()
        for (method, path), handler in self.routes().items():
            app.router.add_route(method, path, handler)
        app.router.add_post("/v1/completions", self._complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def kill(self):
        """Every connection breaks off."""
        for connection in list(self._runner.server.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self._runner.cleanup()

    async def __aenter__(self):
        await self.start()
        return self

    async def __aexit__(self, *_):
        with contextlib.suppress(RuntimeError):
            await self.kill()


@dataclass
class Whole:
    """A running gateway with everything in it."""

    client: Client
    gateway: object
    stop: asyncio.Event
    serving: asyncio.Task
    messages: list = field(default_factory=list)

    @property
    def loop(self):
        return self.gateway.models.served[0].loop

    @property
    def backend(self):
        return self.loop.backends[0]

    def held(self):
        """Open requests, queue, requests in the core's engines, requests in flight: all 0 without requests."""
        snapshot = self.loop.controller.snapshot()
        placed = sum(view.running + view.pending for view in snapshot.engines)
        return len(self.loop.open()), snapshot.queue, placed, self.backend.in_flight

    async def up(self):
        await until(lambda: self.backend.state == "up")

    async def empty(self, peer=None):
        """A fresh request is served, and nothing is left."""
        await self.up()
        assert (await self.client.ask(tokens=2)).served
        await until(lambda: not any(self.held()) and (peer is None or not peer.open))


@contextlib.asynccontextmanager
async def whole(folder, *settings, url=None, model="tiny", adjust=lambda gateway: None):
    """The gateway of these settings, stopped at the end; nothing of it may be left then."""
    given = {
        "policy": "triton" if url is None else "least-energy",
        "server.port": "0",
        "state_dir": str(folder / "state"),
        "recorder.enabled": "false",
    }
    if url is not None:
        given |= {"engines.0.kind": "openai", "engines.0.url": url, "engines.0.max_batch": "8"}
    given |= dict(setting.split("=", 1) for setting in settings)
    options = load_options(settings=[f"{name}={value}" for name, value in given.items()]).options
    before = asyncio.all_tasks()
    prepared = run_gateway(options, folder / "cache")
    adjust(prepared.gateway)
    host, port = prepared.sockets.addresses()[0]
    stop, messages = asyncio.Event(), []
    async with Client(f"http://{host}:{port}", model if url else "llama-3-8b") as client:
        serving = asyncio.create_task(prepared.serving(messages.append, stop))
        try:
            await until(lambda: messages or serving.done())
            yield Whole(client=client, gateway=prepared.gateway, stop=stop, serving=serving, messages=messages)
        finally:
            stop.set()
            await asyncio.wait_for(serving, 10)
    await until(lambda: not asyncio.all_tasks() - before - {asyncio.current_task()})


async def until(holds, within_s=8.0):
    """Wait for it, at most some seconds."""
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.005)


def with_peer(check, folder, *settings, kind=Peer, **options):
    async def main():
        async with kind() as peer, whole(folder, *settings, url=peer.url, **options) as there:
            await there.up()
            found = await check(there, peer)
            await there.empty(peer)
            return found

    return asyncio.run(main())


def stream_and_whole(there, count, tokens):
    """Requests under way, streamed and not in turn."""
    return [asyncio.create_task(there.client.ask(tokens=tokens, stream=n % 2 > 0, hang_s=10)) for n in range(count)]


async def answers(requests):
    """Their answers, each checked."""
    found = await asyncio.gather(*requests)
    for answer in found:
        answer.check()
    return found
