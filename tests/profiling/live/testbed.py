"""Engines with a known law to profile: in virtual time, or behind the real gateway over HTTP."""

import asyncio
import contextlib
import threading
import time
import urllib.request

from engines.live import spec as toy_spec
from gateway.rig import VirtualLoop

from throttllem.config import BatchingOptions, EngineEntry, Noise, Options, RecorderOptions, ServerOptions
from throttllem.engines.simulated.realtime import RealtimeEngine
from throttllem.gateway.build import build_gateway
from throttllem.gateway.http.app import build_app
from throttllem.gateway.http.server import bind, run
from throttllem.gateway.telemetry.metrics import metrics_page
from throttllem.gpu.simulated import SimulatedGpu
from throttllem.profiling.live.profiler import Device

CLOCKS = (700, 1050, 1400)
SMALL = {"max_batch": 8, "kv_blocks": 400, "max_context_tokens": 1200, "prefill_budget_tokens": 512}


class Law:
    """Seconds and watts are sums; `by_clock`: seconds grow as the clock falls."""

    def __init__(self, *, by_clock=False):
        self.by_clock = by_clock

    def iteration(self, clock_mhz, decode_batch, kv_tokens, prefill_tokens, prefill_pairs):
        seconds = 0.004 + 5e-4 * decode_batch + 1e-7 * kv_tokens + 5e-5 * prefill_tokens
        return seconds * (CLOCKS[-1] / clock_mhz if self.by_clock else 1), clock_mhz / 10 + decode_batch

    def idle_w(self):
        return 50.0


class Silent:
    """An engine that reports no steps. `left`: calls that it still accepts."""

    def __init__(self, engine, *, calls=None):
        self.engine = engine
        self.left = calls
        self.most = 0
        self.open_now = 0

    async def connect(self):
        return await self.engine.connect()

    async def count(self, ask):
        return await self.engine.count(ask)

    @contextlib.asynccontextmanager
    async def open(self, call):
        self.open_now += 1
        self.most = max(self.most, self.open_now)
        try:
            async with self.engine.open(call) as reply:
                yield reply
        finally:
            self.open_now -= 1

    async def watch(self, tell):
        await asyncio.Event().wait()


def engine_and_gpu(law=None, kind=SimulatedGpu, **changes):
    """An engine and its GPU, which counts the engine's joules as a real one does."""
    law = law or Law()
    spec = toy_spec(clocks_mhz=CLOCKS, chunked=False, **(SMALL | changes))
    gpu = kind(CLOCKS, switch_latency_s=0.0, watts=lambda mhz, work: 0.0, idle_w=50.0, now=_now)
    engine = RealtimeEngine(spec, law, noise=Noise(time=0, power=0), seed=(1,), gpu=gpu, name="toy", now=_now)
    return engine, gpu


def _now():
    return asyncio.get_running_loop().time()


def modelled(gpu, clocks=CLOCKS, law=None):
    """A device whose watts are modelled."""
    law = law or Law()
    return Device(
        gpu=gpu,
        clocks_mhz=clocks,
        modelled=lambda mhz, work: law.iteration(
            mhz, work.decode_sequences, work.kv_tokens, work.prefill_tokens, work.prefill_pairs
        )[1],
    )


def virtually(coroutine):
    """Run it in virtual time, which only waiting moves."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(coroutine)


@contextlib.contextmanager
def gateway(tmp_path, *, served_as=None, **batching):
    """The real gateway over a simulated engine without noise, at the top clock, on a thread; yields its url."""
    options = Options(
        policy="triton",
        server=ServerOptions(port=0),
        engines=(EngineEntry(served_as=served_as),),
        batching=BatchingOptions(**batching),
        noise=Noise(time=0, power=0),
        recorder=RecorderOptions(enabled=False),
        state_dir=tmp_path / "state",
    )
    sockets = bind(options.server)
    port = sockets.addresses()[0][1]
    built = build_gateway(options, tmp_path / "cache", version="1", now=time.monotonic)
    listening, loops = threading.Event(), []

    async def serve():
        stop = asyncio.Event()
        loops.append((asyncio.get_running_loop(), stop))
        app = build_app(built.models, options, metrics_page=lambda status: metrics_page(status, built.histograms))
        await built.models.start()
        try:
            await run(app, None, options, sockets=sockets, on_listening=lambda _: listening.set(), stop=stop)
        finally:
            await built.models.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert listening.wait(10)
        _wait_until_well(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        loop, stop = loops[0]
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)


def _wait_until_well(url):
    for _ in range(500):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(0.02)
    raise AssertionError("the gateway does not become well")
