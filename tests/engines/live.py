"""A simulated engine with iterations of a millisecond, for tests that run in real time."""

import asyncio
import json

from throttllem.config import Noise
from throttllem.core.types import EngineSpec
from throttllem.engines.base import Call
from throttllem.engines.simulated.realtime import RealtimeEngine
from throttllem.gpu.simulated import SimulatedGpu

CLOCKS = (700, 1400)


class Even:
    """Every iteration takes equally long at a clock, whatever is in it."""

    def __init__(self, seconds):
        self.seconds = seconds

    def iteration(self, clock_mhz, decode_batch, kv_tokens, prefill_tokens, prefill_pairs):
        return self.seconds * CLOCKS[-1] / clock_mhz, clock_mhz / 10

    def idle_w(self):
        return 50.0


def spec(**changes):
    values = {
        "gpu": "toy",
        "model": "toy",
        "tp": 1,
        "kv_blocks": 400,
        "block_tokens": 16,
        "max_batch": 64,
        "max_context_tokens": 4096,
        "prefill_budget_tokens": 2048,
        "chunked": True,
        "no_evict": False,
        "clocks_mhz": CLOCKS,
        "idle_w": 50.0,
        "startup_s": 1.0,
    }
    return EngineSpec(**(values | changes))


def engine(*, seconds=0.001, seed=(1,), gpu=None, name="toy", **more):
    """More: of the spec, or `now`."""
    now = {"now": more.pop("now")} if "now" in more else {}
    device = gpu or SimulatedGpu(CLOCKS, switch_latency_s=0.0, watts=lambda mhz, work: 0.0, idle_w=50.0)
    quiet = Noise(time=0, power=0)
    return RealtimeEngine(spec(**more), Even(seconds), noise=quiet, seed=seed, gpu=device, name=name, **now)


def call(path="/v1/completions", *, method="POST", raw=None, request_id=None, **body):
    data = json.dumps({"model": "toy", **body}).encode() if raw is None else raw
    return Call(method=method, path=path, headers=(), body=data, request_id=request_id)


def asked(chat=False, **more):
    """A body that is right, for the engine of these tests."""
    if chat:
        return call("/v1/chat/completions", messages=[{"role": "user", "content": "Hello there."}], **more)
    return call(prompt="Hello there.", **more)


async def answer(subject, it):
    async with subject.open(it) as reply:
        return reply.status, await reply.body()


def answers(*calls, subject=None, **more):
    """Status and bytes of each call, one after the other."""

    async def run():
        running = subject or engine(seconds=0, **more)
        return [await answer(running, it) for it in calls]

    return asyncio.run(run())
