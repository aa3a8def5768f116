"""A toy engine with an analytic law: spec, physics, performance table and requests, so that nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from throttllem.core.controller import Controller
from throttllem.core.forecast.performance_table import Hull, PerformanceTable
from throttllem.core.scoreboard import SequenceState
from throttllem.core.types import Command, EngineSpec, Event, Request, Slo, Timer

CLOCKS_MHZ = (600, 800, 1000, 1200, 1400)
TOP_MHZ = CLOCKS_MHZ[-1]
SPEC = EngineSpec(
    gpu="toy",
    model="toy",
    tp=1,
    kv_blocks=64,
    block_tokens=4,
    max_batch=8,
    max_context_tokens=256,
    prefill_budget_tokens=32,
    chunked=False,
    no_evict=True,
    clocks_mhz=CLOCKS_MHZ,
    idle_w=40.0,
    startup_s=5.0,
)


def spec(**changes) -> EngineSpec:
    return replace(SPEC, **changes)


def seconds(tp, clock_mhz, batch, kv_blocks, prefill_tokens):
    """5 ms that no clock touches, the rest slower as the clock falls; scalars or arrays."""
    work_s = 0.008 + 0.0005 * batch + 0.0001 * kv_blocks + 0.0003 * prefill_tokens
    return 0.005 + work_s * (TOP_MHZ / clock_mhz) / tp


def watts(tp, clock_mhz, batch):
    """Idle, a linear and a steep part; all GPUs."""
    share = clock_mhz / TOP_MHZ
    return tp * (40.0 + (60.0 * share + 200.0 * share**3) * (0.6 + 0.05 * batch))


@dataclass(frozen=True, kw_only=True)
class ToyPhysics:
    """The law as the simulated engine wants it; `slower` than its table says."""

    spec: EngineSpec
    slower: float = 1.0

    def iteration(self, clock_mhz, decode_batch, kv_tokens, prefill_tokens, prefill_pairs):
        kv_blocks = kv_tokens / self.spec.block_tokens
        time_s = seconds(self.spec.tp, clock_mhz, decode_batch, kv_blocks, prefill_tokens)
        return time_s * self.slower, watts(self.spec.tp, clock_mhz, decode_batch)

    def idle_w(self):
        return self.spec.idle_w


def hull(spec: EngineSpec, **changes) -> Hull:
    whole = Hull(
        max_batch=spec.max_batch,
        max_kv_blocks=spec.kv_blocks,
        max_prefill_tokens=10_000,
    )
    return replace(whole, **changes)


def table(spec: EngineSpec, *, kv_step: int = 4, prefill_step: int = 16, **hull_changes) -> PerformanceTable:
    """The law over every batch, and over KV blocks and prompt tokens in steps (the upper end of each)."""
    batch_bin, kv_bin, prefill_bin = (
        -(-np.arange(last + 1) // step)
        for last, step in ((spec.max_batch, 1), (spec.kv_blocks, kv_step), (spec.max_context_tokens, prefill_step))
    )
    prefill, batch, kv, clock = np.meshgrid(
        np.arange(prefill_bin[-1] + 1) * prefill_step,
        np.arange(batch_bin[-1] + 1),
        np.arange(kv_bin[-1] + 1) * kv_step,
        np.array(spec.clocks_mhz),
        indexing="ij",
    )
    shape = (-1, len(spec.clocks_mhz))
    return PerformanceTable(
        clocks_mhz=spec.clocks_mhz,
        batch_bin=batch_bin.astype(np.int32),
        kv_bin=kv_bin.astype(np.int32),
        prefill_bin=prefill_bin.astype(np.int32),
        seconds=seconds(spec.tp, clock, batch, kv, prefill).reshape(shape).astype(np.float32),
        watts=watts(spec.tp, clock, batch).reshape(shape).astype(np.float32),
        hull=hull(spec, **hull_changes),
    )


def flat_table(ticks, watts=(100,) * 5) -> PerformanceTable:
    """A table of one cell: one number of 1/1024 s for each clock, and its watts, whatever runs."""
    one = np.zeros(40, dtype=np.int32)
    return PerformanceTable(
        clocks_mhz=CLOCKS_MHZ,
        batch_bin=one,
        kv_bin=one,
        prefill_bin=one,
        seconds=np.array([ticks], dtype=np.float32) / 1024,
        watts=np.array([watts], dtype=np.float32),
        hull=hull(SPEC),
    )


def request(request_id: int, prompt: int, output: int, **changes) -> Request:
    """A request whose max_tokens is its output, without SLOs, arrived at 0."""
    whole = {"arrival_s": 0.0, "max_tokens": output, "slo": Slo(), "output_tokens": output} | changes
    return Request(id=request_id, prompt_tokens=prompt, **whole)


def sequence(request_id: int, prompt: int, output: int, *, earliest: int = 0, **changes) -> SequenceState:
    """Such a request, predicted exactly."""
    made = request(request_id, prompt, output, **changes)
    return SequenceState(request=made, predicted_tokens=output, output_tokens=output, earliest=earliest)


def handle(controller: Controller, event: Event, now_s: float) -> list[Command]:
    """One event, and the timer that is needed at once after it; the commands of both."""
    commands = controller.handle(event, now_s)
    deadline_s = controller.next_deadline()
    if deadline_s is not None and deadline_s <= now_s:
        return [*commands, *controller.handle(Timer(), now_s)]
    return commands
