"""The control side of the gateway on an event loop with virtual time: sleeping costs nothing, and nothing is late."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from dataclasses import dataclass, field, replace

from core.toy import CLOCKS_MHZ, ToyPhysics, spec, table
from launchers.fake import command, process

from throttllem.config import LimitOptions, Noise
from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.clocks.savings_estimate import SavingsEstimate
from throttllem.core.controller import Controller
from throttllem.core.options import ControllerOptions
from throttllem.core.types import Slo
from throttllem.engines.base import Call, EngineError, PromptCount
from throttllem.engines.simulated.realtime import RealtimeEngine
from throttllem.gateway.control.backend import Backend
from throttllem.gateway.control.clock_setter import ClockSetter
from throttllem.gateway.control.engine_model import EngineModel
from throttllem.gateway.control.loop import ControlLoop
from throttllem.gateway.control.models import Models, ServedModel
from throttllem.gateway.energy.accounting import EnergyAccounting
from throttllem.gateway.energy.table_meter import TableMeter
from throttllem.gpu.simulated import SimulatedGpu
from throttllem.openai_api.errors import ApiError
from throttllem.openai_api.requests import COMPLETIONS, parse_request


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time passes only while nothing can run; if nothing ever will, that is an error."""

    def __init__(self):
        super().__init__()
        self.now_s = 0.0
        self._real_select = self._selector.select
        self._selector.select = self._select

    def time(self):
        return self.now_s

    def _select(self, timeout=None):
        found = self._real_select(0)
        if not found and timeout is None:
            raise RuntimeError("every task waits, and no timer is set")
        if not found and timeout > 0:
            self.now_s += timeout
        return found


def virtually(coroutine):
    """Run a coroutine in virtual time; a task that it leaves behind is an error."""

    async def whole():
        found = await coroutine
        await asyncio.sleep(0.5)  # an iteration that was begun is ended
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        return found

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(whole())


@dataclass
class Seen:
    """The observer: every call of the core and every end of a request. Looking at the calls flushes the loop."""

    ends: list = field(default_factory=list)
    batches: list = field(default_factory=list)
    loop: ControlLoop | None = None
    _calls: list = field(default_factory=list)

    def handled(self, calls):
        self.batches.append(len(calls))
        for now_s, event, commands, seconds in calls:
            assert not self._calls or now_s >= self._calls[-1][0]
            assert seconds >= 0.0
            self._calls.append((now_s, event, None if commands is None else tuple(commands)))

    def ended(self, session, met):
        assert session.request.id not in {other.request.id for other, _ in self.ends}, "it ended twice"
        self.ends.append((session, met))

    @property
    def calls(self):
        self.loop.flush()
        return self._calls

    def events(self, kind):
        return [event for _, event, _ in self.calls if isinstance(event, kind)]

    def commands(self, kind):
        return [command for _, _, commands in self.calls for command in commands or () if isinstance(command, kind)]


class Killable:
    """A simulated engine that can be killed and brought back. `mute`: it reports no steps, `numbered`: it reports no
    more of them than vLLM's plug-in does. `speculates`: each step that it reports is of so many iterations.
    """

    def __init__(self, *arguments, mute=False, numbered=False, speculates=1, **options):
        self.make = lambda: RealtimeEngine(*arguments, **options)
        self.inner = self.make()
        self.named = not (mute or numbered)
        self.speculates = speculates
        self.numbers, self.step = 0, []
        self.mute = mute
        self.gone = False
        self.connects = 0
        self.checks = 0
        self.models = None
        self.asked_names = 0

    async def connect(self):
        self.connects += 1
        if self.gone:
            raise EngineError("connection refused", status=503)
        return replace(await self.inner.connect(), exact=self.named, named=self.named)

    async def well(self):
        self.checks += 1
        if self.gone:
            raise EngineError("connection refused", status=503)
        await self.inner.well()

    async def cards(self):
        self.asked_names += 1
        if self.models is None:
            raise EngineError("it does not say")
        return {name: {} for name in self.models}

    async def count(self, parsed):
        return await self.inner.count(parsed)

    def open(self, call):
        return self.inner.open(call)

    async def watch(self, emit):
        def some(report):
            if self.speculates > 1:
                self.step.append(report)
                if len(self.step) == self.speculates or not report.running:
                    emit(one_step(self.numbers, self.step))
                    self.numbers, self.step = self.numbers + 1, []
            elif not self.mute:
                emit(report if self.named else anonymous(report))

        await self.inner.watch(some)

    async def kill(self, *, back=True):
        self.gone = not back
        before, self.inner = self.inner, self.make()
        await before.close("it was killed")


