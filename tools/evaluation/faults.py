"""The fault list: every fault on real parts, what the clients saw, and what was left behind.

A fault whose promise is broken is a row that says so; `tests/real/test_faults.py` fails for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from tools.engines.vllm_server import tiny_model
from tools.evaluation import faults_client, faults_engine, faults_garbage, faults_gateway
from tools.evaluation.endurance import WARM, Endured, endure
from tools.evaluation.fault_bench import Bench, Fault, Found
from tools.evaluation.machine import version_of
from tools.evaluation.section import Section, Table, Workshop

FAULTS: tuple[Fault, ...] = (
    *faults_engine.FAULTS,
    *faults_client.FAULTS,
    *faults_gateway.ON_VLLM,
    faults_engine.full,
    *faults_garbage.FAULTS,
    *faults_gateway.ALONE,
)
"""In an order in which few engines are started."""
REQUESTS = 50_000

TEXT = """
Every fault was done to real processes: `throttllem serve`, and behind it a real vLLM on the CPU (for garbage a server
that answers it, for port, disk and clock the embedded simulated engine). Each request must end exactly once, with
all its tokens or with an error in OpenAI's shape, within a bounded time. Afterwards a fresh request must be served, and
nothing may be left: requests that are open, queued, on the scoreboard, booked or metered; requests in the engine, by
its own count; asyncio tasks and file descriptors beyond those before; and no task of the gateway may have died.
Two exceptions: a gateway that is killed can only break its connections off, and what an engine answers as whole HTTP
passes as it is, JSON or not.
The same is run by `tests/real/test_faults.py`, and without vLLM by `tests/gateway/test_faults.py`.
"""


def section(workshop: Workshop) -> Section:
    """Every fault, then the endurance run."""
    environment = workshop.environment("vllm")
    model = tiny_model(environment, workshop.folder / "tiny")
    bench = Bench(environment=environment, model=model, folder=workshop.folder, say=workshop.say)
    faults = FAULTS[-2:] if workshop.quick else FAULTS
    found = asyncio.run(_tried(bench, faults))
    requests = REQUESTS // 25 if workshop.quick else REQUESTS
    endured = asyncio.run(endure(workshop.folder / "endurance", requests, workshop.say))
    rows = [(one.fault, one.client, one.left) for one in found]
    return Section(
        title="Faults",
        text=TEXT,
        tables=(
            Table(caption="", head=("fault", "what the client saw", "what was left behind"), rows=rows),
            _endurance(endured),
        ),
        results={
            "faults": rows,
            "endurance": {"answers": endured.answers, "samples": endured.samples, "kept": endured.kept},
        },
        versions={"vllm": version_of(environment, "vllm")},
    )


async def _tried(bench: Bench, faults: Sequence[Fault]) -> list[Found]:
    found: list[Found] = []
    try:
        for fault in faults:
            began = time.monotonic()
            try:
                found += await fault(bench)
            except AssertionError as error:
                found.append(Found(fault=fault.__doc__ or fault.__name__, client=f"BROKEN: {error}", left="unknown"))
            bench.say(f"{found[-1]}: {time.monotonic() - began:.0f} s")
    finally:
        await bench.stop()
    return found


def _endurance(endured: Endured) -> Table:
    figures = (("resident memory, MiB", "rss", 2**20), ("asyncio tasks", "tasks", 1), ("file descriptors", "fds", 1))
    rows = []
    for name, key, unit in figures:
        first, last, slope = endured.decile(key, 0) / unit, endured.decile(key, -1) / unit, endured.slope(key) / unit
        rows.append((name, f"{first:,.1f}", f"{last:,.1f}", f"{slope * 10_000:+,.2f}"))
    early, late = endured.kept
    grown = (late - early) / ((1 - WARM) * endured.requests) * 10_000
    rows.append(("Python objects that a collection leaves", f"{early:,}", f"{late:,}", f"{grown:+,.0f}"))
    answers = ", ".join(f"{count:,} x {said}" for said, count in sorted(endured.answers.items()))
    return Table(
        caption=(
            f"{endured.requests:,} short requests in {endured.seconds:.0f} s on the simulated engine: {answers}. "
            "The first half of them is warm-up (what is learned of callers is kept up to a bound). Over the other half:"
        ),
        head=("held by the gateway", "first tenth", "last tenth", "growth per 10,000 requests"),
        rows=rows,
    )
