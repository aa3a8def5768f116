"""Fakes of the control side for tests of the HTTP side: models that place a request at once, a real HTTP engine.

They reject what they are set to reject, keep what happened, and raise at what they do not know.
"""

import asyncio
import contextlib
import json
import time
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import aiohttp

from tests.gateway.upstream import Engine, engine_server
from throttllem.config import LimitOptions, Options, ServerOptions
from throttllem.core.types import Slo
from throttllem.engines.base import PromptCount
from throttllem.engines.http import Upstream
from throttllem.gateway.control.models import Health
from throttllem.gateway.control.session import Receipt
from throttllem.gateway.http.app import build_app, build_private_app
from throttllem.gateway.http.server import run
from throttllem.openai_api.errors import ApiError


@dataclass
class Live:
    """The LiveEngine of `Engine`, over HTTP."""

    upstream: Upstream

    async def count(self, request):
        return PromptCount(tokens=3, by="fake", exact=True)

    def open(self, call):
        return self.upstream.open(call)


@dataclass(eq=False)
class Session:
    """Ends exactly once: "finished", "cancelled" or "rejected"."""

    models: "Models"
    slo: Slo
    slo_class: str
    caller: str
    streams: bool
    counted: int = 0
    finished: int | None = None
    ends: list = field(default_factory=list)
    failure: ApiError | None = None

    async def __aenter__(self):
        self.task = asyncio.current_task()
        if self.models.reject is not None:
            self.ends.append("rejected")
            raise self.models.reject
        return self

    async def __aexit__(self, kind, error, trace):
        if not self.ends:
            self.ends.append("rejected" if self.failure else "cancelled")
        if self.failure is not None and isinstance(error, asyncio.CancelledError):
            self.task.uncancel()
            raise self.failure from None

    async def placed(self):
        await self.models.open.wait()
        return SimpleNamespace(engine=self.models.engine)

    @property
    def request(self):
        return SimpleNamespace(id=id(self), max_tokens=5000, sequences=1)

    def tokens(self, count=1):
        assert not self.ends and count > 0
        self.counted += count

    def goes_again(self, error):
        return False

    def attended(self, client):
        assert not client.blocked

    def received(self):
        assert not self.ends

    async def read_counters(self):
        assert not self.ends

    def finish(self, tokens=None, usage=None):
        assert not self.ends
        self.ends.append("finished")
        self.finished = tokens
        return Receipt(
            queue_time_ms=1.5, time_to_first_token_ms=2.5, mean_itl_ms=None, energy_joules=0.25, clock_mhz=1410
        )

    def interrupt(self, failure):
        self.failure = failure
        self.task.cancel()


@dataclass
class Models:
    """`models.Models` over one engine that is called "tiny". While `open` is not set, requests wait for a place."""

    engine: Live
    reject: ApiError | None = None
    state: str = "up"
    sessions: list = field(default_factory=list)
    open: asyncio.Event = field(default_factory=asyncio.Event)
    broken: bool = False
    most: int | None = 8
    served: tuple = ()
    version: str = "1"
    policy: str = "triton"
    slo: Slo = field(default_factory=Slo)
    now: object = time.monotonic
    started_s: float = 0.0
    draining: bool = False
    uncontrolled: int = 0
    working: int = 0
    most_working: int = 0

    def names(self):
        return ("tiny", "org/other")

    def cards(self):
        return {"tiny": {}, "org/other": {"id": "org/other", "object": "model", "max_model_len": 4096, "odd": [1]}}

    def _known(self, name):
        if self.broken:
            raise KeyError("a secret of the inside")
        if name not in self.names():
            raise ApiError(404, f"no model {name!r}", kind="invalid_request_error", code="model_not_found")

    async def count(self, parsed):
        self._known(parsed.model)
        return await self.engine.count(parsed)

    def session(self, parsed, count, slo, slo_class="", *, repeatable):
        session = Session(models=self, slo=slo, slo_class=slo_class, caller=parsed.caller, streams=parsed.stream)
        self.sessions.append(session)
        return session

    async def read_names(self):
        pass

    async def uncontrolled_backend(self, model):
        self._known("tiny" if model is None else model)
        return SimpleNamespace(engine=self.engine, uncontrolled=self._working)

    @contextlib.contextmanager
    def _working(self):
        self.working += 1
        self.most_working = max(self.most_working, self.working)
        yield
        self.working -= 1

    def max_sequences(self):
        return self.most

    def health(self):
        assert not self.broken
        up = self.state == "up"
        return Health(up=int(up), engines=1, degraded=not up, draining=False, version="1")


@dataclass
class Running:
    """A running gateway: `url` of the API, `private` of the metrics port, and everything behind them."""

    url: str
    private: str | None
    models: Models
    engine: Engine
    gateway: object
    stop: asyncio.Event
    serving: asyncio.Task
    http: aiohttp.ClientSession

    async def post(self, path, body, headers=()):
        """Status, headers and body of an answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.post(self.url + path, data=data, headers=dict(headers)) as response:
            return response.status, response.headers, await response.read()

    async def get(self, path, method="GET", headers=()):
        async with self.http.request(method, self.url + path, headers=dict(headers)) as response:
            return response.status, response.headers, await response.read()

    @property
    def session(self):
        """The only session, which must have ended exactly once."""
        (session,) = self.models.sessions
        assert len(session.ends) == 1
        return session


@contextlib.asynccontextmanager
async def running(*, server=None, limits=None, extra_routes=(), **options):
    """A gateway on loopback in front of a real HTTP engine; nothing is left of it at the end."""
    engine = Engine()
    listening = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    limits = limits or LimitOptions()
    serve = Options(server=replace(server or ServerOptions(), port=0), limits=limits, **options)
    async with engine_server(engine) as address, aiohttp.ClientSession() as http:
        upstream = Upstream(address)
        models = Models(engine=Live(upstream))
        models.open.set()
        gateway = build_app(
            models, serve, metrics_page=lambda status: ("text/plain", b"up 1\n"), extra_routes=extra_routes
        )
        private = build_private_app(gateway) if serve.server.metrics_port is not None else None
        serving = asyncio.create_task(run(gateway, private, serve, on_listening=listening.set_result, stop=stop))
        await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            await serving
        urls = [f"http://{host}:{port}" for host, port in listening.result()]
        yield Running(
            url=urls[0],
            private=urls[1] if len(urls) > 1 else None,
            models=models,
            engine=engine,
            gateway=gateway,
            stop=stop,
            serving=serving,
            http=http,
        )
        await http.close()
        stop.set()
        await serving
        await upstream.close()


async def until(condition):
    """Wait for it, at most some seconds."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)