def anonymous(report):
    """What vLLM's plug-in reports of a step: counts, no names, no joules."""
    return replace(report, started=None, finished=None, prefills=(), joules=None)


def one_step(number, iterations):
    """Iterations of one token each as the step of an engine whose drafts were accepted."""
    last, sequences = iterations[-1], max(report.running for report in iterations)
    generated = sum((report.decode_sequences or 0) + len(report.started or ()) for report in iterations)
    accepted = max(0, generated - max(1, sequences))
    return replace(anonymous(last), step=number, generated_tokens=generated, accepted_tokens=accepted)


@dataclass
class Rig:
    """A control loop with its backends; `models` is what the HTTP side sees."""

    loop: ControlLoop
    models: Models
    seen: Seen

    @property
    def backend(self):
        return self.loop.backends[0]

    def ledgers(self):
        """Joules of ended requests, of open ones, idle ones, and of the GPUs' counters."""
        accounts = [backend.accounting for backend in self.loop.backends]
        ended_j = sum(session.energy_j or 0.0 for session, _ in self.seen.ends)
        open_j = sum(
            flight.energy_j
            for backend in self.loop.backends
            if backend.progress
            for flight in backend.progress.in_flight.values()
        )
        idle_j = sum(account.idle_j for account in accounts)
        return ended_j, open_j, idle_j, sum(account.gpu.read().energy_j for account in accounts)

    def balanced(self):
        """Whether every joule of the counters is a request's or idle energy. At any time between two settlements there
        may be some that are neither yet.
        """
        ended_j, open_j, idle_j, counter_j = self.ledgers()
        total_j = sum(backend.accounting.total_j for backend in self.loop.backends)
        return all(
            math.isclose(one_j, counter_j, rel_tol=1e-9, abs_tol=1e-9) for one_j in (ended_j + open_j + idle_j, total_j)
        )

    async def up(self):
        while any(backend.state == "starting" for backend in self.loop.backends):
            await asyncio.sleep(0.01)

    async def request(self, **more):
        return await request(self.models, **more)

    def session(self, *, slo=None, count=4, **more):
        """A session that has not been entered."""
        return self.models.session(parsed(**more), PromptCount(tokens=count, by="test", exact=True), slo or Slo())


def toy_backend(
    now,
    *,
    tp=1,
    gpu=None,
    table_=None,
    mute=False,
    numbered=False,
    name="toy",
    slower=1.0,
    speculates=1,
    launcher=None,
    number=0,
    **changes,
):
    some = spec(tp=tp, **({"kv_blocks": 200, "max_batch": 8, "no_evict": False, "chunked": True} | changes))
    physics, trained = ToyPhysics(spec=some, slower=slower / speculates), table_ or table(some)
    device = gpu or SimulatedGpu(
        CLOCKS_MHZ,
        switch_latency_s=0.05,
        watts=lambda mhz, work: physics.iteration(mhz, work.decode_sequences, work.kv_tokens, work.prefill_tokens, 0.0)[
            1
        ],
        idle_w=some.idle_w,
        now=now,
    )
    engine = Killable(
        some,
        physics,
        noise=Noise(time=0.02, power=0.03),
        seed=(tp, number) if number else (tp,),
        gpu=device,
        name=name,
        now=now,
        mute=mute,
        numbered=numbered or speculates > 1,
        speculates=speculates,
    )
    accounting = EnergyAccounting(
        gpu=device,
        now=now,
        kv_blocks=lambda: 1,
        at_maximum=SavingsEstimate(table=trained),
        meter=TableMeter(table=trained),
    )
    backend = Backend(
        name=f"toy-{tp}-{number}" if number else f"toy-{tp}",
        kind="simulated",
        tp=tp,
        catalogue_gpu="toy",
        model=EngineModel(catalogue=None, gpu="toy", tp=tp, name="toy"),
        engine=engine,
        clock=ClockSetter(name=f"toy-{tp}", gpu=device, reading=accounting.reading, now=now),
        accounting=accounting,
        process=process(now, launcher, engine_id=f"toy-{tp}", command=lambda: command(f"toy-{tp}")),
        now=now,
    )
    return backend, some


