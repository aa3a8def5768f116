"""Flight records of a world of toy engines, whose controller is recorded, and random histories of it."""

from __future__ import annotations

import random

from core.toy import CLOCKS_MHZ, spec, table
from core.world import World
from hypothesis import strategies as st

from throttllem.core.clocks.policy import ClockPolicy, ThrottleOptions
from throttllem.core.clocks.sizing import AutoscaleOptions
from throttllem.core.lengths.prediction import Noisy
from throttllem.core.options import AdmissionOptions, ControllerOptions
from throttllem.core.types import Observed, Progressed, Request, Slo
from throttllem.gateway.flight.recorder import Recorder

SIZES = (1, 2, 4)
SPECS = {
    tp: spec(tp=tp, kv_blocks=10 * tp, max_batch=2 + tp, max_context_tokens=80, prefill_budget_tokens=16, chunked=True)
    for tp in SIZES
}
TABLES = {tp: table(some) for tp, some in SPECS.items()}
OPTIONS = ControllerOptions(
    throttle=ThrottleOptions(policy=ClockPolicy.LEAST_ENERGY),
    admission=AdmissionOptions(queue_limit=6),
    autoscale=AutoscaleOptions(capacity_rps={1: 1.0, 2: 3.0, 4: 9.0}, interval_s=0.5, window_s=2.0, grace_s=1.0),
    predictor=Noisy(p95_error=0.5),
    specs=SPECS,
    tables=TABLES,
    load_window_s=2.0,
)


class Recorded:
    """A controller whose every call is recorded, `batch` calls at a time."""

    def __init__(self, controller, recorder, batch):
        self.controller = controller
        self.recorder = recorder
        self.batch = batch
        self.calls = []

    def __getattr__(self, name):
        return getattr(self.controller, name)

    def handle(self, event, now_s):
        commands = self.controller.handle(event, now_s)
        self.calls.append((now_s, event, commands))
        if len(self.calls) >= self.batch:
            self.flush()
        return commands

    def flush(self):
        calls, self.calls = self.calls, []
        self.recorder.record(calls)


def recorder_of(folder, controller, **changes):
    messages = []
    limits = {"file_bytes": 1 << 20, "files": 4, "model": "toy/model", "policy": "least-energy", "say": messages.append}
    recorder = Recorder(folder, controller, **(limits | changes))
    recorder.messages = messages
    return recorder


def recorded_world(folder, options=OPTIONS, *, batch=1, **changes):
    """A world whose recorder has been started."""
    world = World(options)
    recorder = recorder_of(folder, world.controller, **changes)
    recorder.start()
    world.controller = Recorded(world.controller, recorder, batch)
    return world, recorder


def history(seed):
    """What happens, one letter each, with two numbers for it; often with time at the end for outputs to finish."""
    dice = random.Random(seed)
    weights = [dice.random() ** 2 for _ in DEEDS]
    deeds = dice.choices(DEEDS, weights, k=dice.randrange(50))
    ends = [("i", 7, 1)] * dice.randrange(9)
    return [*((deed, dice.randrange(41), dice.randrange(41)) for deed in deeds), *ends]


DEEDS = "aaiiiooprtlcuu"
deeds = st.builds(history, st.integers(0, 2**32))
"""Lists that Hypothesis builds and shrinks itself hardly ever bring a request to its end; these do."""


def fly(world, some):
    """Let a history happen, except what is impossible at its time."""
    pool = world.options.pool
    if pool is None or sum(view.tp for view in world.controller.snapshot().engines) < pool.gpus:
        world.ready(world.keys, SPECS[1])
    for deed, one, two in some:
        _happen(world, deed, one, two)


def busy(world, rounds):
    """A long history without chance."""
    world.ready(world.keys, SPECS[2])
    for number in range(rounds):
        _happen(world, "aiiioit"[number % 7], number % 23, number % 17)


def _happen(world, deed, one, two):
    up = sorted(world.up)
    key = up[one % len(up)] if up else 0
    match deed:
        case "a":
            slo = Slo(e2e_s=(None, 0.2, 2.0)[one % 3], tbt_s=(None, 0.05)[two % 2], ttft_s=(None, 0.3)[one % 2])
            world.arrive(
                Request(
                    id=len(world.requests),
                    arrival_s=world.now_s,
                    prompt_tokens=1 + one,
                    max_tokens=1 + two + one % 5,
                    slo=slo,
                    output_tokens=1 + two,
                    caller=f"caller {one % 3}",
                )
            )
        case "i":
            for _ in range(1 + one % 8):
                world.advance(0.013 * (1 + two))
                if key in world.up and world.up[key].in_progress:
                    world.end_iteration(key)
        case "o" if up:
            world.send(Observed(engine=key, running=one % 5, waiting=two % 3, kv_blocks=(None, two)[one % 2]))
        case "p" if world.on:
            request_id = sorted(world.on)[one % len(world.on)]
            world.send(Progressed(engine=world.on[request_id], request_id=request_id, tokens=1 + two))
        case "r" if up:
            world.read_clock(key, (None, *CLOCKS_MHZ)[two % 6])
        case "t":
            world.advance(one / 7)
        case "l" if len(up) > 1:
            world.lose(key)
        case "c" if world.on or world.waiting:
            known = sorted([*world.on, *world.waiting])
            world.cancel(known[one % len(known)])
        case "u" if world.starting:
            starting = min(world.starting)
            world.ready(starting, SPECS[world.starting[starting]])
    for engine, plan in world.switches[:]:
        world.switches.remove((engine, plan))
        world.read_clock(engine, plan.mhz)