@contextlib.asynccontextmanager
async def rig(*, policy=ClockPolicy.LEAST_ENERGY, sizes=(1,), tables=True, limits=None, slo=None, core=None, **changes):
    """A running control loop over toy engines, checked at its end. `changes`: of the backends and their specs."""
    now = asyncio.get_running_loop().time
    pairs = [toy_backend(now, tp=tp, number=sizes[:place].count(tp), **changes) for place, tp in enumerate(sizes)]
    specs = {some.tp: some for _, some in pairs}
    aware = policy in (ClockPolicy.LEAST_ENERGY, ClockPolicy.THROTTLLEM)
    options = ControllerOptions(
        throttle=ThrottleOptions(policy=policy, switch_latency_s=0.05, dwell_s=0.2),
        slo_aware=aware,
        specs=specs,
        tables={tp: table(some) for tp, some in specs.items()} if tables and aware else {},
        **(core or {}),
    )
    seen = Seen()
    seen.loop = loop = ControlLoop(
        controller=Controller(options),
        backends=tuple(backend for backend, _ in pairs),
        limits=limits or LimitOptions(),
        now=now,
        observer=seen,
    )
    models = Models(served=(ServedModel(loop=loop),), version="1", policy=policy.value, slo=slo or Slo(), now=now)
    whole = Rig(loop=loop, models=models, seen=seen)
    await models.start()
    try:
        yield whole
    finally:
        await models.stop()
    assert not loop.open()
    for backend in loop.backends:
        assert (backend.key, backend.state, backend.in_flight) == (None, "down", 0)
    assert whole.balanced(), whole.ledgers()


def parsed(*, tokens=8, stream=True, prompt="one two three", choices=1, model="toy", limit=None):
    """A parsed request. The simulated engine gives one output whatever `choices` is: `request` counts each token for
    all of them.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": limit or tokens, "min_tokens": tokens, "ignore_eos": True}
    body |= {"stream": stream}
    return replace(parse_request(COMPLETIONS, json.dumps(body).encode()), choices=choices)


async def request(models, *, slo=None, slo_class="", count=6, usage=True, disconnect_after=None, **more):
    """One request as the HTTP side serves it; its receipt, None if its client disconnects after some tokens.
    `usage`: the engine reports the number of tokens at the end.
    """
    it = parsed(**more)
    counted = PromptCount(tokens=count, by="test", exact=True)
    async with models.session(it, counted, slo or Slo(), slo_class) as session:
        backend = await session.placed()
        call = Call(
            method="POST",
            path=it.path,
            headers=(),
            body=it.body,
            request_id=session.request.id,
            request=it,
        )
        async with backend.engine.open(call) as reply:
            assert reply.status == 200, await reply.body()
            came = 0
            while chunk := await reply.read():
                tokens = it.choices * chunk.count(b"index") if it.stream else 0
                if tokens:
                    session.tokens(tokens)
                came += tokens
                if disconnect_after is not None and came >= disconnect_after:
                    return None
            return session.finish(it.max_tokens * it.choices if usage else None)


async def outcome(coroutine):
    """How a request ended: "served", "disconnected", the code of its rejection, "engine" or "cancelled"."""
    try:
        return "disconnected" if await coroutine is None else "served"
    except EngineError:
        return "engine"
    except ApiError as error:
        assert error.retry_after_s is None or 1 <= error.retry_after_s <= 60
        return error.code
    except asyncio.CancelledError:
        task = asyncio.current_task()
        while task.cancelling():
            task.uncancel()
        return "cancelled"
